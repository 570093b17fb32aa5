// The torch face of the CUDA norms over channels: torch's stream, and workspace from its allocator.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "norm/channel_norms_cuda.h"
#include "norm/channel_norms_tensors.h"

namespace pyops::norm {
namespace {

struct ChannelNormsCudaEngine {
  static void lrn(const LocalResponse& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    norm::lrn(p, stream(input));
  }
  static void lrn_gradient(const LocalResponse& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, lrn_gradient_workspace(p));
    norm::lrn_gradient(p, workspace.mutable_data_ptr(), stream(input));
  }
  static void layer_norm(const LayerNorm& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    norm::layer_norm(p, stream(input));
  }
  static void layer_norm_gradient(const LayerNorm& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, layer_norm_gradient_workspace(p));
    norm::layer_norm_gradient(p, workspace.mutable_data_ptr(), stream(input));
  }

 private:
  static cudaStream_t stream(const Tensor& input) { return static_cast<cudaStream_t>(current_cuda_stream(input)); }
};

}  // namespace
}  // namespace pyops::norm

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::norm::register_channel_norms<pyops::norm::ChannelNormsCudaEngine>(m); }
#endif  // PYOPS_CUDA
