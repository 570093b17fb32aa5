// The torch face of the 1x1 convolution, on any device: checks tensors, allocates results and fills pointwise.h's parameter block.
// An Engine runs it: run(p, input), where input is a tensor on the device of the call; kPacked: it takes packed weights.
#pragma once
#include "conv/channel_tensors.h"
#include "conv/pointwise.h"

namespace pyops::conv {

// The tensor itself, or a dense copy where its positions are not evenly spaced.
inline Tensor as_positions(const Tensor& t) { return t.numel() == 0 || position_stride(t) > 0 ? t : as_image(t); }

template <class Engine>
void pointwise_fill(Pointwise& p, Tensor& output, const Tensor& input_, const Tensor& weight_, const MaybeTensor& rows_,
                    const MaybeTensor& affine_, const MaybeTensor& gate_, int64_t input_activation, double input_slope,
                    const MaybeTensor& bias_, const MaybeTensor& keep_, const MaybeTensor& residual_, int64_t activation, double slope) {
  STD_TORCH_CHECK(input_.dim() == 4, "input: expected [N, C, H, W]");
  p.N = input_.size(0), p.C = input_.size(1), p.P = input_.size(2) * input_.size(3);
  p.packed = Engine::kPacked && weight_.dim() == 3;
  STD_TORCH_CHECK(weight_.dim() == (p.packed ? 3 : 2) && weight_.size(1) == p.C && weight_.device() == input_.device(),
                  "weight: expected [O, ", p.C, "] on input's device");
  STD_TORCH_CHECK(weight_.scalar_type() == input_.scalar_type() || weight_.scalar_type() == ScalarType::Float,
                  "weight: expected input's dtype or float32");
  p.O = p.packed ? output.size(1) : weight_.size(0);
  STD_TORCH_CHECK(!p.packed || (weight_.size(0) == (p.O + 15) / 16 && weight_.size(2) == 16 && input_.scalar_type() == ScalarType::Float),
                  "weight: packed weights are [O/16, C, 16], for float32 images");
  STD_TORCH_CHECK(p.C >= 1 && p.O >= 1, "weight: expected at least one input and one output channel");
  p.dtype = dtype_of("input", input_), p.weight_dtype = dtype_of("weight", weight_);
  p.input_activation = activation_of("input_activation", input_activation), p.input_slope = static_cast<float>(input_slope);
  p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
  check_tensor("output", output, input_, {p.N, p.O, input_.size(2), input_.size(3)});
  check_tensor("residual", residual_, input_, {p.N, p.O, input_.size(2), input_.size(3)});
  STD_TORCH_CHECK(output.numel() == 0 || position_stride(output) > 0, "output: expected channels_last memory or a channel slice of it");

  const Tensor input = as_positions(input_), weight = as_contiguous(weight_);
  const MaybeTensor rows = vector_of("rows", rows_, input, {2, p.N * p.P}), affine = vector_of("affine", affine_, input, {3, p.C});
  const MaybeTensor gate = vector_of("gate", gate_, input, {p.N, p.C}), bias = vector_of("bias", bias_, input, {p.O});
  const MaybeTensor keep = vector_of("keep", keep_, input, {p.N});
  const MaybeTensor residual = residual_.has_value() ? MaybeTensor(as_positions(*residual_)) : residual_;
  p.input_stride = position_stride(input), p.output_stride = position_stride(output);
  p.residual_stride = residual.has_value() ? position_stride(*residual) : 0;
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr(), p.residual = data(residual);
  p.rows = floats(rows), p.affine = floats(affine), p.gate = floats(gate), p.bias = floats(bias), p.keep = floats(keep);
  p.output = output.mutable_data_ptr();
  Engine::run(p, input);
}

template <class Engine>
std::tuple<Tensor, Tensor> pointwise_run(Tensor input, Tensor weight, MaybeTensor rows, MaybeTensor affine, MaybeTensor gate,
                                         int64_t input_activation, double input_slope, MaybeTensor bias, MaybeTensor keep,
                                         MaybeTensor residual, int64_t activation, double slope, bool moments, bool tf32) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 2, "input, weight: expected [N, C, H, W] and [O, C]");
  Pointwise p{};
  p.tf32 = tf32;
  Tensor output = empty_image(input, input.size(0), weight.size(0), input.size(2), input.size(3));
  Tensor sums = moments ? empty(input, {2, weight.size(0)}, ScalarType::Float) : empty(input, {0}, ScalarType::Float);
  p.moments = moments ? sums.mutable_data_ptr<float>() : nullptr;
  pointwise_fill<Engine>(p, output, input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation,
                         slope);
  return {output, sums};
}

template <class Engine>
void pointwise_into(Tensor output, Tensor input, Tensor weight, MaybeTensor rows, MaybeTensor affine, MaybeTensor gate,
                    int64_t input_activation, double input_slope, MaybeTensor bias, MaybeTensor keep, MaybeTensor residual,
                    int64_t activation, double slope, bool tf32) {
  STD_TORCH_CHECK(output.dim() == 4, "output: expected [N, O, H, W]");
  Pointwise p{};
  p.tf32 = tf32;
  pointwise_fill<Engine>(p, output, input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation,
                         slope);
}

template <class Engine, class Library>
void register_pointwise_ops(Library& m) {
  m.impl("pointwise_run", TORCH_BOX(&pointwise_run<Engine>));
  m.impl("pointwise_into", TORCH_BOX(&pointwise_into<Engine>));
}

}  // namespace pyops::conv
