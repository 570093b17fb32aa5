// The torch face of cross entropy over rows on the CPU. Schema, fake and reference are in pyops/ops/_cross_entropy_ops.py.
#include "linear/cross_entropy_cpu.h"
#include "linear/cross_entropy_tensors.h"

namespace pyops::linear {
namespace {

struct CrossEntropyCpuEngine {
  static void cross_entropy(const CrossEntropy& p, const Tensor&) { cross_entropy_cpu(p); }
};

}  // namespace
}  // namespace pyops::linear

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&pyops::linear::cross_entropy_rows_<pyops::linear::CrossEntropyCpuEngine>));
}
