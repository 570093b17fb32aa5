// Depthwise convolution, backward: from dz to the gradients of input, weight and bias in one pass.
//
//   dz [N, OH, OW, C], input [N, H, W, C], weight [C, K, K]  ->  grad_input [N, H, W, C], partial sums [slots, K*K + 1, C]
//   depthwise_reduce: partial sums  ->  grad_weight [C, K, K], grad_bias [C]
//
// A thread owns V channels of a strip of input positions and walks the taps that lead from them to outputs. Each dz it meets gives
// both w * dz for the input's gradient and x * dz for the weight's, so that input is read once, without a halo, and dz once plus
// a halo through L1. The weight's gradients of all taps stay in the thread's registers over all its strips: K*K*V floats, which
// is what bounds V: 16 bytes for K = 3, fewer channels for larger filters (a warp still reads whole 128-byte lines). A block adds
// its lanes in order and writes one row of partial sums; depthwise_reduce adds the rows in order. No atomics.
// The bias's gradient is the centre tap's: padding of at most K/2 sends each output to one input there.
// Strides above 2, dilation, other sizes and odd channels take the kernels of depthwise_generic.cu.
//
// Floors: dz, input and grad_input once, sizeof(T) each, and 4*K*K flops per output.
#include <type_traits>

#include "depthwise_backward.cuh"

namespace pyops::conv {
namespace {

template <class T, int K>
constexpr int kChannels = K == 7   ? 2
                          : K == 5 ? 4
                                   : 16 / sizeof(T);
template <int V>
constexpr int kBackwardStrip = V == 8 ? 2 : 4;

// One row of taps ky, for outputs of row oy: column j of the strip is input px0 + j - pad, and meets output (px0 + j - kx) / S.
template <class T, int V, int K, int S, int kWidth>
PYOPS_DEVICE void add_row(const GradientParams& p, const Place& me, const T* row, int px0, int ky, const float* filter,
                          const float (&x)[kWidth][V], float (&dx)[kWidth][V], float (&dw)[K][V], float (&db)[V]) {
  constexpr int kBefore = (K - 1) / S, kReach = kBefore + (kWidth - 1) / S + 1;
  const int ox = px0 / S - kBefore;
  float g[kReach][V];
  PYOPS_UNROLL
  for (int i = 0; i < kReach; ++i)
    load_or_zero<T, V>(static_cast<unsigned>(ox + i) < static_cast<unsigned>(p.d.OW), row + static_cast<int64_t>(ox + i) * p.d.C, g[i]);
  PYOPS_UNROLL
  for (int kx = 0; kx < K; ++kx) {
    float w[V];
    load_filter<V>(filter, ky * K + kx, me.group, p.cut.groups, w);
    PYOPS_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      if ((j + K - 1 - kx) % S) continue;  // K is odd: px0 and K - 1 are even where S is
      const int i = (j + K - 1 - kx) / S;
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) {
        dx[j][v] += w[v] * g[i][v];
        dw[kx][v] += x[j][v] * g[i][v];
        if (kx == K / 2) db[v] += ky == K / 2 ? g[i][v] : 0.f;
      }
    }
  }
}

template <class T, int V, int K, int S>
PYOPS_KERNEL(kDepthwiseThreads)
depthwise_backward_fused(GradientParams p) {
  constexpr int kWidth = kBackwardStrip<V>;
  const Dims& d = p.d;
  const Place me = place_of<V>(p.cut, d);
  float* const filter = reinterpret_cast<float*>(dynamic_shared());
  stage_filter<T, V>(p.weight, p.weight_is_float, K * K, 0, K * K, p.cut.groups, me.channel - me.group * V, d.C, filter);
  __syncthreads();

  float dw[K][K][V], db[1][V];
  clear(db[0]);
  PYOPS_UNROLL
  for (int ky = 0; ky < K; ++ky) {
    PYOPS_UNROLL
    for (int kx = 0; kx < K; ++kx) clear(dw[ky][kx]);
  }
  for (int n = me.first_image; n < me.last_image; ++n) {
    const T* dz = static_cast<const T*>(p.dz) + static_cast<int64_t>(n) * d.OH * d.OW * d.C + me.channel;
    const int64_t image = static_cast<int64_t>(n) * d.H * d.W * d.C + me.channel;
    for (int pass = 0; pass < p.cut.passes; ++pass) {
      const int strip = (me.tile * p.cut.passes + pass) * p.cut.lanes + me.lane;
      if (!me.active || strip >= p.cut.strips) continue;
      const int iy = strip / p.cut.strips_per_row, px0 = d.pad_w / S * S + strip % p.cut.strips_per_row * kWidth, ix0 = px0 - d.pad_w;
      const int64_t at = image + (static_cast<int64_t>(iy) * d.W + ix0) * d.C;
      float x[kWidth][V], dx[kWidth][V];
      PYOPS_UNROLL
      for (int j = 0; j < kWidth; ++j) {
        const bool exists = static_cast<unsigned>(ix0 + j) < static_cast<unsigned>(d.W);
        load_or_zero<T, V>(exists && p.partials, static_cast<const T*>(p.input) + at + static_cast<int64_t>(j) * d.C, x[j]);
        clear(dx[j]);
      }
      PYOPS_UNROLL
      for (int ky = 0; ky < K; ++ky) {
        const int qy = iy + d.pad_h - ky;
        if (qy < 0 || (S > 1 && qy % S) || qy / S >= d.OH) continue;
        add_row<T, V, K, S, kWidth>(p, me, dz + static_cast<int64_t>(qy / S) * d.OW * d.C, px0, ky, filter, x, dx, dw[ky], db[0]);
      }
      if (!p.grad_input) continue;
      PYOPS_UNROLL
      for (int j = 0; j < kWidth; ++j)
        if (static_cast<unsigned>(ix0 + j) < static_cast<unsigned>(d.W))
          store_channels<T, V>(static_cast<T*>(p.grad_input) + at + static_cast<int64_t>(j) * d.C, dx[j]);
    }
  }
  if (!p.partials) return;
  float* const out = p.partials + static_cast<int64_t>(me.slot) * (K * K + 1) * d.C;
  PYOPS_UNROLL
  for (int ky = 0; ky < K; ++ky) sum_lanes<V, K>(dw[ky], me, p.cut, d.C, K, filter, out + static_cast<int64_t>(ky) * K * d.C, d.C, 1.f);
  sum_lanes<V, 1>(db, me, p.cut, d.C, 1, filter, out + static_cast<int64_t>(K) * K * d.C, d.C, 1.f);
}

struct ReduceParams {
  const float* partials;  // [slots, taps + 1, C]
  float *grad_weight, *grad_bias;
  int slots, C;
  int64_t taps;
};

constexpr int kReduceThreads = 256;

// A warp takes 32 neighbouring sums and every eighth slot; the block's eight warps meet in shared memory.
PYOPS_KERNEL(kReduceThreads)
depthwise_reduce(ReduceParams p) {
  constexpr int kWarps = kReduceThreads / kWarpSize;
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t sums = (p.taps + 1) * p.C, i = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  float total = 0.f;
  for (int slot = warp; slot < p.slots && i < sums; slot += kWarps) total += p.partials[slot * sums + i];
  room[warp * kWarpSize + lane] = total;
  __syncthreads();
  if (warp > 0 || i >= sums) return;
  total = 0.f;
  for (int w = 0; w < kWarps; ++w) total += room[w * kWarpSize + lane];
  const int64_t tap = i / p.C, c = i % p.C;
  if (tap < p.taps) {
    if (p.grad_weight) p.grad_weight[c * p.taps + tap] = total;
  } else if (p.grad_bias) {
    p.grad_bias[c] = total;
  }
}

// How a call is computed; the workspace and the launches follow from it.
struct Plan {
  bool makes_dz;  // else dz is grad_output
  bool fused;
  int V;
  Cut cut;  // of the kernel that writes partial sums
  size_t dz_bytes, partial_bytes;
};

bool wants_sums(const DepthwiseBackward& p) { return p.grad_weight || p.grad_bias; }

Plan plan_of(const DepthwiseBackward& p) {
  const DepthwiseShape& s = p.s;
  const Dims d = dims_of(s);
  const int element = p.dtype == DType::f32 ? 4 : 2;
  Plan plan{};
  plan.makes_dz = p.activation != Activation::none || p.grad_residual || p.grad_means || !p.grad_output;
  const size_t outputs = static_cast<size_t>(s.N * s.OH * s.OW * s.C) * element;
  plan.dz_bytes = plan.makes_dz && !p.grad_residual ? round_up(outputs, size_t{256}) : 0;
  plan.fused = s.KH == s.KW && (s.KH == 3 || s.KH == 5 || s.KH == 7) && s.stride_h == s.stride_w && s.stride_h <= 2 && s.dilation_h == 1 &&
               s.dilation_w == 1 && s.pad_h <= s.KH / 2 && s.pad_w <= s.KW / 2;
  plan.V = !plan.fused || s.KH == 3 ? 16 / element : s.KH == 5 ? 4 : 2;
  const void* dz = p.grad_residual ? p.grad_residual : plan.makes_dz ? nullptr : p.grad_output;
  if (!vectors_fit(s.C, plan.V, element, {p.input, dz, p.grad_input})) plan.fused = false, plan.V = 1;
  if (plan.fused) {
    // strips begin at a multiple of the stride in the padded input: one column to the left of it at most
    const int before = s.stride_w == 2 ? s.pad_w % 2 : 0, strip = plan.V == 8 ? 2 : 4;
    plan.cut = cut_work(d.N, d.C, d.H, d.W + before, plan.V, strip, INT32_MAX);
  } else {
    plan.cut = generic_weight_cut(d, plan.V);
  }
  if (wants_sums(p)) plan.partial_bytes = sizeof(float) * plan.cut.slots() * (static_cast<size_t>(s.KH) * s.KW + 1) * s.C;
  return plan;
}

template <class T, int K, int S>
void launch_fused(const GradientParams& params, cudaStream_t stream) {
  constexpr int V = kChannels<T, K>;
  const size_t filter = K * K, sums = K * params.cut.lanes;
  const size_t shared = sizeof(float) * params.cut.groups * V * (filter > sums ? filter : sums);
  launch("depthwise_backward_fused", depthwise_backward_fused<T, V, K, S>,
         LaunchShape{dim3(params.cut.blocks()), params.cut.threads(), shared}, stream, params);
}

void launch_gradients(const DepthwiseBackward& p, const Plan& plan, const GradientParams& params, cudaStream_t stream) {
  if (!plan.fused) return generic_gradients_launch(p.dtype, plan.V, params, stream);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool one = p.s.stride_h == 1;
    switch (p.s.KH) {
      case 3: return one ? launch_fused<T, 3, 1>(params, stream) : launch_fused<T, 3, 2>(params, stream);
      case 5: return one ? launch_fused<T, 5, 1>(params, stream) : launch_fused<T, 5, 2>(params, stream);
      default: return one ? launch_fused<T, 7, 1>(params, stream) : launch_fused<T, 7, 2>(params, stream);
    }
  });
}

bool nothing(const DepthwiseShape& s) { return s.N == 0 || s.C == 0; }

}  // namespace

size_t depthwise_backward_workspace(const DepthwiseBackward& p) {
  if (nothing(p.s)) return 0;
  const Plan plan = plan_of(p);
  return plan.dz_bytes + plan.partial_bytes;
}

void depthwise_backward(const DepthwiseBackward& p, void* workspace, cudaStream_t stream) {
  const size_t taps = static_cast<size_t>(p.s.KH) * p.s.KW;
  if (nothing(p.s)) {
    if (p.grad_weight) zero_async(p.grad_weight, p.s.C * taps * sizeof(float), stream);
    if (p.grad_bias) zero_async(p.grad_bias, p.s.C * sizeof(float), stream);
    return;
  }
  const Plan plan = plan_of(p);
  const void* dz = p.grad_output;
  if (plan.makes_dz) {
    void* made = p.grad_residual ? p.grad_residual : workspace;
    depthwise_gradient_launch(p, made, stream);
    dz = made;
  }
  if (!p.grad_input && !wants_sums(p)) return;
  GradientParams params{};
  params.d = dims_of(p.s), params.cut = plan.cut;
  params.weight_is_float = p.weight_dtype == DType::f32;
  params.dz = dz, params.input = p.input, params.weight = p.weight, params.grad_input = p.grad_input;
  params.partials = wants_sums(p) ? reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.dz_bytes) : nullptr;
  launch_gradients(p, plan, params, stream);
  if (!wants_sums(p)) return;
  const ReduceParams reduce{params.partials, p.grad_weight, p.grad_bias, plan.cut.slots(), params.d.C, static_cast<int64_t>(taps)};
  const int64_t blocks = ceil_div((reduce.taps + 1) * reduce.C, int64_t{kWarpSize});
  launch("depthwise_reduce", depthwise_reduce,
         LaunchShape{dim3(static_cast<unsigned>(blocks)), kReduceThreads, kReduceThreads * sizeof(float)}, stream, reduce);
}

#define PYOPS_FUSED_KERNELS(T, V3)                                                                                      \
  PYOPS_KERNEL_INFO(depthwise_backward_fused, T, V3, 3, 1), PYOPS_KERNEL_INFO(depthwise_backward_fused, T, V3, 3, 2),   \
      PYOPS_KERNEL_INFO(depthwise_backward_fused, T, 4, 5, 1), PYOPS_KERNEL_INFO(depthwise_backward_fused, T, 4, 5, 2), \
      PYOPS_KERNEL_INFO(depthwise_backward_fused, T, 2, 7, 1), PYOPS_KERNEL_INFO(depthwise_backward_fused, T, 2, 7, 2)

static const KernelRegistration registration({
    PYOPS_FUSED_KERNELS(float, 4),
    PYOPS_FUSED_KERNELS(bf16, 8),
    PYOPS_FUSED_KERNELS(f16, 8),
    {"depthwise_reduce", reinterpret_cast<const void*>(&depthwise_reduce)},
});

}  // namespace pyops::conv
