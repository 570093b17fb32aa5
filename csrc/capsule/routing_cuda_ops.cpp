// The torch face of the CUDA routing between capsules: torch's stream, and workspace from its allocator.
#ifdef PYOPS_CUDA
#include "capsule/routing_cuda.h"
#include "capsule/routing_tensors.h"
#include "common/cuda_torch.h"

namespace pyops::capsule {
namespace {

struct RoutingCudaEngine {
  static void run(const Routing& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, routing_workspace(p, false));
    routing(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
  static void gradient(const Routing& p, const Tensor& input) {
    const DeviceGuard guard(input.get_device_index());
    const Tensor workspace = scratch(input, routing_workspace(p, true));
    routing_gradient(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  }
};

}  // namespace
}  // namespace pyops::capsule

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { pyops::capsule::register_capsules<pyops::capsule::RoutingCudaEngine>(m); }
#endif  // PYOPS_CUDA
