// The torch face of the CUDA pooling ops: torch's stream, and workspace from its allocator.
// Schemas, fakes and references are in pyops/ops/_pool_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/pool_cuda.h"
#include "conv/pool_tensors.h"

namespace pyops::conv {
namespace {

struct PoolCudaEngine {
  static void run(const Pooling& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    pool_run(p, stream(input));
  }
  static void reduce(const Pooling& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, pool_reduce_workspace(p));
    pool_reduce(p, workspace.mutable_data_ptr(), stream(input));
  }
  static void gradient(const Pooling& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    pool_gradient(p, stream(input));
  }

 private:
  static cudaStream_t stream(const Tensor& input) { return static_cast<cudaStream_t>(current_cuda_stream(input)); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::conv::register_pool_ops<pyops::conv::PoolCudaEngine>(m); }
#endif  // PYOPS_CUDA
