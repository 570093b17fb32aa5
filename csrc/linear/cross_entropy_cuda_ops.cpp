// The torch face of the CUDA cross entropy over rows: torch's stream.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "linear/cross_entropy_cuda.h"
#include "linear/cross_entropy_tensors.h"

namespace pyops::linear {
namespace {

struct CrossEntropyCudaEngine {
  static void cross_entropy(const CrossEntropy& p, const Tensor& logits) {
    const DeviceGuard guard(logits.get_device_index());
    cross_entropy_cuda(p, static_cast<cudaStream_t>(current_cuda_stream(logits)));
  }
};

}  // namespace
}  // namespace pyops::linear

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&pyops::linear::cross_entropy_rows_<pyops::linear::CrossEntropyCudaEngine>));
}
#endif  // PYOPS_CUDA
