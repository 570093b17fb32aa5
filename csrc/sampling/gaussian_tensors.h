// The torch face of sampling, on any device: checks tensors, allocates results and fills gaussian.h's block. An Engine runs it: run,
// gradient (p, mean), where mean is a tensor on the device of the call. Schemas, fakes and references are in pyops/ops/_sampling_ops.py.
#pragma once
#include "conv/channel_tensors.h"
#include "sampling/gaussian.h"

namespace pyops::sampling {

// The tensors of one call, kept alive while the kernels that read them are queued.
struct GaussianCall {
  Gaussian p{};
  Tensor mean, log_var, seed;
  MaybeTensor grad, grad_kl;

  GaussianCall(const Tensor& mean_, const Tensor& log_var_, const Tensor& seed_) : mean(mean_), log_var(log_var_), seed(seed_) {
    STD_TORCH_CHECK(mean_.dim() == 2, "mean: expected [N, D]");
    p.dtype = conv::dtype_of("mean", mean_);
    p.N = mean_.size(0), p.D = mean_.size(1);
    STD_TORCH_CHECK(p.N <= kMostRows && p.D <= kMostColumns, "mean: expected up to 2^32 rows of up to 2^34 columns");
    check_tensor("log_var", log_var_, mean_, {p.N, p.D});
    STD_TORCH_CHECK(seed_.scalar_type() == ScalarType::Long && seed_.numel() == 1 && seed_.device() == mean_.device(),
                    "seed: expected one int64 on mean's device");
    mean = with_contiguous_rows(mean_), log_var = with_contiguous_rows(log_var_);
    p.mean = mean.const_data_ptr(), p.mean_row = mean.stride(0);
    p.log_var = log_var.const_data_ptr(), p.log_var_row = log_var.stride(0);
    p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  }
  void gradient_of(const MaybeTensor& grad_, const MaybeTensor& grad_kl_) {
    check_tensor("grad", grad_, mean, {p.N, p.D});
    if (grad_.has_value()) grad = with_contiguous_rows(*grad_), p.grad = grad->const_data_ptr(), p.grad_row = grad->stride(0);
    grad_kl = conv::vector_of("grad_kl", grad_kl_, mean, {p.N});
    p.grad_kl = conv::floats(grad_kl);
  }
  Tensor result() const { return empty(mean, {p.N, p.D}, mean.scalar_type()); }
};

template <class Engine>
std::tuple<Tensor, Tensor> gaussian_run(Tensor mean, Tensor log_var, Tensor seed) {
  GaussianCall call(mean, log_var, seed);
  Tensor z = call.result(), kl = empty(mean, {call.p.N}, ScalarType::Float);
  call.p.z = z.mutable_data_ptr(), call.p.kl = kl.mutable_data_ptr<float>();
  Engine::run(call.p, call.mean);
  return {z, kl};
}

template <class Engine>
std::tuple<Tensor, Tensor> gaussian_grad(Tensor mean, Tensor log_var, Tensor seed, MaybeTensor grad, MaybeTensor grad_kl) {
  GaussianCall call(mean, log_var, seed);
  call.gradient_of(grad, grad_kl);
  Tensor grad_mean = call.result(), grad_log_var = call.result();
  call.p.grad_mean = grad_mean.mutable_data_ptr(), call.p.grad_log_var = grad_log_var.mutable_data_ptr();
  Engine::gradient(call.p, call.mean);
  return {grad_mean, grad_log_var};
}

// Both of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_gaussian(Library& m) {
  m.impl("gaussian_run", TORCH_BOX(&gaussian_run<Engine>));
  m.impl("gaussian_grad", TORCH_BOX(&gaussian_grad<Engine>));
}

}  // namespace pyops::sampling
