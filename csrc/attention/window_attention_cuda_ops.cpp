// The torch face of the GPU's window attention. Schemas, fakes and references are in pyops/ops/_window_attention_ops.py.
#ifdef PYOPS_CUDA
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
};

}  // namespace
}  // namespace pyops::attention

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  m.impl("window_attention_into", TORCH_BOX(&pyops::attention::window_attention_into<pyops::attention::WindowCudaEngine>));
}
#endif  // PYOPS_CUDA
