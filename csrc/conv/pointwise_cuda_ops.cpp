// The torch face of the CUDA 1x1 convolution: torch's stream, and workspace from its allocator.
// Schemas, fakes and references are in pyops/ops/_pointwise_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/pointwise_cuda.h"
#include "conv/pointwise_tensors.h"

namespace pyops::conv {
namespace {

struct PointwiseCudaEngine {
  static constexpr bool kPacked = false;
  static void run(const Pointwise& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, pointwise_workspace(p));
    pointwise_run(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::conv::register_pointwise_ops<pyops::conv::PointwiseCudaEngine>(m); }
#endif  // PYOPS_CUDA
