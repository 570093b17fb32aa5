// The torch face of the CUDA dense convolution: torch's stream, and workspace from its allocator.
// Schemas, fakes and references are in pyops/ops/_dense_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/dense_cuda.h"
#include "conv/dense_tensors.h"

namespace pyops::conv {
namespace {

struct DenseCudaEngine {
  static void run(const Dense& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, dense_workspace(p));
    dense_run(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
  static void gradient(const DenseGradient& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, dense_wgrad_workspace(p));
    dense_wgrad(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::conv::register_dense_ops<pyops::conv::DenseCudaEngine>(m); }
#endif  // PYOPS_CUDA
