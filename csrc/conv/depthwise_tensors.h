// The torch face of the depthwise convolution, on any device: checks tensors, allocates results and fills depthwise.h's parameter blocks.
// An Engine runs them: forward(p, input), backward(p, input), where input is a tensor on the device of the call.
#pragma once
#include "conv/conv_tensors.h"
#include "conv/depthwise.h"

namespace pyops::conv {

using Pair = std::vector<int64_t>;

inline int32_t small(const char* name, int64_t value, int64_t least) {
  STD_TORCH_CHECK(value >= least && value <= INT32_MAX, name, ": expected ", least, " or more, got ", value);
  return static_cast<int32_t>(value);
}

inline DepthwiseShape shape_of(const Tensor& input, const Tensor& weight, const Pair& stride, const Pair& padding, const Pair& dilation) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected [N, C, H, W]");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == input.size(1) && weight.size(1) == 1, "weight: expected [", input.size(1),
                  ", 1, KH, KW]");
  STD_TORCH_CHECK(weight.device() == input.device(), "weight: device differs from input's");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type() || weight.scalar_type() == ScalarType::Float,
                  "weight: expected input's dtype or float32");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected two numbers each");
  DepthwiseShape s{};
  s.N = input.size(0), s.C = input.size(1), s.H = input.size(2), s.W = input.size(3);
  s.KH = small("weight: kernel height", weight.size(2), 1), s.KW = small("weight: kernel width", weight.size(3), 1);
  s.stride_h = small("stride", stride[0], 1), s.stride_w = small("stride", stride[1], 1);
  s.pad_h = small("padding", padding[0], 0), s.pad_w = small("padding", padding[1], 0);
  s.dilation_h = small("dilation", dilation[0], 1), s.dilation_w = small("dilation", dilation[1], 1);
  const int64_t room_h = s.H + 2 * int64_t{s.pad_h} - int64_t{s.dilation_h} * (s.KH - 1) - 1;
  const int64_t room_w = s.W + 2 * int64_t{s.pad_w} - int64_t{s.dilation_w} * (s.KW - 1) - 1;
  STD_TORCH_CHECK(room_h >= -1 && room_w >= -1, "weight: kernel is larger than the padded input");
  s.OH = room_h < 0 ? 0 : room_h / s.stride_h + 1, s.OW = room_w < 0 ? 0 : room_w / s.stride_w + 1;
  return s;
}

inline void check_bias(const MaybeTensor& bias, const Tensor& weight) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type() && bias->device() == weight.device(),
                  "bias: expected weight's dtype and device");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: expected [", weight.size(0), "]");
}

template <class Run>
std::tuple<Tensor, Tensor> depthwise_fwd_by(const Run& run, const Tensor& input_, const Tensor& weight_, const MaybeTensor& bias_,
                                            const MaybeTensor& residual_, const Pair& stride, const Pair& padding, const Pair& dilation,
                                            int64_t activation, double slope, bool means) {
  DepthwiseForward p{};
  p.s = shape_of(input_, weight_, stride, padding, dilation);
  check_bias(bias_, weight_);
  check_tensor("residual", residual_, input_, {p.s.N, p.s.C, p.s.OH, p.s.OW});
  p.dtype = dtype_of("input", input_), p.weight_dtype = dtype_of("weight", weight_);
  p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);

  const Tensor input = as_image(input_), weight = as_contiguous(weight_);
  const MaybeTensor bias = as_contiguous(bias_), residual = as_image(residual_);
  Tensor output = empty_image(input, p.s.N, p.s.C, p.s.OH, p.s.OW);
  Tensor mean = means ? empty(input, {p.s.N, p.s.C}, ScalarType::Float) : empty(input, {0}, ScalarType::Float);
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.bias = data(bias), p.residual = data(residual);
  p.output = output.mutable_data_ptr();
  p.means = means ? mean.mutable_data_ptr<float>() : nullptr;
  run(p, input);
  return {output, mean};
}
template <class Engine>
std::tuple<Tensor, Tensor> depthwise_fwd(Tensor input, Tensor weight, MaybeTensor bias, MaybeTensor residual, Pair stride, Pair padding,
                                         Pair dilation, int64_t activation, double slope, bool means) {
  return depthwise_fwd_by(Engine::forward, input, weight, bias, residual, stride, padding, dilation, activation, slope, means);
}

// A float32 result as `dtype`.
inline Tensor rounded(const Tensor& t, ScalarType dtype) {
  if (dtype == ScalarType::Float) return t;
  Tensor to = t.dim() == 1 ? empty(t, {t.size(0)}, dtype) : empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, dtype);
  torch::stable::copy_(to, t);
  return to;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_bwd_by(const Run& run, const MaybeTensor& grad_output_, const MaybeTensor& grad_means_,
                                                            const Tensor& input_, const Tensor& weight_, const MaybeTensor& bias_,
                                                            const MaybeTensor& residual_, const Pair& stride, const Pair& padding,
                                                            const Pair& dilation, int64_t activation, double slope, bool needs_input,
                                                            bool needs_weight) {
  DepthwiseBackward p{};
  DepthwiseShape& s = p.s;
  s = shape_of(input_, weight_, stride, padding, dilation);
  check_bias(bias_, weight_);
  for (const MaybeTensor& like_output : {residual_, grad_output_})
    check_tensor("residual, grad_output", like_output, input_, {s.N, s.C, s.OH, s.OW});
  if (grad_means_.has_value())
    STD_TORCH_CHECK(grad_means_->scalar_type() == ScalarType::Float && grad_means_->device() == input_.device() &&
                        grad_means_->dim() == 2 && grad_means_->size(0) == s.N && grad_means_->size(1) == s.C,
                    "grad_means: expected float32 [", s.N, ", ", s.C, "] on input's device");
  p.dtype = dtype_of("input", input_), p.weight_dtype = dtype_of("weight", weight_);
  p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);

  const Tensor input = as_image(input_), weight = as_contiguous(weight_);
  const MaybeTensor bias = as_contiguous(bias_), residual = as_image(residual_), grad_output = as_image(grad_output_);
  const MaybeTensor grad_means = as_contiguous(grad_means_);
  const bool wants_bias = needs_weight && bias.has_value();
  const auto nothing = [&] { return empty(input, {0}, input.scalar_type()); };
  Tensor grad_input = needs_input ? empty_image(input, s.N, s.C, s.H, s.W) : nothing();
  Tensor grad_residual = residual.has_value() ? empty_image(input, s.N, s.C, s.OH, s.OW) : nothing();
  Tensor grad_weight = needs_weight ? empty(input, {s.C, 1, s.KH, s.KW}, ScalarType::Float) : nothing();
  Tensor grad_bias = wants_bias ? empty(input, {s.C}, ScalarType::Float) : nothing();
  p.grad_output = data(grad_output), p.grad_means = static_cast<const float*>(data(grad_means));
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.bias = data(bias), p.residual = data(residual);
  p.grad_input = needs_input ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_residual = residual.has_value() ? grad_residual.mutable_data_ptr() : nullptr;
  p.grad_weight = needs_weight ? grad_weight.mutable_data_ptr<float>() : nullptr;
  p.grad_bias = wants_bias ? grad_bias.mutable_data_ptr<float>() : nullptr;
  run(p, input);
  if (needs_weight) grad_weight = rounded(grad_weight, weight.scalar_type());
  if (wants_bias) grad_bias = rounded(grad_bias, weight.scalar_type());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}
template <class Engine>
std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_bwd(MaybeTensor grad_output, MaybeTensor grad_means, Tensor input, Tensor weight,
                                                         MaybeTensor bias, MaybeTensor residual, Pair stride, Pair padding, Pair dilation,
                                                         int64_t activation, double slope, bool needs_input, bool needs_weight) {
  return depthwise_bwd_by(Engine::backward, grad_output, grad_means, input, weight, bias, residual, stride, padding, dilation, activation,
                          slope, needs_input, needs_weight);
}

}  // namespace pyops::conv
