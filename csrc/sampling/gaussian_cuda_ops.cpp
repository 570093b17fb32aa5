// The torch face of sampling on a GPU: torch's stream, and workspace from its allocator.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "sampling/gaussian_cuda.h"
#include "sampling/gaussian_tensors.h"

namespace pyops::sampling {
namespace {

struct GaussianCudaEngine {
  static void run(const Gaussian& p, const Tensor& mean) {
    const DeviceGuard guard(mean.get_device_index());
    const Tensor workspace = scratch(mean, gaussian_workspace(p));
    gaussian(p, workspace.mutable_data_ptr(), stream(mean));
  }
  static void gradient(const Gaussian& p, const Tensor& mean) {
    const DeviceGuard guard(mean.get_device_index());
    gaussian_gradient(p, stream(mean));
  }

 private:
  static cudaStream_t stream(const Tensor& mean) { return static_cast<cudaStream_t>(current_cuda_stream(mean)); }
};

}  // namespace
}  // namespace pyops::sampling

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::sampling::register_gaussian<pyops::sampling::GaussianCudaEngine>(m); }
#endif  // PYOPS_CUDA
