// The torch face of the pooling ops, on any device: checks tensors, allocates results and fills pool.h's parameter block.
// An Engine runs them: run, reduce, gradient (p, input), where input is a tensor on the device of the call.
#pragma once
#include "conv/channel_tensors.h"
#include "conv/depthwise_tensors.h"
#include "conv/pool.h"

namespace pyops::conv {

constexpr int64_t kMostWindow = 255;  // positions, so that a byte tells them apart

// The tensors of one call, kept alive while the kernels that read them are queued.
struct PoolCall {
  Pooling p{};
  Tensor input;
  MaybeTensor grad, index, affine, terms;

  PoolCall(const Tensor& t, const MaybeTensor& affine_, const Pair& kernel, const Pair& stride, const Pair& padding, int64_t activation,
           double slope)
      : input(t) {
    STD_TORCH_CHECK(t.dim() == 4, "input: expected [N, C, H, W]");
    p.dtype = dtype_of("input", t);
    p.N = t.size(0), p.C = t.size(1), p.H = t.size(2), p.W = t.size(3);
    window(kernel, stride, padding);
    p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
    input = as_image(t), affine = vector_of("affine", affine_, input, {3, p.C});
    p.input = input.const_data_ptr(), p.affine = floats(affine);
  }
  // Without an index the gradient of an average.
  void gradient_of(const Tensor& grad_, const MaybeTensor& index_) {
    check_tensor("grad", grad_, input, {p.N, p.C, p.OH, p.OW});
    if (index_.has_value()) {
      const Tensor& t = *index_;
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.device() == input.device(), "index: expected uint8 on input's device");
      STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == p.N && t.size(1) == p.C && t.size(2) == p.OH && t.size(3) == p.OW,
                      "index: expected grad's shape");
    }
    grad = as_image(grad_), index = as_image(index_);
    p.maximum = index.has_value(), p.grad = data(grad), p.index = static_cast<const uint8_t*>(data(index));
  }

 private:
  void window(const Pair& kernel, const Pair& stride, const Pair& padding) {
    STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
                    "kernel_size, stride, padding: expected two numbers each");
    const int64_t in[2] = {p.H, p.W};
    int64_t* const out[2] = {&p.OH, &p.OW};
    for (int d = 0; d < 2; ++d) {
      p.kernel[d] = small("kernel_size", kernel[d], 1), p.stride[d] = small("stride", stride[d], 1);
      p.padding[d] = small("padding", padding[d], 0);
      STD_TORCH_CHECK(p.padding[d] <= p.kernel[d] / 2, "padding: expected at most half of kernel_size, got ", p.padding[d], " for ",
                      p.kernel[d]);
      const int64_t room = in[d] + 2 * int64_t{p.padding[d]} - p.kernel[d];
      STD_TORCH_CHECK(in[d] >= 1 && room >= 0, "kernel_size: larger than the padded input");
      *out[d] = room / p.stride[d] + 1;
    }
    const int64_t positions = int64_t{p.kernel[0]} * p.kernel[1];
    STD_TORCH_CHECK(positions <= kMostWindow, "kernel_size: expected windows of at most ", kMostWindow, " positions, got ", positions);
  }
};

template <class Engine>
std::tuple<Tensor, Tensor> pool_run(Tensor input, MaybeTensor affine, bool maximum, Pair kernel_size, Pair stride, Pair padding,
                                    int64_t activation, double slope, bool indices) {
  PoolCall call(input, affine, kernel_size, stride, padding, activation, slope);
  Pooling& p = call.p;
  indices = indices && maximum;
  Tensor output = empty_image(call.input, p.N, p.C, p.OH, p.OW);
  Tensor index = indices ? empty_image(call.input, p.N, p.C, p.OH, p.OW, ScalarType::Byte) : empty(call.input, {0}, ScalarType::Byte);
  p.maximum = maximum, p.output = output.mutable_data_ptr();
  p.index_out = indices ? static_cast<uint8_t*>(index.mutable_data_ptr()) : nullptr;
  Engine::run(p, call.input);
  return {output, index};
}

template <class Engine>
Tensor pool_reduce(Tensor grad, Tensor input, Tensor affine, MaybeTensor index, Pair kernel_size, Pair stride, Pair padding,
                   int64_t activation, double slope) {
  PoolCall call(input, affine, kernel_size, stride, padding, activation, slope);
  call.gradient_of(grad, index);
  Tensor sums = empty(call.input, {2, call.p.C}, ScalarType::Float);
  call.p.sums = sums.mutable_data_ptr<float>();
  Engine::reduce(call.p, call.input);
  return sums;
}

template <class Engine>
Tensor pool_grad(Tensor grad, Tensor input, MaybeTensor affine, MaybeTensor terms, MaybeTensor index, Pair kernel_size, Pair stride,
                 Pair padding, int64_t activation, double slope) {
  STD_TORCH_CHECK(affine.has_value() || !terms.has_value(), "terms: expected affine with it");
  PoolCall call(input, affine, kernel_size, stride, padding, activation, slope);
  call.gradient_of(grad, index);
  call.terms = vector_of("terms", terms, call.input, {2, call.p.C}), call.p.terms = floats(call.terms);
  Tensor output = empty_image(call.input, call.p.N, call.p.C, call.p.H, call.p.W);
  call.p.output = output.mutable_data_ptr();
  Engine::gradient(call.p, call.input);
  return output;
}

// All three of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_pool_ops(Library& m) {
  m.impl("pool_run", TORCH_BOX(&pool_run<Engine>));
  m.impl("pool_reduce", TORCH_BOX(&pool_reduce<Engine>));
  m.impl("pool_grad", TORCH_BOX(&pool_grad<Engine>));
}

}  // namespace pyops::conv
