// The torch face of the CPU 1x1 convolution. Schemas, fakes and references are in pyops/ops/_pointwise_ops.py.
#include "conv/pointwise_cpu.h"
#include "conv/pointwise_tensors.h"

namespace pyops::conv {
namespace {

struct PointwiseCpuEngine {
  static constexpr bool kPacked = true;
  static void run(const Pointwise& p, const Tensor&) { pointwise_cpu(p); }
};

std::tuple<Tensor, Tensor, Tensor> pointwise_back(Tensor grad_, Tensor input_, Tensor weight_, MaybeTensor affine_, MaybeTensor gate_,
                                                  int64_t activation, double slope, bool needs_input, bool sums) {
  STD_TORCH_CHECK(input_.dim() == 4 && input_.scalar_type() == ScalarType::Float, "input: expected float32 [N, C, H, W]");
  PointwiseBackward p{};
  const int64_t H = input_.size(2), W = input_.size(3);
  p.N = input_.size(0), p.C = input_.size(1), p.P = H * W;
  STD_TORCH_CHECK(weight_.dim() == 2 && weight_.size(1) == p.C && weight_.scalar_type() == ScalarType::Float,
                  "weight: expected float32 [O, ", p.C, "]");
  p.O = weight_.size(0), p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
  check_tensor("grad", grad_, input_, {p.N, p.O, H, W});
  const Tensor grad = as_image(grad_), input = as_image(input_), weight = as_contiguous(weight_);
  const MaybeTensor affine = vector_of("affine", affine_, input, {3, p.C}), gate = vector_of("gate", gate_, input, {p.N, p.C});
  Tensor grad_a = needs_input ? empty_image(input, p.N, p.C, H, W) : empty(input, {0}, ScalarType::Float);
  Tensor grad_weight = empty(input, {p.O, p.C}, ScalarType::Float);
  Tensor totals = needs_input && sums ? empty(input, {p.N, p.C}, ScalarType::Float) : empty(input, {0}, ScalarType::Float);
  p.grad = static_cast<const float*>(grad.const_data_ptr()), p.input = static_cast<const float*>(input.const_data_ptr());
  p.weight = static_cast<const float*>(weight.const_data_ptr()), p.affine = floats(affine), p.gate = floats(gate);
  p.grad_a = needs_input ? grad_a.mutable_data_ptr<float>() : nullptr, p.grad_weight = grad_weight.mutable_data_ptr<float>();
  p.sums = needs_input && sums ? totals.mutable_data_ptr<float>() : nullptr;
  pointwise_backward_cpu(p);
  return {grad_a, grad_weight, totals};
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  pyops::conv::register_pointwise_ops<pyops::conv::PointwiseCpuEngine>(m);
  m.impl("pointwise_back", TORCH_BOX(&pyops::conv::pointwise_back));
}
