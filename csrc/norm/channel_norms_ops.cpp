// The torch face of the CPU norms over channels. Schemas, fakes and references are in pyops/ops/_norm_ops.py.
#include "norm/channel_norms_cpu.h"
#include "norm/channel_norms_tensors.h"

namespace pyops::norm {
namespace {

struct NormCpuEngine {
  static void lrn(const LocalResponse& p, const Tensor&) { lrn_cpu(p); }
  static void lrn_gradient(const LocalResponse& p, const Tensor&) { lrn_gradient_cpu(p); }
  static void layer_norm(const LayerNorm& p, const Tensor&) { layer_norm_cpu(p); }
  static void layer_norm_gradient(const LayerNorm& p, const Tensor&) { layer_norm_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::norm

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::norm::register_channel_norms<pyops::norm::NormCpuEngine>(m); }
