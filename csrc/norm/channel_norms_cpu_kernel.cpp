// The norms over channels on the CPU (channel_norms.h says what they compute), compiled once per instruction set.
#include "channel_norms_cpu_layer.h"
#include "channel_norms_cpu_lrn.h"

namespace pyops::norm::PYOPS_ISA {
namespace {

void run_lrn(const LocalResponse& p, bool gradient) {
  if (p.N * p.P * p.C == 0) return;
  with_storage(p.dtype, [&](auto s) { with_power(p.beta, [&](auto k) { LrnPass<decltype(s), decltype(k)::value>(p, gradient).run(); }); });
}
void run_layer_norm(const LayerNorm& p, bool gradient) {
  with_storage(p.dtype, [&](auto s) { LayerNormPass<decltype(s)>(p, gradient).run(); });
}

}  // namespace

void lrn(const LocalResponse& p) { run_lrn(p, false); }
void lrn_gradient(const LocalResponse& p) { run_lrn(p, true); }
void layer_norm(const LayerNorm& p) { run_layer_norm(p, false); }
void layer_norm_gradient(const LayerNorm& p) { run_layer_norm(p, true); }

}  // namespace pyops::norm::PYOPS_ISA
