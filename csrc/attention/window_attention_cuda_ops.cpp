// The torch face of the GPU's window attention. Schemas, fakes and references are in pyops/ops/_window_attention_ops.py.
#ifdef PYOPS_CUDA
#include "attention/attention_backward_cuda.h"
#include "attention/attention_cuda.h"
#include "attention/window_attention_tensors.h"
#include "common/cuda_torch.h"

namespace pyops::attention {
namespace {

struct WindowCudaEngine {
  static void forward(const WindowAttention& p, const Tensor& qkv) {
    const DeviceGuard guard(qkv.get_device_index());
    window_attention_cuda(p, static_cast<cudaStream_t>(current_cuda_stream(qkv)));
  }
  static void backward(const WindowAttention& p, const Tensor& qkv) {
    const DeviceGuard guard(qkv.get_device_index());
    const Tensor workspace = scratch(qkv, window_attention_gradient_workspace(p));
    window_attention_gradient_cuda(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(qkv)));
  }
};

}  // namespace
}  // namespace pyops::attention

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::attention::register_window_attention<pyops::attention::WindowCudaEngine>(m); }
#endif  // PYOPS_CUDA
