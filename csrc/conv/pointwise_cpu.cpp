// 1x1 convolution on the CPU: the cut of the work, and the kernel of the machine's instruction set.
#include "pointwise_cpu.h"

#include <algorithm>

namespace pyops::conv {

PointwisePlan plan_pointwise(const Pointwise& p) {
  constexpr int64_t kPerThread = 400000, kMostChunks = 64;  // products, about 5 us; chunks: each has its moments
  PointwisePlan plan{};
  const int64_t M = p.N * p.P, blocks = (p.O + 15) / 16;
  plan.tiles = (M + kPointwiseTile - 1) / kPointwiseTile;
  plan.chunks = std::min(plan.tiles, kMostChunks);
  const int64_t work = std::max<int64_t>(1, M * p.C * p.O / kPerThread);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), work));
  plan.parts = plan.chunks >= 2 * plan.threads ? 1 : std::clamp<int64_t>(blocks / 2, 1, plan.threads);
  return plan;
}

void pointwise_cpu(const Pointwise& p) {
  static void (*const kernel)(const Pointwise&) = [] {
#if defined(__x86_64__)
    switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
      case '5': return avx512::pointwise;
      case '2': return avx2::pointwise;
    }
#endif
    return baseline::pointwise;
  }();
  kernel(p);
}

}  // namespace pyops::conv
