// The torch face of the GPU's attention. Schemas, fakes and references are in pyops/ops/_attention_ops.py.
#ifdef PYOPS_CUDA
#include "attention/attention_backward_cuda.h"
#include "attention/attention_cuda.h"
#include "attention/attention_tensors.h"
#include "common/cuda_torch.h"

namespace pyops::attention {
namespace {

struct CudaEngine {
  static void forward(const Attention& p, const Tensor& query) {
    const DeviceGuard guard(query.get_device_index());
    attention_cuda(p, static_cast<cudaStream_t>(current_cuda_stream(query)));
  }
  static void backward(const AttentionGradient& p, const Tensor& query) {
    const DeviceGuard guard(query.get_device_index());
    const Tensor workspace = scratch(query, attention_gradient_workspace(p));
    attention_gradient_cuda(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(query)));
  }
};

}  // namespace
}  // namespace pyops::attention

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::attention::register_attention<pyops::attention::CudaEngine>(m); }
#endif  // PYOPS_CUDA
