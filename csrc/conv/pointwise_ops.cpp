// The torch face of the CPU 1x1 convolution. Schemas, fakes and references are in pyops/ops/_pointwise_ops.py.
#include "conv/pointwise_cpu.h"
#include "conv/pointwise_tensors.h"

namespace pyops::conv {
namespace {

struct PointwiseCpuEngine {
  static void run(const Pointwise& p, const Tensor&) { pointwise_cpu(p); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::conv::register_pointwise_ops<pyops::conv::PointwiseCpuEngine>(m); }
