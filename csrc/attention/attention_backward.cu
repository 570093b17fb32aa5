// The gradients of attention of short sequences (attention_backward_kernel.cuh), and of the bias.
#include "attention_backward_cuda.h"
#include "attention_backward_kernel.cuh"
#include "attention_cuda.h"
#include "attention_sums.cuh"

namespace pyops::attention {
namespace {

void check_sizes(const Attention& p) {
  if (p.D > kMostCudaHeadSize)
    throw std::runtime_error("attention's gradient on a GPU: heads of up to " + std::to_string(kMostCudaHeadSize) + ", got " +
                             std::to_string(p.D));
  if (p.dtype == DType::f32) throw std::runtime_error("attention's gradient on a GPU: bfloat16 or float16");
  if (std::max(p.B * p.H, p.S * p.H) > INT32_MAX || std::max({p.N, p.M, p.S}) > INT32_MAX / 2 || p.N * p.H > INT32_MAX)
    throw std::runtime_error("attention's gradient on a GPU: too many rows for one launch");
}

// How the sequences are cut, and the floats of workspace: of the queries' gradients between passes, of the sums of ds, of their sum.
struct Cut {
  BackwardParams<Sequences> params;
  int64_t partial, copy, shares, merged;
};

template <int kD>
Cut cut_for(const AttentionGradient& g) {
  const Attention& a = g.forward;
  Cut cut{};
  BackwardParams<Sequences>& p = cut.params;
  p.sequences = static_cast<int>(a.S), p.key_heads = static_cast<int>(a.G), p.group = static_cast<int>(a.H / a.G);
  p.D = static_cast<int>(a.D), p.slots = p.copies = p.sequences;
  p.query_rows = round_up(static_cast<int>(a.N), kBlockRows);
  const int M = std::max(1, static_cast<int>(a.M)), whole = round_up(M, kWarpKeys<kD>);
  if (g.grad_bias) {
    p.pitch = std::max(16, round_up(static_cast<int>(a.N), 16));
    if (a.bias.sizes[0] == 1)  // a block for many sequences, two for each SM to hide each other's waits
      p.slots = p.copies = static_cast<int>(std::clamp<int64_t>(2 * device_limits().sm_count / a.G, 1, std::max<int64_t>(a.S, 1)));
    p.sums_shared = p.group == 1 && whole <= kSharedSide && p.pitch <= kSharedSide;
  }
  int passes = ceil_div(M, kMostKeys<kD>);  // or more, where the GPU has less shared memory
  for (;; ++passes) {
    p.keys = round_up(ceil_div(M, passes), kWarpKeys<kD>), p.key_rows = passes * p.keys;
    if (p.keys == kWarpKeys<kD> || backward_room<kD>(p).end <= device_limits().shared_bytes) break;
  }
  if (g.grad_bias) {
    cut.copy = a.H * p.key_rows * p.pitch, cut.shares = cut.copy * p.copies;
    cut.merged = a.bias.sizes[0] == 1 && p.copies > 1 ? cut.copy : 0;
  }
  if (passes > 1) cut.partial = p.slots * a.H * p.query_rows * kD;
  return cut;
}

Cut cut_of(const AttentionGradient& g) { return g.forward.D <= 32 ? cut_for<32>(g) : g.forward.D <= 64 ? cut_for<64>(g) : cut_for<128>(g); }

}  // namespace

size_t attention_gradient_workspace(const AttentionGradient& g) {
  check_sizes(g.forward);
  const Cut cut = cut_of(g);
  return sizeof(float) * static_cast<size_t>(cut.partial + cut.shares + cut.merged);
}

void attention_gradient_cuda(const AttentionGradient& g, void* workspace, cudaStream_t stream) {
  const Attention& a = g.forward;
  check_sizes(a);
  attention_blanks_cuda(a, g.grad_query, a.H, nullptr, false, stream);
  attention_blanks_cuda(a, g.grad_key, a.G, nullptr, true, stream);
  attention_blanks_cuda(a, g.grad_value, a.G, nullptr, true, stream);
  if (a.S == 0) {
    if (g.grad_bias) zero_async(g.grad_bias, sizeof(float) * a.bias.sizes[0] * a.bias.sizes[1] * a.bias.sizes[2] * a.bias.sizes[3], stream);
    return;
  }
  const Cut cut = cut_of(g);
  BackwardParams<Sequences> p = cut.params;
  p.in = sequences_of(a);
  p.out = {layout_of(g.grad, a.D), layout_of(g.grad_query, a.D), layout_of(g.grad_key, a.D), layout_of(g.grad_value, a.D), g.grad_lse};
  p.dropout = {a.seed, a.threshold, a.seed ? a.dropout_factor : 1.f};
  p.partial = cut.partial ? static_cast<float*>(workspace) : nullptr;
  float* const shares = g.grad_bias ? static_cast<float*>(workspace) + cut.partial : nullptr;
  p.sums = shares;
  if (shares && !p.sums_shared) zero_async(shares, sizeof(float) * cut.shares, stream);
  launch_backward(a.dtype, p, stream);
  if (!shares) return;
  float* const merged = cut.merged ? shares + cut.shares : shares;
  if (cut.merged) merge_shares(shares, merged, p.copies, cut.copy, stream);
  fold_bias(g, {merged, static_cast<int>(a.H), p.key_rows, p.pitch}, stream);
}

static const KernelRegistration registration({PYOPS_BACKWARD_KERNELS(bf16, Sequences), PYOPS_BACKWARD_KERNELS(f16, Sequences)});

}  // namespace pyops::attention
