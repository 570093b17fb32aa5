// The torch face of the CUDA depthwise convolution: torch's stream, and workspace from its allocator.
// Schemas, fakes and gradients are defined in pyops/ops/_depthwise_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/depthwise_cuda.h"
#include "conv/depthwise_tensors.h"

namespace pyops::conv {
namespace {

struct CudaEngine {
  static void forward(const DepthwiseForward& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, depthwise_forward_workspace(p));
    depthwise_forward(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
  static void backward(const DepthwiseBackward& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, depthwise_backward_workspace(p));
    depthwise_backward(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  using pyops::conv::CudaEngine;
  m.impl("depthwise_fwd", TORCH_BOX(&pyops::conv::depthwise_fwd<CudaEngine>));
  m.impl("depthwise_infer", TORCH_BOX(&pyops::conv::depthwise_fwd<CudaEngine>));
  m.impl("depthwise_bwd", TORCH_BOX(&pyops::conv::depthwise_bwd<CudaEngine>));
}
#endif  // PYOPS_CUDA
