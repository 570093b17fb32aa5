// Sampling on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "gaussian_cpu.h"

#include <algorithm>

namespace pyops::sampling {
namespace {

struct Kernels {
  void (*run)(const Gaussian&);
  void (*gradient)(const Gaussian&);
};

const Kernels& kernels() {
  static const Kernels table = [] {
#if defined(__x86_64__)
    switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
      case '5': return Kernels{avx512::gaussian, avx512::gaussian_gradient};
      case '2': return Kernels{avx2::gaussian, avx2::gaussian_gradient};
    }
#endif
    return Kernels{baseline::gaussian, baseline::gaussian_gradient};
  }();
  return table;
}

}  // namespace

GaussianPlan plan_gaussian(int64_t N, int64_t D) {
  constexpr int64_t kColumns = 4096, kLeast = 4096;  // of a segment; elements of a thread, some 10 us
  const int64_t segments = std::max<int64_t>((D + kColumns - 1) / kColumns, 1);
  const int64_t threads = std::min({N * D / kLeast, N * segments, static_cast<int64_t>(cpu::max_threads())});
  return {static_cast<int>(std::max<int64_t>(threads, 1)), kColumns, segments};
}

void gaussian_cpu(const Gaussian& p) { kernels().run(p); }
void gaussian_gradient_cpu(const Gaussian& p) { kernels().gradient(p); }

}  // namespace pyops::sampling
