// Channelwise ops on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "channel_cpu.h"

#include <algorithm>

namespace pyops::conv {
namespace {

struct Kernels {
  void (*moments)(const Channelwise&);
  void (*apply)(const Channelwise&);
  void (*totals)(const Channelwise&);
  void (*reduce)(const Channelwise&);
  void (*gradient)(const Channelwise&);
};
#define PYOPS_TABLE(isa) \
  Kernels { isa::channel_moments, isa::channel_apply, isa::channel_totals, isa::channel_reduce, isa::channel_gradient }

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

void channel_moments_cpu(const Channelwise& p) { kernels().moments(p); }
void channel_apply_cpu(const Channelwise& p) { kernels().apply(p); }
void channel_totals_cpu(const Channelwise& p) { kernels().totals(p); }
void channel_reduce_cpu(const Channelwise& p) { kernels().reduce(p); }
void channel_gradient_cpu(const Channelwise& p) { kernels().gradient(p); }

}  // namespace pyops::conv
