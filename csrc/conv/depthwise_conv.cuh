// The convolution itself with either of its epilogues: the forward pass, and the gradient of z that backward starts from.
//
//   input [N, H, W, C], weight [C, KH, KW]  ->  z  ->  output = activation(z), sums over positions    (forward)
//                                                  ->  dz = activation'(z) * (grad_output + grad_means / (OH*OW))    (gradient)
//
// A thread computes V channels of kStrip neighbouring outputs. Inputs come through L1 in vectors, each converted once per row of
// taps and used for as many outputs as it reaches; the row's filter taps come from shared memory and serve all outputs of the
// strip. K = 3, 5, 7 with stride S = 1, 2 and no dilation are unrolled; <0, 0> takes any size, stride and dilation, tap by tap.
//
// Floors: input and output (gradient: grad_output too) once, sizeof(T) each, and 2*KH*KW flops per output.
// The halo a strip shares with its neighbours is read through L1, (kStrip + K - 1) * K / kStrip times at stride 1.
#pragma once
#include "activation.cuh"
#include "depthwise.cuh"

namespace pyops::conv {

constexpr int kStrip = 4;

struct ConvParams {
  Dims d;
  Cut cut;
  Activation activation;
  float slope;
  bool weight_is_float;
  int chunk;  // taps in shared memory at once
  const void *input, *weight, *bias, *residual;
  void* output;  // forward: output; gradient: dz
  float* sums;   // forward: [N, tiles, C], or null
  float divisor;
  const void* grad_output;  // gradient: null for zeros
  const float* grad_means;  // gradient: [N, C] or null
};

// acc += the taps of one row of a K x K filter, for the strip that begins with in[0]. ky: which row; taps are in shared memory.
template <int V, int K, int S>
PYOPS_DEVICE void add_row(const float (&in)[(kStrip - 1) * S + K][V], const float* filter, int ky, int group, int groups,
                          float (&acc)[kStrip][V]) {
  PYOPS_UNROLL
  for (int kx = 0; kx < K; ++kx) {
    float w[V];
    load_filter<V>(filter, ky * K + kx, group, groups, w);
    PYOPS_UNROLL
    for (int t = 0; t < kStrip; ++t) {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] += w[v] * in[t * S + kx][v];
    }
  }
}

// acc += the taps first .. last of the strip that starts at (oy, ox).
template <class T, int V, int K, int S>
PYOPS_DEVICE void add_taps(const ConvParams& p, const T* image, const Place& me, int oy, int ox, int first, int last, const float* filter,
                           float (&acc)[kStrip][V]) {
  const Dims& d = p.d;
  if constexpr (K > 0) {
    constexpr int kReach = (kStrip - 1) * S + K;
    const int y = oy * S - d.pad_h, x = ox * S - d.pad_w;
#pragma unroll(K == 3 ? 3 : 1)
    for (int ky = 0; ky < K; ++ky) {
      if (static_cast<unsigned>(y + ky) >= static_cast<unsigned>(d.H)) continue;
      const int64_t row = (static_cast<int64_t>(y + ky) * d.W + x) * d.C + me.channel;
      float in[kReach][V];
      PYOPS_UNROLL
      for (int j = 0; j < kReach; ++j)
        load_or_zero<T, V>(static_cast<unsigned>(x + j) < static_cast<unsigned>(d.W), image + (row + static_cast<int64_t>(j) * d.C), in[j]);
      add_row<V, K, S>(in, filter, ky, me.group, p.cut.groups, acc);
    }
  } else {
    int ky = first / d.KW, kx = first % d.KW;
    for (int tap = first; tap < last; ++tap) {
      const int y = oy * d.stride_h - d.pad_h + ky * d.dilation_h, x = ox * d.stride_w - d.pad_w + kx * d.dilation_w;
      if (static_cast<unsigned>(y) < static_cast<unsigned>(d.H)) {
        float w[V];
        load_filter<V>(filter, tap - first, me.group, p.cut.groups, w);
        const T* row = image + static_cast<int64_t>(y) * d.W * d.C + me.channel;
        PYOPS_UNROLL
        for (int t = 0; t < kStrip; ++t) {
          const int64_t at = x + static_cast<int64_t>(t) * d.stride_w;
          float in[V];
          load_or_zero<T, V>(at >= 0 && at < d.W, row + at * d.C, in);
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) acc[t][v] += w[v] * in[v];
        }
      }
      if (++kx == d.KW) kx = 0, ++ky;
    }
  }
}

// From z's products to what is stored, one output at a time: unrolled over the strip, ten activations would be most of the kernel.
template <class T, int V, bool kGradient>
PYOPS_DEVICE void finish_strip(const ConvParams& p, const Place& me, int n, int oy, int ox, const float* bias, float (&acc)[kStrip][V],
                               Sum (&sum)[V]) {
  const Dims& d = p.d;
  const int64_t first = ((static_cast<int64_t>(n) * d.OH + oy) * d.OW + ox) * d.C + me.channel;
  float b[V], share[V], over[V];
  clear(over);
  load_filter<V>(bias, 0, me.group, p.cut.groups, b);
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v)
    share[v] = kGradient && p.grad_means ? p.grad_means[static_cast<int64_t>(n) * d.C + me.channel + v] / p.divisor : 0.f;
  PYOPS_NO_UNROLL
  for (int t = 0; t < kStrip && ox + t < d.OW; ++t) {
    const int64_t at = first + static_cast<int64_t>(t) * d.C;
    float z[V], with[V];
    load_or_zero<T, V>(p.residual != nullptr, static_cast<const T*>(p.residual) + at, with);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) z[v] = acc[0][v] + b[v] + with[v];
    if constexpr (kGradient) {
      load_or_zero<T, V>(p.grad_output != nullptr, static_cast<const T*>(p.grad_output) + at, with);
      differentiate<T>(p.activation, p.slope, z);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) z[v] *= with[v] + share[v];
    } else {
      activate<T>(p.activation, p.slope, z);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) over[v] += z[v];
    }
    store_channels<T, V>(static_cast<T*>(p.output) + at, z);
    PYOPS_UNROLL
    for (int i = 0; i + 1 < kStrip; ++i) {  // the next output moves up: registers have no index
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) acc[i][v] = acc[i + 1][v];
    }
  }
  if (kGradient || !p.sums) return;
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) sum[v].add(over[v]);
}

template <class T, int V, int K, int S, bool kGradient>
PYOPS_DEVICE void depthwise_conv_block(const ConvParams& p) {
  const Dims& d = p.d;
  const Place me = place_of<V>(p.cut, d);
  const int taps = K > 0 ? K * K : d.KH * d.KW, channel0 = me.channel - me.group * V, channels = p.cut.groups * V;
  float* const filter = reinterpret_cast<float*>(dynamic_shared());
  float* const bias = filter + p.chunk * channels;
  const bool convolve = !kGradient || p.activation != Activation::none;  // the gradient of none needs no z
  auto stage = [&](int first, int rows) {
    stage_filter<T, V>(p.weight, p.weight_is_float, taps, first, rows, p.cut.groups, channel0, d.C, filter);
  };
  stage_filter<T, V>(p.bias, p.weight_is_float, 1, 0, 1, p.cut.groups, channel0, d.C, bias);
  if (p.chunk == taps) stage(0, taps);
  __syncthreads();

  for (int n = me.first_image; n < me.last_image; ++n) {
    const T* image = static_cast<const T*>(p.input) + static_cast<int64_t>(n) * d.H * d.W * d.C;
    Sum sum[V];
    for (int pass = 0; pass < p.cut.passes; ++pass) {
      const int strip = (me.tile * p.cut.passes + pass) * p.cut.lanes + me.lane;
      const bool live = me.active && strip < p.cut.strips;
      const int oy = strip / p.cut.strips_per_row, ox = strip % p.cut.strips_per_row * kStrip;
      float acc[kStrip][V];
      PYOPS_UNROLL
      for (int t = 0; t < kStrip; ++t) clear(acc[t]);
      if (p.chunk == taps) {
        if (live && convolve) add_taps<T, V, K, S>(p, image, me, oy, ox, 0, taps, filter, acc);
      } else {
        for (int first = 0; first < taps && convolve; first += p.chunk) {
          const int last = first + p.chunk < taps ? first + p.chunk : taps;
          __syncthreads();
          stage(first, last - first);
          __syncthreads();
          if (live) add_taps<T, V, K, S>(p, image, me, oy, ox, first, last, filter, acc);
        }
      }
      if (live) finish_strip<T, V, kGradient>(p, me, n, oy, ox, bias, acc, sum);
    }
    if (!kGradient && p.sums) {
      float* out = p.sums + (static_cast<int64_t>(n) * p.cut.tiles + me.tile) * d.C;
      float total[1][V];
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) total[0][v] = sum[v].total;
      sum_lanes<V, 1>(total, me, p.cut, d.C, 1, bias + channels, out, 0, p.divisor);
    }
  }
}

inline size_t conv_shared_bytes(const ConvParams& p, int V) {
  const size_t channels = static_cast<size_t>(p.cut.groups) * V;
  return sizeof(float) * channels * (p.chunk + 1 + (p.sums ? p.cut.lanes : 0));
}

// Calls f(V, K, S as std::integral_constant) of the instance that a shape takes.
template <class T, class F>
auto with_instance(const DepthwiseShape& s, bool vectors, F&& f) {
  constexpr int V = 16 / sizeof(T);
  using std::integral_constant;
  const bool unrolled = s.KH == s.KW && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1 && s.stride_h <= 2;
  auto with_stride = [&](auto k) {
    if (s.stride_h == 1) return f(integral_constant<int, V>{}, k, integral_constant<int, 1>{});
    return f(integral_constant<int, V>{}, k, integral_constant<int, 2>{});
  };
  if (!vectors) return f(integral_constant<int, 1>{}, integral_constant<int, 0>{}, integral_constant<int, 0>{});
  if (unrolled && s.KH == 3) return with_stride(integral_constant<int, 3>{});
  if (unrolled && s.KH == 5) return with_stride(integral_constant<int, 5>{});
  if (unrolled && s.KH == 7) return with_stride(integral_constant<int, 7>{});
  return f(integral_constant<int, V>{}, integral_constant<int, 0>{}, integral_constant<int, 0>{});
}

}  // namespace pyops::conv
