// The torch face of routing between capsules, on any device: checks tensors, allocates results and fills routing.h's block. An Engine runs
// it: run, gradient (p, input), where input is a tensor on the device of the call. Schemas, fakes and references are in
// pyops/ops/_capsule_ops.py.
#pragma once
#include "capsule/routing.h"
#include "conv/channel_tensors.h"

namespace pyops::capsule {

// Predictions, kept alive while the kernels that read them are queued.
struct RoutingCall {
  Routing p{};
  Tensor input;

  RoutingCall(const Tensor& t, bool by_input) : input(t) {
    STD_TORCH_CHECK(t.dim() == 4, "predictions: expected [N, I, J, D], or [I, N, J, D] with by_input");
    STD_TORCH_CHECK(t.size(by_input ? 0 : 1) >= 1 && t.size(2) >= 1 && t.size(3) >= 1, "predictions: expected capsules on either side");
    input = as_contiguous(t);
    p.dtype = conv::dtype_of("predictions", t), p.by_input = by_input, p.input = input.const_data_ptr();
    p.N = t.size(by_input ? 1 : 0), p.I = t.size(by_input ? 0 : 1), p.J = t.size(2), p.D = t.size(3);
  }
  Tensor output(std::initializer_list<int64_t> sizes) {
    Tensor t = empty(input, sizes, input.scalar_type());
    p.output = t.mutable_data_ptr();
    return t;
  }
};

template <class Engine>
std::tuple<Tensor, Tensor> capsule_run(Tensor predictions, bool by_input, int64_t num_iterations) {
  RoutingCall call(predictions, by_input);
  STD_TORCH_CHECK(num_iterations >= 1, "num_iterations: expected 1 or more, got ", num_iterations);
  call.p.T = num_iterations;
  Tensor output = call.output({call.p.N, call.p.J, call.p.D});
  Tensor sums = empty(call.input, {call.p.N, call.p.T, call.p.J, call.p.D}, ScalarType::Float);
  call.p.sums = sums.mutable_data_ptr<float>();
  Engine::run(call.p, call.input);
  return {output, sums};
}

template <class Engine>
Tensor capsule_grad(Tensor grad_, Tensor predictions, bool by_input, Tensor sums_, bool stop_gradient) {
  RoutingCall call(predictions, by_input);
  check_tensor("grad", grad_, call.input, {call.p.N, call.p.J, call.p.D});
  STD_TORCH_CHECK(sums_.dim() == 4 && sums_.size(1) >= 1, "sums: expected [N, T, J, D]");
  call.p.T = sums_.size(1), call.p.stop_gradient = stop_gradient;
  const MaybeTensor sums = conv::vector_of("sums", MaybeTensor(sums_), call.input, {call.p.N, call.p.T, call.p.J, call.p.D});
  const Tensor grad = as_contiguous(grad_);
  call.p.grad = grad.const_data_ptr(), call.p.sums = const_cast<float*>(conv::floats(sums));
  Tensor output = call.output({call.input.size(0), call.input.size(1), call.p.J, call.p.D});
  Engine::gradient(call.p, call.input);
  return output;
}

// Both of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_capsules(Library& m) {
  m.impl("capsule_run", TORCH_BOX(&capsule_run<Engine>));
  m.impl("capsule_grad", TORCH_BOX(&capsule_grad<Engine>));
}

}  // namespace pyops::capsule
