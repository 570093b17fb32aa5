// The torch face of the channelwise ops, on any device: checks tensors, allocates results and fills channel.h's parameter block.
// An Engine runs them: moments, apply, totals, reduce, gradient (p, input), where input is a tensor on the device of the call.
#pragma once
#include "conv/channel.h"
#include "conv/conv_tensors.h"

namespace pyops::conv {

// A float vector as kernels read it: on input's device, of these sizes, contiguous. Null when there is none.
inline MaybeTensor vector_of(const char* name, const MaybeTensor& t, const Tensor& input, std::initializer_list<int64_t> sizes) {
  if (!t.has_value()) return t;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->device() == input.device(), name, ": expected float32 on input's device");
  bool same = t->dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t->size(static_cast<int64_t>(d)) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, ": wrong shape");
  return as_contiguous(t);
}
inline const float* floats(const MaybeTensor& t) { return static_cast<const float*>(data(t)); }

// The tensors of one call, kept alive while the kernels that read them are queued.
struct ChannelCall {
  Channelwise p{};
  Tensor input;
  int64_t H, W;
  MaybeTensor grad, residual, affine, keep, gate, offset, terms;

  explicit ChannelCall(const Tensor& t) : input(t) {
    STD_TORCH_CHECK(t.dim() == 4, "input: expected [N, C, H, W]");
    p.dtype = dtype_of("input", t);
    H = t.size(2), W = t.size(3);
    p.N = t.size(0), p.P = H * W, p.C = t.size(1);
    input = as_image(t);
    p.input = input.const_data_ptr();
  }
  void activation(int64_t id, double slope) { p.activation = activation_of("activation", id), p.slope = static_cast<float>(slope); }
  void place(const MaybeTensor& affine_, const MaybeTensor& keep_, const MaybeTensor& residual_) {
    affine = vector_of("affine", affine_, input, {3, p.C}), keep = vector_of("keep", keep_, input, {p.N});
    residual = image("residual", residual_);
    p.affine = floats(affine), p.keep = floats(keep), p.residual = data(residual);
  }
  void gates(const MaybeTensor& gate_, const MaybeTensor& offset_) {
    gate = vector_of("gate", gate_, input, {p.N, p.C}), offset = vector_of("offset", offset_, input, {p.N, p.C});
    p.gate = floats(gate), p.offset = floats(offset);
  }
  void gradient_of(const MaybeTensor& grad_) { grad = image("grad", grad_), p.grad = data(grad); }
  MaybeTensor image(const char* name, const MaybeTensor& t) const {
    check_tensor(name, t, input, {p.N, p.C, H, W});
    return as_image(t);
  }
  Tensor empty_like_input() const { return empty_image(input, p.N, p.C, H, W); }
  Tensor sums(std::initializer_list<int64_t> sizes) {
    Tensor t = empty(input, sizes, ScalarType::Float);
    p.sums = t.mutable_data_ptr<float>();
    return t;
  }
};

template <class Engine>
Tensor channel_moments(Tensor input) {
  ChannelCall call(input);
  Tensor sums = call.sums({2, call.p.C});
  Engine::moments(call.p, call.input);
  return sums;
}

template <class Engine>
Tensor channel_apply(Tensor input, MaybeTensor affine, MaybeTensor keep, MaybeTensor residual, MaybeTensor gate, MaybeTensor offset,
                     int64_t activation, double slope) {
  ChannelCall call(input);
  call.place(affine, keep, residual), call.gates(gate, offset), call.activation(activation, slope);
  Tensor output = call.empty_like_input();
  call.p.output = output.mutable_data_ptr();
  Engine::apply(call.p, call.input);
  return output;
}

template <class Engine>
Tensor channel_sums(Tensor input, MaybeTensor grad, MaybeTensor affine, MaybeTensor keep, MaybeTensor residual, int64_t activation,
                    double slope) {
  ChannelCall call(input);
  call.gradient_of(grad), call.place(affine, keep, residual), call.activation(activation, slope);
  Tensor sums = call.sums({call.p.N, call.p.C});
  Engine::totals(call.p, call.input);
  return sums;
}

template <class Engine>
Tensor channel_reduce(Tensor grad, Tensor input, Tensor affine, MaybeTensor keep, MaybeTensor residual, MaybeTensor gate,
                      MaybeTensor offset, int64_t activation, double slope) {
  ChannelCall call(input);
  call.gradient_of(grad), call.place(affine, keep, residual), call.gates(gate, offset), call.activation(activation, slope);
  Tensor sums = call.sums({2, call.p.C});
  Engine::reduce(call.p, call.input);
  return sums;
}

inline ChannelCall gradient_call(const Tensor& grad, const Tensor& input, const MaybeTensor& affine, const MaybeTensor& terms,
                                 const MaybeTensor& keep, const MaybeTensor& residual, const MaybeTensor& gate, const MaybeTensor& offset,
                                 int64_t activation, double slope) {
  ChannelCall call(input);
  STD_TORCH_CHECK(affine.has_value() || !terms.has_value(), "terms: expected affine with it");
  call.gradient_of(grad), call.place(affine, keep, residual), call.gates(gate, offset), call.activation(activation, slope);
  call.terms = vector_of("terms", terms, call.input, {2, call.p.C}), call.p.terms = floats(call.terms);
  return call;
}

template <class Engine>
std::tuple<Tensor, Tensor> channel_grad(Tensor grad, Tensor input, MaybeTensor affine, MaybeTensor terms, MaybeTensor keep,
                                        MaybeTensor residual, MaybeTensor gate, MaybeTensor offset, int64_t activation, double slope,
                                        bool needs_residual) {
  ChannelCall call = gradient_call(grad, input, affine, terms, keep, residual, gate, offset, activation, slope);
  Tensor output = call.empty_like_input();
  Tensor grad_residual = needs_residual ? call.empty_like_input() : empty(call.input, {0}, call.input.scalar_type());
  call.p.output = output.mutable_data_ptr();
  call.p.grad_residual = needs_residual ? grad_residual.mutable_data_ptr() : nullptr;
  Engine::gradient(call.p, call.input);
  return {output, grad_residual};
}

template <class Engine>
void channel_grad_(Tensor grad, Tensor input, MaybeTensor affine, MaybeTensor terms, MaybeTensor keep, MaybeTensor residual,
                   MaybeTensor gate, MaybeTensor offset, int64_t activation, double slope) {
  ChannelCall call = gradient_call(grad, input, affine, terms, keep, residual, gate, offset, activation, slope);
  const bool in_place = call.p.grad == grad.const_data_ptr();
  Tensor output = in_place ? grad : call.empty_like_input();
  call.p.output = output.mutable_data_ptr();
  Engine::gradient(call.p, call.input);
  if (!in_place) torch::stable::copy_(grad, output);
}

// All six of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_channel_ops(Library& m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments<Engine>));
  m.impl("channel_apply", TORCH_BOX(&channel_apply<Engine>));
  m.impl("channel_sums", TORCH_BOX(&channel_sums<Engine>));
  m.impl("channel_reduce", TORCH_BOX(&channel_reduce<Engine>));
  m.impl("channel_grad", TORCH_BOX(&channel_grad<Engine>));
  m.impl("channel_grad_", TORCH_BOX(&channel_grad_<Engine>));
}

}  // namespace pyops::conv
