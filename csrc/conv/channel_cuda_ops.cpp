// The torch face of the CUDA channelwise ops: torch's stream, and workspace from its allocator.
// Schemas, fakes and references are in pyops/ops/_channel_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/channel_cuda.h"
#include "conv/channel_tensors.h"

namespace pyops::conv {
namespace {

struct ChannelCudaEngine {
  static void moments(const Channelwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, channel_moments_workspace(p));
    channel_moments(p, workspace.mutable_data_ptr(), stream(input));
  }
  static void apply(const Channelwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    channel_apply(p, stream(input));
  }
  static void totals(const Channelwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, channel_totals_workspace(p));
    channel_totals(p, workspace.mutable_data_ptr(), stream(input));
  }
  static void reduce(const Channelwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, channel_reduce_workspace(p));
    channel_reduce(p, workspace.mutable_data_ptr(), stream(input));
  }
  static void gradient(const Channelwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    channel_gradient(p, stream(input));
  }

 private:
  static cudaStream_t stream(const Tensor& input) { return static_cast<cudaStream_t>(current_cuda_stream(input)); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::conv::register_channel_ops<pyops::conv::ChannelCudaEngine>(m); }
#endif  // PYOPS_CUDA
