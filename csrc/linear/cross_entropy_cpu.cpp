// Cross entropy over rows on the CPU: how many threads, and the kernel of the machine's instruction set.
#include "cross_entropy_cpu.h"

#include <algorithm>

namespace pyops::linear {

void cross_entropy_cpu(const CrossEntropy& p) {
  constexpr int64_t kPerThread = 16 << 10;  // logits: about 5 us
  const int threads = static_cast<int>(std::clamp<int64_t>(std::min(p.M, p.M * p.V / kPerThread), 1, cpu::max_threads()));
#if defined(__x86_64__)
  switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
    case '5': return avx512::cross_entropy(p, threads);
    case '2': return avx2::cross_entropy(p, threads);
  }
#endif
  baseline::cross_entropy(p, threads);
}

}  // namespace pyops::linear
