// The torch face of attention, on any device: checks tensors and fills attention.h's blocks. An Engine runs them: forward, backward
// (block, query), where query is a tensor on the device of the call. Schemas, fakes and references are in pyops/ops/_attention_ops.py.
#pragma once
#include <cmath>
#include <initializer_list>

#include "attention/attention.h"
#include "conv/channel_tensors.h"

namespace pyops::attention {

// A tensor that a kernel writes: itself where its layout serves, else one that does and is copied back.
struct Written {
  Tensor target, work;
  Written(const Tensor& t, bool serves) : target(t), work(serves ? t : torch::stable::contiguous(t)) {}
  void finish() {
    if (work.get() != target.get()) torch::stable::copy_(target, work);
  }
};

inline bool rows_serve(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1; }
inline Heads heads_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)}; }

// The tensors of one call, kept alive while the kernels that read them are queued.
struct AttentionCall {
  Attention p{};
  Tensor query, key, value;
  MaybeTensor bias, slopes, spans;

  AttentionCall(const Tensor& query_, const Tensor& key_, const Tensor& value_) : query(query_), key(key_), value(value_) {
    STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4, "query, key: expected [B, H, N, D], [B, H_k, M, D]");
    p.dtype = conv::dtype_of("query", query_);
    p.B = query_.size(0), p.H = query_.size(1), p.N = query_.size(2), p.D = query_.size(3), p.G = key_.size(1), p.M = key_.size(2);
    p.S = p.B;
    STD_TORCH_CHECK(p.D >= 1 && p.D <= kMostHeadSize, "query: expected heads of 1 to ", kMostHeadSize, ", got ", p.D);
    STD_TORCH_CHECK(p.G >= 1 && p.H >= 1 && p.H % p.G == 0, "key: expected a number of heads that divides query's ", p.H, ", got ", p.G);
    check_tensor("key", key_, query_, {p.B, p.G, p.M, p.D});
    check_tensor("value", value_, query_, {p.B, p.G, p.M, p.D});
    query = with_contiguous_rows(query_), key = with_contiguous_rows(key_), value = with_contiguous_rows(value_);
    p.query = heads_of(query), p.key = heads_of(key), p.value = heads_of(value);
  }

  void options(double scale, int64_t left, int64_t right, double softcap) {
    STD_TORCH_CHECK(left >= -1 && right >= -1, "left, right: expected -1 or more, got ", left, ", ", right);
    STD_TORCH_CHECK(softcap >= 0, "softcap: expected 0 or more, got ", softcap);
    p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap), p.left = left, p.right = right;
  }

  void extras(const MaybeTensor& bias_, const MaybeTensor& slopes_, const MaybeTensor& spans_) {
    if (spans_.has_value()) {
      STD_TORCH_CHECK(spans_->scalar_type() == ScalarType::Int && spans_->device() == query.device() && spans_->dim() == 2 &&
                          spans_->size(1) == 4 && (p.B == 1 || spans_->size(0) == p.B),
                      "spans: expected int32 [S, 4] on query's device, S the batch or any number for a batch of one");
      spans = as_contiguous(spans_);
      static const int32_t none[4]{};  // an empty tensor's pointer may be null
      p.S = spans->size(0), p.spans = p.S > 0 ? static_cast<const int32_t*>(spans->const_data_ptr()) : none;
    }
    if (slopes_.has_value()) {
      STD_TORCH_CHECK(slopes_->dim() == 2 && (slopes_->size(0) == 1 || slopes_->size(0) == p.S), "slopes: expected [1 or S, H]");
      slopes = conv::vector_of("slopes", slopes_, query, {slopes_->size(0), p.H});
      p.slopes = conv::floats(slopes), p.slopes_sequence = slopes->size(0) == 1 ? 0 : p.H;
    }
    if (bias_.has_value()) read_bias(*bias_);
  }

  void dropout(const MaybeTensor& seed, double share) {
    STD_TORCH_CHECK(share >= 0 && share < 1, "dropout_p: expected 0 to less than 1, got ", share);
    if (share == 0) return;
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->device() == query.device(),
                    "seed: expected one int64 on query's device with dropout");
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(std::ldexp(share, 32)), 4294967295.0));
    p.dropout_factor = static_cast<float>(1 / (1 - share));
  }

 private:
  void read_bias(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4 && t.device() == query.device(), "bias: expected four dimensions on query's device");
    const int64_t wanted[4] = {p.S, p.H, p.N, p.M};
    for (int d = 0; d < 4; ++d) {
      const bool whole = d < 2 ? t.size(d) == wanted[d] : p.spans ? true : t.size(d) >= wanted[d];
      STD_TORCH_CHECK(t.size(d) == 1 || whole, "bias: expected a shape that broadcasts to [", p.S, ", ", p.H, ", ", p.N, ", ", p.M, "]");
      p.bias.sizes[d] = t.size(d);
    }
    bias = t;
    switch (t.scalar_type()) {
      case ScalarType::Float: p.bias.dtype = BiasType::f32; break;
      case ScalarType::BFloat16: p.bias.dtype = BiasType::bf16; break;
      case ScalarType::Half: p.bias.dtype = BiasType::f16; break;
      case ScalarType::Bool: p.bias.dtype = BiasType::boolean; break;
      case ScalarType::Double: {
        bias = empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, ScalarType::Float);
        torch::stable::copy_(*bias, t);
        p.bias.dtype = BiasType::f32;
        break;
      }
      default: STD_TORCH_CHECK(false, "bias: expected a floating tensor or bool");
    }
    if (bias->size(3) > 1 && bias->stride(3) > 1) bias = torch::stable::contiguous(*bias);
    p.bias.data = bias->const_data_ptr();
    for (int d = 0; d < 4; ++d) p.bias.strides[d] = bias->size(d) == 1 ? 0 : bias->stride(d);
  }
};

inline bool is_float_of(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> sizes) {
  bool same = t.scalar_type() == ScalarType::Float && t.device() == like.device() && t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes.begin()[d];
  return same;
}

template <class Engine>
void attention_into(Tensor query, Tensor key, Tensor value, MaybeTensor bias, MaybeTensor slopes, MaybeTensor spans, MaybeTensor seed,
                    double scale, int64_t left, int64_t right, double softcap, double dropout_p, Tensor output_, Tensor lse_) {
  AttentionCall call(query, key, value);
  Attention& p = call.p;
  call.options(scale, left, right, softcap), call.extras(bias, slopes, spans), call.dropout(seed, dropout_p);
  check_tensor("output", output_, query, {p.B, p.H, p.N, p.D});
  STD_TORCH_CHECK(is_float_of(lse_, query, {p.B, p.H, p.N}), "lse: expected float32 [B, H, N]");
  Written output(output_, rows_serve(output_)), lse(lse_, lse_.is_contiguous());
  p.output = heads_of(output.work), p.lse = lse.work.mutable_data_ptr<float>();
  if (p.B * p.H * p.N > 0) Engine::forward(p, call.query);
  output.finish(), lse.finish();
}

template <class Engine>
void attention_grad_into(Tensor grad_, MaybeTensor grad_lse_, Tensor query, Tensor key, Tensor value, MaybeTensor bias, MaybeTensor slopes,
                         MaybeTensor spans, MaybeTensor seed, Tensor output_, Tensor lse_, double scale, int64_t left, int64_t right,
                         double softcap, double dropout_p, Tensor grad_query_, Tensor grad_key_, Tensor grad_value_,
                         MaybeTensor grad_bias_) {
  AttentionCall call(query, key, value);
  AttentionGradient g{};
  call.options(scale, left, right, softcap), call.extras(bias, slopes, spans), call.dropout(seed, dropout_p);
  g.forward = call.p;
  Attention& p = g.forward;
  check_tensor("grad", grad_, query, {p.B, p.H, p.N, p.D});
  check_tensor("output", output_, query, {p.B, p.H, p.N, p.D});
  check_tensor("grad_query", grad_query_, query, {p.B, p.H, p.N, p.D});
  check_tensor("grad_key", grad_key_, query, {p.B, p.G, p.M, p.D});
  check_tensor("grad_value", grad_value_, query, {p.B, p.G, p.M, p.D});
  STD_TORCH_CHECK(is_float_of(lse_, query, {p.B, p.H, p.N}), "lse: expected float32 [B, H, N]");
  STD_TORCH_CHECK(!grad_lse_.has_value() || is_float_of(*grad_lse_, query, {p.B, p.H, p.N}), "grad_lse: expected float32 [B, H, N]");
  const Tensor grad = with_contiguous_rows(grad_), output = with_contiguous_rows(output_), lse = as_contiguous(lse_);
  const MaybeTensor grad_lse = as_contiguous(grad_lse_);
  Written grad_query(grad_query_, rows_serve(grad_query_)), grad_key(grad_key_, rows_serve(grad_key_)),
      grad_value(grad_value_, rows_serve(grad_value_));
  g.grad = heads_of(grad), p.output = heads_of(output), p.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  g.grad_lse = conv::floats(grad_lse);
  g.grad_query = heads_of(grad_query.work), g.grad_key = heads_of(grad_key.work), g.grad_value = heads_of(grad_value.work);
  if (grad_bias_.has_value()) {
    const int64_t* sizes = p.bias.sizes;
    STD_TORCH_CHECK(p.bias.dtype != BiasType::none && p.bias.dtype != BiasType::boolean, "grad_bias: expected a floating bias with it");
    STD_TORCH_CHECK(is_float_of(*grad_bias_, query, {sizes[0], sizes[1], sizes[2], sizes[3]}) && grad_bias_->is_contiguous(),
                    "grad_bias: expected contiguous float32 of bias' shape");
    g.grad_bias = grad_bias_->mutable_data_ptr<float>();
  }
  if (p.B * p.H * (p.N + p.M) > 0 || g.grad_bias) Engine::backward(g, call.query);
  grad_query.finish(), grad_key.finish(), grad_value.finish();
}

// Both of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_attention(Library& m) {
  m.impl("attention_into", TORCH_BOX(&attention_into<Engine>));
  m.impl("attention_grad_into", TORCH_BOX(&attention_grad_into<Engine>));
}

}  // namespace pyops::attention
