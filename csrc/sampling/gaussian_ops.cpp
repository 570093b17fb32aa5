// The torch face of sampling on the CPU. Schemas, fakes and references are in pyops/ops/_sampling_ops.py.
#include "sampling/gaussian_cpu.h"
#include "sampling/gaussian_tensors.h"

namespace pyops::sampling {
namespace {

struct GaussianCpuEngine {
  static void run(const Gaussian& p, const Tensor&) { gaussian_cpu(p); }
  static void gradient(const Gaussian& p, const Tensor&) { gaussian_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::sampling

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::sampling::register_gaussian<pyops::sampling::GaussianCpuEngine>(m); }
