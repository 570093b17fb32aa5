// The torch face of window attention, on any device: checks tensors and fills window_attention.h's block.
// An Engine runs it: forward, backward (p, qkv), where qkv is a tensor on the device of the call.
// Schemas, fakes and references are in pyops/ops/_window_attention_ops.py.
#pragma once
#include <cmath>

#include "attention/window_attention.h"
#include "conv/channel_tensors.h"

namespace pyops::attention {

// The tensors of one call, kept alive while the kernels that read them are queued.
struct WindowCall {
  WindowAttention p{};
  Tensor qkv;
  MaybeTensor grad, qkv_bias, table, logit_scale, seed;

  WindowCall(const Tensor& t, int64_t heads, const std::vector<int64_t>& window, const std::vector<int64_t>& shift, double scale) : qkv(t) {
    constexpr int64_t kMostSide = 1 << 16, kMostHead = 256;
    STD_TORCH_CHECK(t.dim() == 4, "qkv: expected [B, H, W, 3C]");
    STD_TORCH_CHECK(window.size() == 2 && shift.size() == 2, "window, shift: expected two numbers each");
    for (int d = 0; d < 2; ++d) {
      STD_TORCH_CHECK(window[d] >= 1 && window[d] <= kMostSide, "window: expected 1 to 65536, got ", window[d]);
      STD_TORCH_CHECK(shift[d] >= 0 && shift[d] < window[d], "shift: expected 0 or more and less than the window, got ", shift[d]);
    }
    STD_TORCH_CHECK(heads >= 1 && t.size(3) > 0 && t.size(3) % (3 * heads) == 0,
                    "heads: expected qkv's channels to be a multiple of 3 * heads");
    p.dtype = conv::dtype_of("qkv", t);
    p.B = t.size(0), p.H = t.size(1), p.W = t.size(2), p.heads = heads, p.D = t.size(3) / 3 / heads;
    STD_TORCH_CHECK(p.D <= kMostHead, "qkv: expected heads of 256 or less, got ", p.D);
    p.wh = window[0], p.ww = window[1], p.shift_h = shift[0], p.shift_w = shift[1];
    p.rows = (p.H + p.wh - 1) / p.wh, p.columns = (p.W + p.ww - 1) / p.ww;
    p.scale = static_cast<float>(scale);
    qkv = as_contiguous(t);
    p.qkv = qkv.const_data_ptr();
  }
  void vectors(const MaybeTensor& bias_, const MaybeTensor& table_, const MaybeTensor& logits_) {
    qkv_bias = conv::vector_of("qkv_bias", bias_, qkv, {qkv.size(3)});
    table = conv::vector_of("table", table_, qkv, {p.entries(), p.heads});
    logit_scale = conv::vector_of("logit_scale", logits_, qkv, {p.heads});
    p.qkv_bias = conv::floats(qkv_bias), p.table = conv::floats(table), p.logit_scale = conv::floats(logit_scale);
  }
  void dropout(const MaybeTensor& seed_, double probability) {
    STD_TORCH_CHECK(probability >= 0.0 && probability < 1.0, "dropout_p: expected 0 to 1, and less than 1, got ", probability);
    p.keep_scale = static_cast<float>(1.0 / (1.0 - probability));
    p.threshold = static_cast<uint32_t>(std::min(std::nearbyint(probability * 0x1p32), 0x1p32 - 1.0));
    if (p.threshold == 0) return;
    STD_TORCH_CHECK(seed_.has_value() && seed_->scalar_type() == ScalarType::Long && seed_->numel() == 1 && seed_->device() == qkv.device(),
                    "seed: expected one int64 on qkv's device");
    seed = seed_, p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  void* image(const char* name, const Tensor& t, int64_t parts) const {  // a result, written in place
    check_tensor(name, t, qkv, {p.B, p.H, p.W, parts * p.heads * p.D});
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    return t.mutable_data_ptr();
  }
  float* sums(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> sizes) const {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
    return const_cast<float*>(conv::floats(conv::vector_of(name, t, qkv, sizes)));
  }
  void weights(const Tensor& lse) { p.lse = sums("lse", lse, {p.windows(), p.heads, p.tokens()}); }
};

template <class Engine>
void window_attention_into(Tensor qkv, MaybeTensor qkv_bias, MaybeTensor table, MaybeTensor logit_scale, MaybeTensor seed, int64_t heads,
                           std::vector<int64_t> window, std::vector<int64_t> shift, double scale, double dropout_p, Tensor output,
                           Tensor lse) {
  WindowCall call(qkv, heads, window, shift, scale);
  call.vectors(qkv_bias, table, logit_scale), call.dropout(seed, dropout_p), call.weights(lse);
  call.p.output = call.image("output", output, 1);
  Engine::forward(call.p, call.qkv);
}

template <class Engine>
void window_attention_grad_into(Tensor grad, Tensor qkv, MaybeTensor qkv_bias, MaybeTensor table, MaybeTensor logit_scale, MaybeTensor seed,
                                Tensor lse, int64_t heads, std::vector<int64_t> window, std::vector<int64_t> shift, double scale,
                                double dropout_p, Tensor grad_qkv, MaybeTensor grad_qkv_bias, MaybeTensor grad_table,
                                MaybeTensor grad_logit_scale) {
  WindowCall call(qkv, heads, window, shift, scale);
  WindowAttention& p = call.p;
  call.vectors(qkv_bias, table, logit_scale), call.dropout(seed, dropout_p), call.weights(lse);
  check_tensor("grad", grad, call.qkv, {p.B, p.H, p.W, heads * p.D});
  call.grad = as_contiguous(grad), p.grad = call.grad->const_data_ptr();
  STD_TORCH_CHECK(!grad_logit_scale.has_value() || p.logit_scale, "grad_logit_scale: expected logit_scale with it");
  p.grad_qkv = call.image("grad_qkv", grad_qkv, 3);
  p.grad_qkv_bias = call.sums("grad_qkv_bias", grad_qkv_bias, {3 * heads * p.D});
  p.grad_table = call.sums("grad_table", grad_table, {p.entries(), heads});
  p.grad_logit_scale = call.sums("grad_logit_scale", grad_logit_scale, {heads});
  Engine::backward(p, call.qkv);
}

// Both of an Engine, for a device's registration block.
template <class Engine, class Library>
void register_window_attention(Library& m) {
  m.impl("window_attention_into", TORCH_BOX(&window_attention_into<Engine>));
  m.impl("window_attention_grad_into", TORCH_BOX(&window_attention_grad_into<Engine>));
}

}  // namespace pyops::attention
