// Norms over channels on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "channel_norms_cpu.h"

#include <algorithm>

namespace pyops::norm {
namespace {

struct Kernels {
  void (*lrn)(const LocalResponse&);
  void (*lrn_gradient)(const LocalResponse&);
  void (*layer_norm)(const LayerNorm&);
  void (*layer_norm_gradient)(const LayerNorm&);
};
#define PYOPS_TABLE(isa) \
  Kernels { isa::lrn, isa::lrn_gradient, isa::layer_norm, isa::layer_norm_gradient }

const Kernels& kernels() {
  static const Kernels table = [] {
#if defined(__x86_64__)
    switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
      case '5': return PYOPS_TABLE(avx512);
      case '2': return PYOPS_TABLE(avx2);
    }
#endif
    return PYOPS_TABLE(baseline);
  }();
  return table;
}

}  // namespace

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

void lrn_cpu(const LocalResponse& p) { kernels().lrn(p); }
void lrn_gradient_cpu(const LocalResponse& p) { kernels().lrn_gradient(p); }
void layer_norm_cpu(const LayerNorm& p) { kernels().layer_norm(p); }
void layer_norm_gradient_cpu(const LayerNorm& p) { kernels().layer_norm_gradient(p); }

}  // namespace pyops::norm
