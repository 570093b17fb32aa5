// The gradients of attention within the windows of a map (attention_backward_kernel.cuh), of the table, logit_scale and qkv_bias.
//
// A block has a head and walks many windows; what it sums over them, it leaves in its row of each workspace.
#include "attention_backward_cuda.h"
#include "attention_backward_kernel.cuh"
#include "attention_cuda.h"
#include "attention_sums.cuh"

namespace pyops::attention {
namespace {

void check_sizes(const WindowAttention& p) {
  const int64_t most = most_gradient_tokens(p.D);
  if (p.tokens() > most || p.D > kMostCudaHeadSize)
    throw std::runtime_error("window attention's gradient on a GPU: heads of up to " + std::to_string(kMostCudaHeadSize) + ", and with " +
                             std::to_string(p.D) + " windows of up to " + std::to_string(most) + " tokens, got " +
                             std::to_string(p.tokens()));
  if (p.rows * p.wh * p.columns * p.ww > INT32_MAX || p.windows() * p.heads > INT32_MAX)
    throw std::runtime_error("window attention's gradient on a GPU: the map is too large");
  if (p.dtype == DType::f32) throw std::runtime_error("window attention's gradient on a GPU: bfloat16 or float16");
}

// How the windows are cut, and the floats of workspace: of the sums of ds, of their sum, of the other shares.
struct Cut {
  BackwardParams<Windows> params;
  int64_t copy, shares, merged, beyond, logits;
};

template <int kD>
Cut cut_for(const WindowAttention& a) {
  Cut cut{};
  BackwardParams<Windows>& p = cut.params;
  p.in = windows_of(a);
  p.sequences = static_cast<int>(a.windows()), p.key_heads = static_cast<int>(a.heads), p.group = 1, p.D = static_cast<int>(a.D);
  p.keys = p.key_rows = round_up(p.in.tokens, kWarpKeys<kD>), p.pitch = p.in.padded();
  p.sums_shared = a.grad_table && p.keys <= kSharedSide;
  // as many blocks as are resident at once
  const DeviceLimits limits = device_limits();
  const int room = backward_room<kD>(p).end;  // registers are for kMostKeys
  const int resident = std::max(1, std::min(kMostKeys<kD> / p.keys, limits.shared_bytes / room));
  p.slots = p.copies = std::clamp(ceil_div(resident * limits.sm_count, p.key_heads), 1, std::max(1, p.sequences));
  const bool several = p.slots > 1;
  cut.copy = a.heads * p.keys * p.pitch;
  cut.shares = a.grad_table ? p.slots * cut.copy : 0, cut.merged = a.grad_table && several ? cut.copy : 0;
  cut.beyond = a.grad_qkv_bias && several ? p.slots * 3 * a.heads * a.D : 0;
  cut.logits = a.grad_logit_scale && several ? p.slots * a.heads : 0;
  return cut;
}

Cut cut_of(const WindowAttention& a) { return a.D <= 32 ? cut_for<32>(a) : a.D <= 64 ? cut_for<64>(a) : cut_for<128>(a); }

}  // namespace

size_t window_attention_gradient_workspace(const WindowAttention& p) {
  check_sizes(p);
  const Cut cut = cut_of(p);
  return sizeof(float) * static_cast<size_t>(cut.shares + cut.merged + cut.beyond + cut.logits);
}

void window_attention_gradient_cuda(const WindowAttention& a, void* workspace, cudaStream_t stream) {
  check_sizes(a);
  if (a.windows() == 0) {
    if (a.grad_qkv_bias) zero_async(a.grad_qkv_bias, sizeof(float) * 3 * a.heads * a.D, stream);
    if (a.grad_table) zero_async(a.grad_table, sizeof(float) * a.entries() * a.heads, stream);
    if (a.grad_logit_scale) zero_async(a.grad_logit_scale, sizeof(float) * a.heads, stream);
    return;
  }
  const Cut cut = cut_of(a);
  BackwardParams<Windows> p = cut.params;
  float* const shares = static_cast<float*>(workspace);
  float* const merged = cut.merged ? shares + cut.shares : shares;
  float* const beyond = cut.beyond ? shares + cut.shares + cut.merged : a.grad_qkv_bias;
  float* const logits = cut.logits ? shares + cut.shares + cut.merged + cut.beyond : a.grad_logit_scale;
  p.out = {a.grad, a.grad_qkv, logits, beyond};
  p.dropout = {a.threshold ? a.seed : nullptr, a.threshold, a.threshold ? a.keep_scale : 1.f};
  p.sums = a.grad_table ? shares : nullptr;
  if (p.sums && !p.sums_shared) zero_async(p.sums, sizeof(float) * cut.shares, stream);
  launch_backward(a.dtype, p, stream);
  if (a.grad_table) {
    merge_shares(shares, merged, p.slots, cut.copy, stream);
    fold_table(a, {merged, static_cast<int>(a.heads), p.keys, p.pitch}, stream);
  }
  if (a.grad_qkv_bias) merge_shares(beyond, a.grad_qkv_bias, p.slots, 3 * a.heads * a.D, stream);
  if (a.grad_logit_scale) merge_shares(logits, a.grad_logit_scale, p.slots, a.heads, stream);
}

static const KernelRegistration registration({PYOPS_BACKWARD_KERNELS(bf16, Windows), PYOPS_BACKWARD_KERNELS(f16, Windows)});

}  // namespace pyops::attention
