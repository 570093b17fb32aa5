// The torch face of the norms over channels, on any device: checks tensors, allocates results and fills channel_norms.h's blocks.
// An Engine runs them: lrn, lrn_gradient, layer_norm, layer_norm_gradient (p, input), where input is a tensor on the device of the call.
// Schemas, fakes and references are in pyops/ops/_norm_ops.py.
#pragma once
#include "conv/channel_tensors.h"
#include "norm/channel_norms.h"

namespace pyops::norm {

// An image [N, P, C] or [N, C, P] and what is made like it, kept alive while the kernels that read them are queued.
template <class Block>
struct ImageCall {
  Block p{};
  Tensor input;
  MaybeTensor grad;

  ImageCall(const Tensor& t, bool rows) : input(t) {
    STD_TORCH_CHECK(t.dim() == 3, "input: expected [N, P, C] with rows, else [N, C, P]");
    input = as_contiguous(t);
    p.dtype = conv::dtype_of("input", t), p.rows = rows;
    p.N = t.size(0), p.P = t.size(rows ? 1 : 2), p.C = t.size(rows ? 2 : 1);
    p.input = input.const_data_ptr();
  }
  void gradient_of(const Tensor& t) {
    check_tensor("grad", t, input, {input.size(0), input.size(1), input.size(2)});
    grad = as_contiguous(t), p.grad = grad->const_data_ptr();
  }
  Tensor output() {
    Tensor t = empty(input, {input.size(0), input.size(1), input.size(2)}, input.scalar_type());
    p.output = t.mutable_data_ptr();
    return t;
  }
};

struct LrnCall : ImageCall<LocalResponse> {
  LrnCall(const Tensor& t, bool rows, int64_t size, double alpha, double beta, double k, bool relu) : ImageCall(t, rows) {
    STD_TORCH_CHECK(size >= 1, "size: expected 1 or more, got ", size);
    p.size = size, p.relu = relu;
    p.alpha = static_cast<float>(alpha), p.beta = static_cast<float>(beta), p.k = static_cast<float>(k);
  }
};

template <class Engine>
Tensor lrn_run(Tensor input, bool rows, int64_t size, double alpha, double beta, double k, bool relu) {
  LrnCall call(input, rows, size, alpha, beta, k, relu);
  Tensor output = call.output();
  Engine::lrn(call.p, call.input);
  return output;
}

template <class Engine>
Tensor lrn_grad(Tensor grad, Tensor input, bool rows, int64_t size, double alpha, double beta, double k, bool relu) {
  LrnCall call(input, rows, size, alpha, beta, k, relu);
  call.gradient_of(grad);
  Tensor output = call.output();
  Engine::lrn_gradient(call.p, call.input);
  return output;
}

template <class Engine>
Tensor layer_norm_run(Tensor input, bool rows, MaybeTensor weight_, MaybeTensor bias_, double eps) {
  ImageCall<LayerNorm> call(input, rows);
  const MaybeTensor weight = conv::vector_of("weight", weight_, call.input, {call.p.C});
  const MaybeTensor bias = conv::vector_of("bias", bias_, call.input, {call.p.C});
  call.p.weight = conv::floats(weight), call.p.bias = conv::floats(bias), call.p.eps = static_cast<float>(eps);
  Tensor output = call.output();
  Engine::layer_norm(call.p, call.input);
  return output;
}

template <class Engine>
std::tuple<Tensor, Tensor> layer_norm_grad(Tensor grad, Tensor input, bool rows, MaybeTensor weight_, double eps, bool needs_input) {
  ImageCall<LayerNorm> call(input, rows);
  call.gradient_of(grad);
  const MaybeTensor weight = conv::vector_of("weight", weight_, call.input, {call.p.C});
  call.p.weight = conv::floats(weight), call.p.eps = static_cast<float>(eps);
  Tensor output = needs_input ? call.output() : empty(call.input, {0}, call.input.scalar_type());
  Tensor sums = empty(call.input, {2, call.p.C}, ScalarType::Float);
  call.p.sums = sums.mutable_data_ptr<float>();
  Engine::layer_norm_gradient(call.p, call.input);
  return {output, sums};
}

// All four of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_channel_norms(Library& m) {
  m.impl("lrn_run", TORCH_BOX(&lrn_run<Engine>));
  m.impl("lrn_grad", TORCH_BOX(&lrn_grad<Engine>));
  m.impl("layer_norm_run", TORCH_BOX(&layer_norm_run<Engine>));
  m.impl("layer_norm_grad", TORCH_BOX(&layer_norm_grad<Engine>));
}

}  // namespace pyops::norm
