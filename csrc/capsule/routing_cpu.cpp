// Routing between capsules on the CPU: the cut of the work, and the kernel of the machine's instruction set.
#include "routing_cpu.h"

#include <algorithm>

namespace pyops::capsule {

RoutingPlan plan_routing(const Routing& p, int64_t lanes) {
  constexpr int64_t kChunks = 16, kChunk = 8192, kShare = 32768;  // most; elements of a chunk, of a thread: a few us an iteration
  RoutingPlan plan{};
  const int64_t sample = p.I * p.J * p.D;
  plan.blocks = (p.I + lanes - 1) / lanes;
  plan.chunks = std::clamp<int64_t>(std::min(plan.blocks, sample / kChunk), 1, kChunks);
  const int64_t most = cpu::max_threads(), wanted = std::clamp<int64_t>(p.N * sample / kShare, 1, most);
  plan.shared = p.N < 4 * wanted && p.N % wanted != 0 && plan.chunks > 1;
  plan.threads = static_cast<int>(std::min(wanted, plan.shared ? plan.chunks : p.N));
  return plan;
}

void routing_cpu(const Routing& p, bool gradient) {
  if (p.N == 0) return;
#if defined(__x86_64__)
  switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
    case '5': return avx512::routing(p, gradient);
    case '2': return avx2::routing(p, gradient);
  }
#endif
  baseline::routing(p, gradient);
}

}  // namespace pyops::capsule
