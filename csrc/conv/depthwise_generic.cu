// Depthwise convolution, backward, for filters, strides and dilations of any size: a kernel for each gradient.
//
//   depthwise_grad_input   dz [N, OH, OW, C], weight [C, KH, KW]  ->  grad_input [N, H, W, C]
//   depthwise_grad_weight  dz, input [N, H, W, C]  ->  partial sums [slots, KH*KW + 1, C]; the last tap, whose input is 1, is the bias
//
// grad_input: a thread owns V channels of kStrip input positions and asks of each tap whether a stride leads from them to outputs;
// filters pass through shared memory in chunks of taps. grad_weight: a thread owns V channels of outputs and kTaps taps, whose sums
// stay in registers over all its outputs; grid.y walks the taps.
//
// Floors: dz (once per kTaps taps in grad_weight), input and grad_input once; 4*KH*KW flops per output.
#include "depthwise_backward.cuh"

namespace pyops::conv {
namespace {

constexpr int kStrip = 4, kTaps = 4;

template <class T, int V>
PYOPS_KERNEL(kDepthwiseThreads)
depthwise_grad_input(GradientParams p) {
  const Dims& d = p.d;
  const Place me = place_of<V>(p.cut, d);
  const int taps = d.KH * d.KW, channel0 = me.channel - me.group * V;
  float* const filter = reinterpret_cast<float*>(dynamic_shared());
  for (int n = me.first_image; n < me.last_image; ++n) {
    const T* dz = static_cast<const T*>(p.dz) + static_cast<int64_t>(n) * d.OH * d.OW * d.C + me.channel;
    for (int pass = 0; pass < p.cut.passes; ++pass) {
      const int strip = (me.tile * p.cut.passes + pass) * p.cut.lanes + me.lane;
      const bool live = me.active && strip < p.cut.strips;
      const int iy = strip / p.cut.strips_per_row, ix = strip % p.cut.strips_per_row * kStrip;
      float dx[kStrip][V];
      PYOPS_UNROLL
      for (int j = 0; j < kStrip; ++j) clear(dx[j]);
      for (int first = 0; first < taps; first += p.chunk) {
        const int last = first + p.chunk < taps ? first + p.chunk : taps;
        __syncthreads();
        stage_filter<T, V>(p.weight, p.weight_is_float, taps, first, last - first, p.cut.groups, channel0, d.C, filter);
        __syncthreads();
        for (int tap = first; tap < last && live; ++tap) {
          const int qy = iy + d.pad_h - tap / d.KW * d.dilation_h, qx = ix + d.pad_w - tap % d.KW * d.dilation_w;
          if (qy < 0 || qy % d.stride_h || qy / d.stride_h >= d.OH) continue;
          const T* row = dz + static_cast<int64_t>(qy / d.stride_h) * d.OW * d.C;
          float w[V];
          load_filter<V>(filter, tap - first, me.group, p.cut.groups, w);
          PYOPS_UNROLL
          for (int j = 0; j < kStrip; ++j) {
            const bool exists = qx + j >= 0 && (qx + j) % d.stride_w == 0 && (qx + j) / d.stride_w < d.OW;
            float g[V];
            load_or_zero<T, V>(exists, row + static_cast<int64_t>((qx + j) / d.stride_w) * d.C, g);
            PYOPS_UNROLL
            for (int v = 0; v < V; ++v) dx[j][v] += w[v] * g[v];
          }
        }
      }
      if (!live) continue;
      T* to = static_cast<T*>(p.grad_input) + ((static_cast<int64_t>(n) * d.H + iy) * d.W + ix) * d.C + me.channel;
      PYOPS_UNROLL
      for (int j = 0; j < kStrip; ++j)
        if (ix + j < d.W) store_channels<T, V>(to + static_cast<int64_t>(j) * d.C, dx[j]);
    }
  }
}

template <class T, int V>
PYOPS_KERNEL(kDepthwiseThreads)
depthwise_grad_weight(GradientParams p) {
  const Dims& d = p.d;
  const Place me = place_of<V>(p.cut, d);
  const int first = static_cast<int>(blockIdx.y) * kTaps, taps = d.KH * d.KW;
  float dw[kTaps][V];
  PYOPS_UNROLL
  for (int r = 0; r < kTaps; ++r) clear(dw[r]);
  for (int n = me.first_image; n < me.last_image; ++n) {
    const T* dz = static_cast<const T*>(p.dz) + static_cast<int64_t>(n) * d.OH * d.OW * d.C + me.channel;
    const T* image = static_cast<const T*>(p.input) + static_cast<int64_t>(n) * d.H * d.W * d.C + me.channel;
    for (int pass = 0; pass < p.cut.passes; ++pass) {
      const int at = (me.tile * p.cut.passes + pass) * p.cut.lanes + me.lane;  // strips of one output
      if (!me.active || at >= p.cut.strips) continue;
      const int y0 = at / d.OW * d.stride_h - d.pad_h, x0 = at % d.OW * d.stride_w - d.pad_w;
      float g[V];
      load_channels<T, V>(dz + static_cast<int64_t>(at) * d.C, g);
      PYOPS_UNROLL
      for (int r = 0; r < kTaps; ++r) {
        const int tap = first + r, y = y0 + tap / d.KW * d.dilation_h, x = x0 + tap % d.KW * d.dilation_w;
        const bool inside = tap < taps && y >= 0 && y < d.H && x >= 0 && x < d.W;
        float in[V];
        load_or_zero<T, V>(inside, image + (static_cast<int64_t>(y) * d.W + x) * d.C, in);
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) dw[r][v] += (tap == taps ? 1.f : in[v]) * g[v];
      }
    }
  }
  const int rows = taps + 1 - first < kTaps ? taps + 1 - first : kTaps;
  float* const out = p.partials + (static_cast<int64_t>(me.slot) * (taps + 1) + first) * d.C;
  sum_lanes<V, kTaps>(dw, me, p.cut, d.C, rows, reinterpret_cast<float*>(dynamic_shared()), out, d.C, 1.f);
}

template <class T, int V>
void launch_generic(GradientParams params, cudaStream_t stream) {
  const Dims& d = params.d;
  const int taps = d.KH * d.KW;
  if (params.partials) {
    const size_t shared = sizeof(float) * kTaps * params.cut.lanes * params.cut.groups * V;
    const dim3 grid(params.cut.blocks(), static_cast<unsigned>(ceil_div(taps + 1, kTaps)));
    launch("depthwise_grad_weight", depthwise_grad_weight<T, V>, LaunchShape{grid, params.cut.threads(), shared}, stream, params);
  }
  if (params.grad_input) {
    params.cut = cut_work(d.N, d.C, d.H, d.W, V, kStrip, 16);
    params.chunk = taps < kChunkTaps ? taps : kChunkTaps;
    const size_t shared = sizeof(float) * params.chunk * params.cut.groups * V;
    launch("depthwise_grad_input", depthwise_grad_input<T, V>, LaunchShape{dim3(params.cut.blocks()), params.cut.threads(), shared}, stream,
           params);
  }
}

}  // namespace

Cut generic_weight_cut(const Dims& d, int V) {
  const int64_t taps = int64_t{d.KH} * d.KW;
  return cut_work(d.N, d.C, d.OH, d.OW, V, 1, INT32_MAX, ceil_div(taps + 1, int64_t{kTaps}));
}

void generic_gradients_launch(DType dtype, int V, GradientParams params, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (V == 1) launch_generic<T, 1>(params, stream);
    else launch_generic<T, 16 / sizeof(T)>(params, stream);
  });
}

#define PYOPS_GENERIC_KERNELS(kernel)                                                                         \
  PYOPS_KERNEL_INFO(kernel, float, 4), PYOPS_KERNEL_INFO(kernel, bf16, 8), PYOPS_KERNEL_INFO(kernel, f16, 8), \
      PYOPS_KERNEL_INFO(kernel, float, 1), PYOPS_KERNEL_INFO(kernel, bf16, 1), PYOPS_KERNEL_INFO(kernel, f16, 1)

static const KernelRegistration registration({
    PYOPS_GENERIC_KERNELS(depthwise_grad_input),
    PYOPS_GENERIC_KERNELS(depthwise_grad_weight),
});

}  // namespace pyops::conv
