// The torch face of the CPU channelwise ops. Schemas, fakes and references are in pyops/ops/_channel_ops.py.
#include <cmath>

#include "conv/channel_cpu.h"
#include "conv/channel_tensors.h"

namespace pyops::conv {
namespace {

struct ChannelCpuEngine {
  static void moments(const Channelwise& p, const Tensor&) { channel_moments_cpu(p); }
  static void apply(const Channelwise& p, const Tensor&) { channel_apply_cpu(p); }
  static void totals(const Channelwise& p, const Tensor&) { channel_totals_cpu(p); }
  static void reduce(const Channelwise& p, const Tensor&) { channel_reduce_cpu(p); }
  static void gradient(const Channelwise& p, const Tensor&) { channel_gradient_cpu(p); }
};

Tensor float_vectors(const char* name, const Tensor& t, int64_t rows, int64_t C) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == rows && t.size(1) == C, name, ": expected float32 [",
                  rows, ", ", C, "]");
  return as_contiguous(t);
}
// A parameter or buffer of a batch norm, [C], read as float.
MaybeTensor parameter(const char* name, const MaybeTensor& t, int64_t C) {
  STD_TORCH_CHECK(!t.has_value() || (t->dim() == 1 && t->size(0) == C), name, ": expected [", C, "]");
  if (!t.has_value() || t->scalar_type() == ScalarType::Float) return as_contiguous(t);
  Tensor copy = empty(*t, {C}, ScalarType::Float);
  torch::stable::copy_(copy, *t);
  return copy;
}

Tensor channel_norm(Tensor moments_, double count, double eps, MaybeTensor running_mean, MaybeTensor running_var, double factor) {
  const int64_t C = moments_.size(1);
  const Tensor moments = float_vectors("moments", moments_, 2, C);
  Tensor norm = empty(moments, {3, C}, ScalarType::Float);
  const float *mean = static_cast<const float*>(moments.const_data_ptr()), *squares = mean + C;
  float* to = norm.mutable_data_ptr<float>();
  const double inverse = count > 0 ? 1.0 / count : 0.0;
  for (int64_t c = 0; c < C; ++c) {
    to[c] = mean[c], to[2 * C + c] = static_cast<float>(inverse);
    to[C + c] = static_cast<float>(1.0 / std::sqrt(squares[c] * inverse + eps));
  }
  const auto move = [&](const char* name, const MaybeTensor& kept, const float* from, double scale) {
    if (!kept.has_value()) return;
    MaybeTensor values = parameter(name, kept, C);
    float* at = static_cast<float*>(values->mutable_data_ptr());
    for (int64_t c = 0; c < C; ++c) at[c] += static_cast<float>((from[c] * scale - at[c]) * factor);
    if (values->const_data_ptr() != kept->const_data_ptr()) {
      Tensor kept_tensor = *kept;
      torch::stable::copy_(kept_tensor, *values);
    }
  };
  move("running_mean", running_mean, mean, 1.0);
  move("running_var", running_var, squares, 1.0 / (count - 1.0));
  return norm;
}

Tensor channel_affine(Tensor norm_, MaybeTensor weight_, MaybeTensor bias_) {
  const int64_t C = norm_.size(1);
  const Tensor norm = float_vectors("norm", norm_, 3, C);
  const MaybeTensor weight = parameter("weight", weight_, C), bias = parameter("bias", bias_, C);
  Tensor affine = empty(norm, {3, C}, ScalarType::Float);
  const float *from = static_cast<const float*>(norm.const_data_ptr()), *w = floats(weight), *b = floats(bias);
  float* to = affine.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    to[c] = from[c], to[C + c] = w ? from[C + c] * w[c] : from[C + c], to[2 * C + c] = b ? b[c] : 0.f;
  }
  return affine;
}

std::tuple<Tensor, Tensor, Tensor> channel_terms(Tensor sums_, Tensor norm_, Tensor affine_) {
  const int64_t C = sums_.size(1);
  const Tensor sums = float_vectors("sums", sums_, 2, C), norm = float_vectors("norm", norm_, 3, C);
  const Tensor affine = float_vectors("affine", affine_, 3, C);
  Tensor terms = empty(sums, {2, C}, ScalarType::Float), grad_weight = empty(sums, {C}, ScalarType::Float);
  Tensor grad_bias = empty(sums, {C}, ScalarType::Float);
  const float *s = static_cast<const float*>(sums.const_data_ptr()), *n = static_cast<const float*>(norm.const_data_ptr());
  const float* scale = static_cast<const float*>(affine.const_data_ptr()) + C;
  float *t = terms.mutable_data_ptr<float>(), *gw = grad_weight.mutable_data_ptr<float>(), *gb = grad_bias.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    const float rstd = n[C + c], share = scale[c] * n[2 * C + c];
    t[c] = s[c] * share, t[C + c] = s[C + c] * share * rstd * rstd;
    gw[c] = s[C + c] * rstd, gb[c] = s[c];
  }
  return {terms, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  pyops::conv::register_channel_ops<pyops::conv::ChannelCpuEngine>(m);
  m.impl("channel_norm", TORCH_BOX(&pyops::conv::channel_norm));
  m.impl("channel_affine", TORCH_BOX(&pyops::conv::channel_affine));
  m.impl("channel_terms", TORCH_BOX(&pyops::conv::channel_terms));
}
