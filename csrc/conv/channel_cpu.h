// CPU side of the channelwise ops: the entry points, and what channel_cpu.cpp (compiled once) and the kernels (compiled per instruction
// set) share.
#pragma once
#include "../common/parallel.h"
#include "channel.h"

namespace pyops::conv {

void channel_moments_cpu(const Channelwise& p);
void channel_apply_cpu(const Channelwise& p);
void channel_totals_cpu(const Channelwise& p);
void channel_reduce_cpu(const Channelwise& p);
void channel_gradient_cpu(const Channelwise& p);

// How the work is cut. Few channels: `group` positions are one row of group * C values, so that loops over a row are long. Items are
// (image, band of positions), runs of items are chunks; a chunk has sums of its own, and its cut depends on sizes alone.
struct ChannelPlan {
  int threads;
  int64_t group, bands, chunks;
};
ChannelPlan plan_channels(int64_t N, int64_t P, int64_t C);

#define PYOPS_CHANNEL_KERNELS(isa)             \
  namespace isa {                              \
  void channel_moments(const Channelwise& p);  \
  void channel_apply(const Channelwise& p);    \
  void channel_totals(const Channelwise& p);   \
  void channel_reduce(const Channelwise& p);   \
  void channel_gradient(const Channelwise& p); \
  }
PYOPS_CHANNEL_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_CHANNEL_KERNELS(avx2)
PYOPS_CHANNEL_KERNELS(avx512)
#endif

}  // namespace pyops::conv
