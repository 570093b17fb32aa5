// The torch face of the CPU channelwise ops. Schemas, fakes and references are in pyops/ops/_channel_ops.py.
#include "conv/channel_cpu.h"
#include "conv/channel_tensors.h"

namespace pyops::conv {
namespace {

struct ChannelCpuEngine {
  static void moments(const Channelwise& p, const Tensor&) { channel_moments_cpu(p); }
  static void apply(const Channelwise& p, const Tensor&) { channel_apply_cpu(p); }
  static void totals(const Channelwise& p, const Tensor&) { channel_totals_cpu(p); }
  static void reduce(const Channelwise& p, const Tensor&) { channel_reduce_cpu(p); }
  static void gradient(const Channelwise& p, const Tensor&) { channel_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::conv::register_channel_ops<pyops::conv::ChannelCpuEngine>(m); }
