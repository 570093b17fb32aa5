// The maximum or the average of a = activation((input - mean) * scale + bias) over windows, and where each maximum stands.
//
//   input [N, H, W, C], affine [3, C]  ->  output [N, OH, OW, C], index_out [N, OH, OW, C] of bytes
//
// A thread takes a window in patches of R rows and B columns, whose positions are in flight together: 2 x 2 where the window is no wider,
// so that the first of equal values is still met first, else 1 x 3. Padding is never read. Tiling: channel.cuh. Floors: input read once
// (where windows overlap again from L1 or L2, and activated anew), output written once.
#include "pool.cuh"

namespace pyops::conv {
namespace {

constexpr int kWindowBlocks = 16;  // an SM, as in channel_apply.cu

template <class T, int V, int R, int B>
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
    for (int ky = window.begin_y; ky < window.end_y; ky += R) {
      float part[V];
      clear(part);
      int64_t from = window.position(p, at.image, ky, window.begin_x) * p.C + me.channel;
      PYOPS_NO_UNROLL
      for (int kx = window.begin_x; kx < window.end_x; kx += B, from += B * p.C) {
        const int rows = window.end_y - ky, columns = window.end_x - kx;
        Batch<T, V, B> input[R];
        PYOPS_UNROLL
        for (int r = 0; r < R; ++r) input[r].load(p.input, from + r * p.W * p.C, p.C, r < rows ? columns : 0);
        PYOPS_UNROLL
        for (int j = 0; j < R * B; ++j) {
          const int r = j / B, b = j % B;
          if (r >= rows || b >= columns) continue;
          float a[V];
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) a[v] = input[r].get(b * V + v);
          normalise<V>(affine, a, a);
          activate<T, V>(p.activation, p.slope, a);
          const uint8_t tap = static_cast<uint8_t>((ky + r) * p.KW + kx + b);
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) {
            if (!p.maximum) part[v] += a[v];
            else if (is_above(a[v], found[v])) found[v] = a[v], taps.tap[v] = tap;
          }
        }
      }
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) found[v] += part[v];  // short sums keep their digits; zeros for a maximum
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
  const ChannelCut cut = cut_pool<16>(p, true, kWindowBlocks);
  const PoolParams params = pool_params(p, cut, true);
  with_pool_channels<16>(p, [&](auto type, auto v) {
    using T = decltype(type);
    constexpr int V = decltype(v)::value;
    const LaunchShape shape = channel_shape(cut, 0);
    if constexpr (V > 1)
      if (p.kernel[1] <= 2) return launch("pool_windows", pool_windows<T, V, 2, 2>, shape, stream, params);
    launch("pool_windows", pool_windows<T, V, 1, 3>, shape, stream, params);
  });
}

#define PYOPS_WINDOWS_KERNELS(T, V) \
  PYOPS_KERNEL_INFO(pool_windows, T, V, 1, 3), PYOPS_KERNEL_INFO(pool_windows, T, V, 2, 2), PYOPS_KERNEL_INFO(pool_windows, T, 1, 1, 3)

static const KernelRegistration registration({
    PYOPS_WINDOWS_KERNELS(float, 4),
    PYOPS_WINDOWS_KERNELS(bf16, 8),
    PYOPS_WINDOWS_KERNELS(f16, 8),
});

}  // namespace pyops::conv
