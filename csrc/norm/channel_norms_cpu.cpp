// Norms over channels on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "channel_norms_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::norm {

NormPlan plan_norm(int64_t N, int64_t P, int64_t C, bool rows, int64_t widest, int64_t lanes, int64_t sums) {
  constexpr int64_t kChunks = 64, kBlocks = 8;               // most of a call; least of its images, for a share each
  const int64_t chunk = std::max<int64_t>(8192, 16 * sums);  // elements: a few us, and much more than its sums cost
  NormPlan plan{};
  if (rows) {
    plan.block = 1, plan.blocks = P;
  } else {
    const int64_t wanted = std::max((P + widest - 1) / widest, std::min(kBlocks / std::max<int64_t>(N, 1), P * C / chunk));
    const int64_t even = (P + std::max<int64_t>(wanted, 1) - 1) / std::max<int64_t>(wanted, 1);
    plan.block = std::max<int64_t>((even + lanes - 1) / lanes * lanes, lanes);
    plan.blocks = (P + plan.block - 1) / plan.block;
  }
  plan.units = N * plan.blocks;
  plan.chunks = std::clamp<int64_t>(std::min(plan.units, N * P * C / chunk), 1, kChunks);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), plan.chunks));
  return plan;
}

void lrn_cpu(const LocalResponse& p) { PYOPS_CPU_KERNEL(lrn)(p); }
void lrn_gradient_cpu(const LocalResponse& p) { PYOPS_CPU_KERNEL(lrn_gradient)(p); }
void layer_norm_cpu(const LayerNorm& p) { PYOPS_CPU_KERNEL(layer_norm)(p); }
void layer_norm_gradient_cpu(const LayerNorm& p) { PYOPS_CPU_KERNEL(layer_norm_gradient)(p); }

}  // namespace pyops::norm
