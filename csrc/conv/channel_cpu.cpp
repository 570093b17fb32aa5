// Channelwise ops on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "channel_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::conv {

ChannelPlan plan_channels(int64_t N, int64_t P, int64_t C) {
  constexpr int64_t kRow = 512, kItem = 16384;  // elements; the last: about 5 us
  ChannelPlan plan{};
  const int64_t c = std::max<int64_t>(C, 1);
  plan.group = std::clamp<int64_t>(kRow / c, 1, std::max<int64_t>(P, 1));
  plan.bands = std::clamp<int64_t>(P * c / kItem, 1, std::max<int64_t>(P, 1));
  plan.chunks = std::clamp<int64_t>(std::min(N * plan.bands, N * P * c / kItem), 1, 32);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), plan.chunks));
  return plan;
}

void channel_moments_cpu(const Channelwise& p) { PYOPS_CPU_KERNEL(channel_moments)(p); }
void channel_apply_cpu(const Channelwise& p) { PYOPS_CPU_KERNEL(channel_apply)(p); }
void channel_totals_cpu(const Channelwise& p) { PYOPS_CPU_KERNEL(channel_totals)(p); }
void channel_reduce_cpu(const Channelwise& p) { PYOPS_CPU_KERNEL(channel_reduce)(p); }
void channel_gradient_cpu(const Channelwise& p) { PYOPS_CPU_KERNEL(channel_gradient)(p); }

}  // namespace pyops::conv
