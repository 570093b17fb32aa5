// The torch face of the CPU depthwise convolution.
// Schemas, fakes and gradients are defined in pyops/ops/_depthwise_ops.py.
#include "conv/channel_tensors.h"
#include "conv/depthwise_cpu.h"
#include "conv/depthwise_tensors.h"

namespace pyops::conv {
namespace {

struct CpuEngine {
  static void forward(const DepthwiseForward& p, const Tensor&) { depthwise_forward_cpu(p); }
  static void backward(const DepthwiseBackward& p, const Tensor&) { depthwise_backward_cpu(p); }
};

// depthwise_after and its backward: the convolution of activation(affine(input)).
struct Prologue {
  MaybeTensor affine;
  DepthwisePrologue before;
  Prologue(const Tensor& input, const Tensor& affine_, int64_t activation, double slope) {
    affine = vector_of("affine", affine_, input, {3, input.size(1)});
    before = {floats(affine), activation_of("activation", activation), static_cast<float>(slope)};
  }
};

Tensor depthwise_after(Tensor input, Tensor affine, int64_t activation, double slope, Tensor weight, Pair stride, Pair padding,
                       Pair dilation) {
  const Prologue prologue(input, affine, activation, slope);
  const auto run = [&](const DepthwiseForward& p, const Tensor&) { depthwise_forward_cpu(p, prologue.before); };
  return std::get<0>(depthwise_fwd_by(run, input, weight, {}, {}, stride, padding, dilation, 0, 0.0, false));
}

std::tuple<Tensor, Tensor> depthwise_after_bwd(Tensor grad, Tensor input, Tensor affine, int64_t activation, double slope, Tensor weight,
                                               Pair stride, Pair padding, Pair dilation) {
  const Prologue prologue(input, affine, activation, slope);
  const auto run = [&](const DepthwiseBackward& p, const Tensor&) { depthwise_backward_cpu(p, prologue.before); };
  const auto found = depthwise_bwd_by(run, grad, {}, input, weight, {}, {}, stride, padding, dilation, 0, 0.0, true, true);
  return {std::get<0>(found), std::get<1>(found)};
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  using pyops::conv::CpuEngine;
  m.impl("depthwise_fwd", TORCH_BOX(&pyops::conv::depthwise_fwd<CpuEngine>));
  m.impl("depthwise_infer", TORCH_BOX(&pyops::conv::depthwise_fwd<CpuEngine>));
  m.impl("depthwise_bwd", TORCH_BOX(&pyops::conv::depthwise_bwd<CpuEngine>));
  m.impl("depthwise_after", TORCH_BOX(&pyops::conv::depthwise_after));
  m.impl("depthwise_after_bwd", TORCH_BOX(&pyops::conv::depthwise_after_bwd));
}
