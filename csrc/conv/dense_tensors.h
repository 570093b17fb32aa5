// The torch face of the dense convolution, its transpose and its filter's gradient, on any device: checks tensors, allocates results and
// fills dense.h's parameter blocks. An Engine runs them: run(p, input), gradient(p, input), input a tensor on the device of the call.
#pragma once
#include "conv/dense.h"
#include "conv/depthwise_tensors.h"
#include "conv/pointwise_tensors.h"

namespace pyops::conv {

inline DenseShape dense_shape(const Tensor& input, int64_t O, int64_t KH, int64_t KW, const Pair& stride, const Pair& padding,
                              const Pair& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected [N, C, H, W]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding, dilation: expected two numbers each");
  DenseShape s{};
  s.N = input.size(0), s.C = input.size(1), s.H = input.size(2), s.W = input.size(3), s.O = O;
  s.KH = small("kernel height", KH, 1), s.KW = small("kernel width", KW, 1), s.groups = small("groups", groups, 1);
  s.stride_h = small("stride", stride[0], 1), s.stride_w = small("stride", stride[1], 1);
  s.pad_h = small("padding", padding[0], 0), s.pad_w = small("padding", padding[1], 0);
  s.dilation_h = small("dilation", dilation[0], 1), s.dilation_w = small("dilation", dilation[1], 1);
  STD_TORCH_CHECK(s.C >= s.groups && s.O >= s.groups && s.C % s.groups == 0 && s.O % s.groups == 0,
                  "groups: expected a divisor of the input's and the output's channels, got ", groups);
  return s;
}

inline void set_output_size(DenseShape& s) {
  const int64_t room_h = s.H + 2 * int64_t{s.pad_h} - int64_t{s.dilation_h} * (s.KH - 1) - 1;
  const int64_t room_w = s.W + 2 * int64_t{s.pad_w} - int64_t{s.dilation_w} * (s.KW - 1) - 1;
  STD_TORCH_CHECK(room_h >= -1 && room_w >= -1, "weight: kernel is larger than the padded input");
  s.OH = room_h < 0 ? 0 : room_h / s.stride_h + 1, s.OW = room_w < 0 ? 0 : room_w / s.stride_w + 1;
}

inline int64_t transposed_size(int64_t size, int64_t asked, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t least = (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(asked >= least && asked >= 0 && asked < least + std::max(stride, dilation), "output_size: expected ", least, " to ",
                  least + std::max(stride, dilation) - 1, ", got ", asked);
  return asked;
}

template <class Engine>
std::tuple<Tensor, Tensor> dense_call(Dense& p, const Tensor& input_, const Tensor& weight, const MaybeTensor& bias_,
                                      const MaybeTensor& residual_, int64_t activation, double slope, bool moments) {
  const int64_t rows = p.transposed ? p.s.C : p.s.O, columns = (p.transposed ? p.s.O : p.s.C) / p.s.groups;
  check_tensor("weight", weight, input_, {rows, columns, p.s.KH, p.s.KW});
  check_tensor("residual", residual_, input_, {p.s.N, p.s.O, p.s.OH, p.s.OW});
  p.dtype = dtype_of("input", input_);
  p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);

  const Tensor input = as_positions(input_);
  const MaybeTensor bias = vector_of("bias", bias_, input, {p.s.O});
  const MaybeTensor residual = residual_.has_value() ? MaybeTensor(as_positions(*residual_)) : residual_;
  const int shift = p.pool != Pool::none;
  Tensor output = empty_image(input, p.s.N, p.s.O, p.s.OH >> shift, p.s.OW >> shift);
  Tensor sums = moments ? empty(input, {2, p.s.O}, ScalarType::Float) : empty(input, {0}, ScalarType::Float);
  p.input_stride = position_stride(input), p.residual_stride = residual.has_value() ? position_stride(*residual) : 0;
  for (int d = 0; d < 4; ++d) p.weight_strides[d] = weight.stride(d);
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr(), p.residual = data(residual), p.bias = floats(bias);
  p.output = output.mutable_data_ptr(), p.moments = moments ? sums.mutable_data_ptr<float>() : nullptr;
  Engine::run(p, input);
  return {output, sums};
}

template <class Engine>
std::tuple<Tensor, Tensor> conv_run(Tensor input, Tensor weight, MaybeTensor bias, MaybeTensor residual, Pair stride, Pair padding,
                                    Pair dilation, int64_t groups, int64_t activation, double slope, bool residual_last, bool moments,
                                    bool tf32, int64_t pool) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [O, C/groups, KH, KW]");
  Dense p{};
  p.s = dense_shape(input, weight.size(0), weight.size(2), weight.size(3), stride, padding, dilation, groups);
  set_output_size(p.s);
  STD_TORCH_CHECK(pool >= 0 && pool <= 2, "pool: expected 0, 1 or 2, got ", pool);
  STD_TORCH_CHECK(pool == 0 || (p.s.OH >= 2 && p.s.OW >= 2), "pool: needs 2 rows and columns");
  STD_TORCH_CHECK(pool == 0 || !moments, "moments: not of a pooled output");
  p.pool = static_cast<Pool>(pool);
  p.residual_last = residual_last, p.tf32 = tf32;
  return dense_call<Engine>(p, input, weight, bias, residual, activation, slope, moments);
}

template <class Engine>
std::tuple<Tensor, Tensor> conv_transpose_run(Tensor input, Tensor weight, MaybeTensor bias, MaybeTensor residual, Pair stride,
                                              Pair padding, Pair output_size, Pair dilation, int64_t groups, int64_t activation,
                                              double slope, bool residual_last, bool moments, bool tf32) {
  STD_TORCH_CHECK(weight.dim() == 4 && output_size.size() == 2, "weight, output_size: expected [I, O/groups, KH, KW] and two numbers");
  Dense p{};
  p.s = dense_shape(input, weight.size(1) * groups, weight.size(2), weight.size(3), stride, padding, dilation, groups);
  p.s.OH = transposed_size(p.s.H, output_size[0], p.s.KH, p.s.stride_h, p.s.pad_h, p.s.dilation_h);
  p.s.OW = transposed_size(p.s.W, output_size[1], p.s.KW, p.s.stride_w, p.s.pad_w, p.s.dilation_w);
  p.transposed = true, p.residual_last = residual_last, p.tf32 = tf32;
  return dense_call<Engine>(p, input, weight, bias, residual, activation, slope, moments);
}

template <class Engine>
Tensor conv_wgrad(Tensor grad_, Tensor input_, Pair kernel_size, Pair stride, Pair padding, Pair dilation, int64_t groups, bool tf32) {
  STD_TORCH_CHECK(grad_.dim() == 4 && kernel_size.size() == 2, "grad, kernel_size: expected [N, O, OH, OW] and two numbers");
  DenseGradient p{};
  p.s = dense_shape(input_, grad_.size(1), kernel_size[0], kernel_size[1], stride, padding, dilation, groups);
  set_output_size(p.s);
  check_tensor("grad", grad_, input_, {p.s.N, p.s.O, p.s.OH, p.s.OW});
  p.dtype = dtype_of("input", input_), p.tf32 = tf32;

  const Tensor grad = as_positions(grad_), input = as_positions(input_);
  Tensor grad_weight = empty(input, {p.s.O, p.s.C / p.s.groups, p.s.KH, p.s.KW}, input.scalar_type());
  p.grad_stride = position_stride(grad), p.input_stride = position_stride(input);
  p.grad = grad.const_data_ptr(), p.input = input.const_data_ptr(), p.grad_weight = grad_weight.mutable_data_ptr();
  Engine::gradient(p, input);
  return grad_weight;
}

template <class Engine, class Library>
void register_dense_ops(Library& m) {
  m.impl("conv_run", TORCH_BOX(&conv_run<Engine>));
  m.impl("conv_transpose_run", TORCH_BOX(&conv_transpose_run<Engine>));
  m.impl("conv_wgrad", TORCH_BOX(&conv_wgrad<Engine>));
}

}  // namespace pyops::conv
