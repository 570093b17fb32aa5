// Depthwise convolution on the CPU: checks, the cut of the work, and the kernel of the machine's instruction set.
#include "depthwise_cpu.h"
#include "../common/isa.h"

#include <algorithm>
#include <stdexcept>

namespace pyops::conv {
namespace {

void check(const DepthwiseShape& s) {
  const bool sizes = s.N >= 0 && s.H >= 0 && s.W >= 0 && s.C >= 0 && s.OH >= 0 && s.OW >= 0 && s.KH >= 1 && s.KW >= 1;
  const bool steps = s.stride_h >= 1 && s.stride_w >= 1 && s.dilation_h >= 1 && s.dilation_w >= 1 && s.pad_h >= 0 && s.pad_w >= 0;
  if (!sizes || !steps) throw std::runtime_error("depthwise convolution: bad sizes");
}

}  // namespace

DepthwisePlan plan_depthwise(const DepthwiseShape& s, int64_t block_bytes) {
  // A group's rows share a memory page and stay in L2 with room for what streams past.
  constexpr int64_t kGroupBytes = 256 << 10, kWorkPerThread = 200000;  // products: about 10 us
  DepthwisePlan plan{};
  plan.blocks = (s.C + 15) / 16;
  const int64_t work = s.N * s.OH * s.OW * s.C * s.KH * s.KW;
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), std::max<int64_t>(1, work / kWorkPerThread)));
  const int64_t images = std::max<int64_t>(s.N, 1), blocks = std::max<int64_t>(plan.blocks, 1);
  const int64_t most = std::clamp<int64_t>(kGroupBytes / block_bytes, 1, blocks);
  plan.groups = std::max((blocks + most - 1) / most, std::min<int64_t>(blocks, (plan.threads + images - 1) / images));
  plan.group = (blocks + plan.groups - 1) / plan.groups;
  plan.bands = 1;
  const int64_t items = images * plan.groups, most_bands = std::max<int64_t>(1, s.OH / 4);
  while (plan.bands < most_bands && items * plan.bands % plan.threads != 0 && items * plan.bands < 8 * plan.threads) ++plan.bands;
  return plan;
}

void depthwise_forward_cpu(const DepthwiseForward& p, const DepthwisePrologue& before) {
  check(p.s);
  PYOPS_CPU_KERNEL(depthwise_forward)(p, before);
}

void depthwise_backward_cpu(const DepthwiseBackward& p, const DepthwisePrologue& before) {
  check(p.s);
  PYOPS_CPU_KERNEL(depthwise_backward)(p, before);
}

}  // namespace pyops::conv
