// The maximum or the average of a = activation((input - mean) * scale + bias) over windows, and where each maximum stands.
//
//   input [N, H, W, C], affine [3, C]  ->  output [N, OH, OW, C], index_out [N, OH, OW, C] of bytes
//
// A thread takes a window's rows one after another, B positions of a row in flight; B divides the usual widths. Padding is never read.
// Tiling: channel.cuh. Floors: input read once (where windows overlap again from L1 or L2, and activated anew), output written once.
#include "pool.cuh"

namespace pyops::conv {
namespace {

constexpr int kWindowBlocks = 16;  // an SM, as in channel_apply.cu

template <class T, int V, int B>
PYOPS_KERNEL(kChannelThreads)
pool_windows(PoolParams p) {
  const ChannelPlace me = channel_place<V>(p);
  if (me.count == 0) return;
  Affine<V> affine;
  affine.load(p, me.channel);
  GridCursor at = GridCursor::at(me.first, p.OH, p.OW);
  int64_t to = me.first * p.C + me.channel;
  PYOPS_NO_UNROLL
  for (int i = 0; i < me.count; ++i, to += p.C * p.cut.lanes, at.advance(p.step, p.OH, p.OW)) {
    const Window window(p, at);
    float found[V];
    Taps<V> taps;
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      found[v] = p.maximum ? kLowest : 0.f;
      taps.tap[v] = static_cast<uint8_t>(window.begin_y * p.KW + window.begin_x);  // of nothing but -inf, the first
    }
    PYOPS_NO_UNROLL
    for (int ky = window.begin_y; ky < window.end_y; ++ky) {
      float row[V];
      clear(row);
      int64_t from = window.position(p, at.image, ky, window.begin_x) * p.C + me.channel;
      PYOPS_NO_UNROLL
      for (int kx = window.begin_x; kx < window.end_x; kx += B, from += B * p.C) {
        const int count = window.end_x - kx;
        Batch<T, V, B> input;
        input.load(p.input, from, p.C, count);
        PYOPS_UNROLL
        for (int b = 0; b < B; ++b) {
          if (b >= count) break;
          float a[V];
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) a[v] = input.get(b * V + v);
          normalise<V>(affine, a, a);
          activate<T, V>(p.activation, p.slope, a);
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) {
            if (!p.maximum) row[v] += a[v];
            else if (is_above(a[v], found[v])) found[v] = a[v], taps.tap[v] = static_cast<uint8_t>(ky * p.KW + kx + b);
          }
        }
      }
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) found[v] += row[v];  // short sums keep their digits; zeros for a maximum
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) found[v] *= p.share;
    store_channels<T, V>(static_cast<T*>(p.output) + to, found);
    if (p.index_out) taps.store(p.index_out + to);
  }
}

}  // namespace

void pool_run(const Pooling& p, cudaStream_t stream) {
  if (p.N * p.OH * p.OW * p.C == 0) return;
  const ChannelCut cut = cut_windows<16>(p, kWindowBlocks);
  const PoolParams params = pool_params(p, cut, true);
  with_pool_channels<16>(p, [&](auto type, auto v) {
    using T = decltype(type);
    constexpr int V = decltype(v)::value;
    const LaunchShape shape = channel_shape(cut, 0);
    if constexpr (V > 1)
      if (p.kernel[1] % 3 == 0) return launch("pool_windows", pool_windows<T, V, 3>, shape, stream, params);
    launch("pool_windows", pool_windows<T, V, 2>, shape, stream, params);
  });
}

#define PYOPS_WINDOWS_KERNELS(T, V) \
  PYOPS_KERNEL_INFO(pool_windows, T, V, 3), PYOPS_KERNEL_INFO(pool_windows, T, V, 2), PYOPS_KERNEL_INFO(pool_windows, T, 1, 2)

static const KernelRegistration registration({
    PYOPS_WINDOWS_KERNELS(float, 4),
    PYOPS_WINDOWS_KERNELS(bf16, 8),
    PYOPS_WINDOWS_KERNELS(f16, 8),
});

}  // namespace pyops::conv
