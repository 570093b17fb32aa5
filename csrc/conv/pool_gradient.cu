// The gradient of what pool.cu computes: of its input, and the two sums of it that batch norm's gradient needs.
//
//   grad [N, OH, OW, C], index [N, OH, OW, C] of bytes or null (an average), input [N, H, W, C]
//   da = sum of grad over the windows whose maximum stands here, or of grad / (KH * KW) over all that hold this position
//   du = da * activation'((input - mean) * scale + bias)
//
//   reduce:   du, du * (input - mean)                                    ->  partials [slots, 2, C]  ->  sums [2, C]
//   gradient: du * scale - terms[0] - (input - mean) * terms[1]          ->  output [N, H, W, C]
//
// reduce walks over windows, for sums do not ask which of them hold a position: of a maximum's it reads the one element of each channel
// that index names. gradient walks over the input's positions and gathers from the ceil(K / stride)^2 windows that hold each of them.
// Tiling: channel.cuh. Floors: grad, index, input read once, output written once.
#include "pool.cuh"

namespace pyops::conv {
namespace {

constexpr int kReduceBlocks = 4;     // an SM, as in channel_sums.cu
constexpr int kGradientBlocks = 16;  // as in channel_gradient.cu

// Adds du and du * (input - mean) of a position for da.
template <class T, int V>
PYOPS_DEVICE void add_gradient(const PoolParams& p, const Affine<V>& affine, const float (&input)[V], const float (&da)[V],
                               float (&sum)[2][V]) {
  float du[V];
  normalise<V>(affine, input, du);
  differentiate<T, V>(p.activation, p.slope, du);
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) du[v] *= da[v], sum[0][v] += du[v], sum[1][v] += du[v] * (input[v] - affine.mean[v]);
}

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
pool_reduce_runs(PoolParams p) {
  const ChannelPlace me = channel_place<V>(p);
  float sum[2][V];
  clear(sum[0]), clear(sum[1]);
  if (me.count > 0) {
    Affine<V> affine;
    affine.load(p, me.channel);
    GridCursor at = GridCursor::at(me.first, p.OH, p.OW);
    int64_t from = me.first * p.C + me.channel;
    PYOPS_NO_UNROLL
    for (int i = 0; i < me.count; ++i, from += p.C * p.cut.lanes, at.advance(p.step, p.OH, p.OW)) {
      const Window window(p, at);
      float da[V], input[V], part[2][V];
      clear(part[0]), clear(part[1]);
      load_channels<T, V>(static_cast<const T*>(p.grad) + from, da);
      if (p.index) {
        Taps<V> taps;
        taps.load(p.index + from);
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) {
          const int ky = taps.tap[v] * p.row_of >> 16, kx = taps.tap[v] - ky * p.KW;
          const bool inside = ky >= window.begin_y && ky < window.end_y && kx >= window.begin_x && kx < window.end_x;
          const int64_t position = window.position(p, at.image, inside ? ky : window.begin_y, inside ? kx : window.begin_x);
          input[v] = to_float(static_cast<const T*>(p.input)[position * p.C + me.channel + v]);
          da[v] = inside ? da[v] : 0.f;
        }
        add_gradient<T, V>(p, affine, input, da, part);
      } else {
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) da[v] *= p.share;
        PYOPS_NO_UNROLL
        for (int ky = window.begin_y; ky < window.end_y; ++ky) {
          float row[2][V];  // short sums keep their digits
          clear(row[0]), clear(row[1]);
          int64_t place = window.position(p, at.image, ky, window.begin_x) * p.C + me.channel;
          PYOPS_NO_UNROLL
          for (int kx = window.begin_x; kx < window.end_x; ++kx, place += p.C) {
            load_channels<T, V>(static_cast<const T*>(p.input) + place, input);
            add_gradient<T, V>(p, affine, input, da, row);
          }
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v) part[0][v] += row[0][v], part[1][v] += row[1][v];
        }
      }
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) sum[0][v] += part[0][v], sum[1][v] += part[1][v];
    }
  }
  write_sums<V, 2>(p, me, sum);
}

// da
template <class T, int V>
PYOPS_DEVICE void gather(const PoolParams& p, const GridCursor& at, int64_t channel, float (&da)[V]) {
  clear(da);
  const int y = at.y + p.pad_h, x = at.x + p.pad_w, last_y = y / p.stride_h, last_x = x / p.stride_w;
  PYOPS_NO_UNROLL
  for (int oy = last_y, ky = y - last_y * p.stride_h; oy >= 0 && ky < p.KH; --oy, ky += p.stride_h) {
    if (oy >= p.OH) continue;
    PYOPS_NO_UNROLL
    for (int ox = last_x, kx = x - last_x * p.stride_w; ox >= 0 && kx < p.KW; --ox, kx += p.stride_w) {
      if (ox >= p.OW) continue;
      const int64_t from = GridCursor{at.image, oy, ox}.position(p.OH, p.OW) * p.C + channel;
      float grad[V];
      load_channels<T, V>(static_cast<const T*>(p.grad) + from, grad);
      Taps<V> taps;
      if (p.index) taps.load(p.index + from);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) da[v] += !p.index || taps.tap[v] == ky * p.KW + kx ? grad[v] : 0.f;
    }
  }
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) da[v] *= p.share;
}

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
pool_gradient_runs(PoolParams p) {
  const ChannelPlace me = channel_place<V>(p);
  if (me.count == 0) return;
  Affine<V> affine;
  affine.load(p, me.channel);
  float constant[V], slope[V];
  load_vector<V>(p.terms, me.channel, 0.f, constant);
  load_vector<V>(p.terms, p.C + me.channel, 0.f, slope);
  GridCursor at = GridCursor::at(me.first, p.H, p.W);
  int64_t here = me.first * p.C + me.channel;
  PYOPS_NO_UNROLL
  for (int i = 0; i < me.count; ++i, here += p.C * p.cut.lanes, at.advance(p.step, p.H, p.W)) {
    float input[V], da[V], du[V];
    load_or_zero<T, V>(p.input, static_cast<const T*>(p.input) + (p.input ? here : 0), input);
    gather<T, V>(p, at, me.channel, da);
    normalise<V>(affine, input, du);
    differentiate<T, V>(p.activation, p.slope, du);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) du[v] = du[v] * da[v] * affine.scale[v] - constant[v] - (input[v] - affine.mean[v]) * slope[v];
    store_channels<T, V>(static_cast<T*>(p.output) + here, du);
  }
}

}  // namespace

size_t pool_reduce_workspace(const Pooling& p) { return p.N * p.C == 0 ? 0 : partial_bytes(cut_pool<8>(p, true, kReduceBlocks), 2 * p.C); }

void pool_reduce(const Pooling& p, void* workspace, cudaStream_t stream) {
  if (p.C == 0) return;
  if (p.N == 0) return zero_async(p.sums, sizeof(float) * 2 * p.C, stream);
  const ChannelCut cut = cut_pool<8>(p, true, kReduceBlocks);
  PoolParams params = pool_params(p, cut, true);
  params.partials = cut.slots == 1 ? p.sums : static_cast<float*>(workspace);
  with_pool_channels<8>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    launch("pool_reduce_runs", pool_reduce_runs<decltype(type), V>, channel_shape(cut, sums_room(cut, V, 2)), stream, params);
  });
  if (cut.slots > 1) merge_sums(params.partials, p.sums, cut.copies, cut.slots, 2 * p.C, stream);
}

void pool_gradient(const Pooling& p, cudaStream_t stream) {
  if (p.N * p.C == 0) return;
  const ChannelCut cut = cut_pool<16>(p, false, kGradientBlocks);
  PoolParams params = pool_params(p, cut, false);
  if (p.activation == Activation::none && !p.terms) params.input = nullptr;  // not needed
  with_pool_channels<16>(p, [&](auto type, auto v) {
    launch("pool_gradient_runs", pool_gradient_runs<decltype(type), decltype(v)::value>, channel_shape(cut, 0), stream, params);
  });
}

#define PYOPS_POOL_GRADIENT_KERNELS(T, R, V)                                                                                         \
  PYOPS_KERNEL_INFO(pool_reduce_runs, T, R), PYOPS_KERNEL_INFO(pool_reduce_runs, T, 1), PYOPS_KERNEL_INFO(pool_gradient_runs, T, V), \
      PYOPS_KERNEL_INFO(pool_gradient_runs, T, 1)

static const KernelRegistration registration({
    PYOPS_POOL_GRADIENT_KERNELS(float, 4, 4),
    PYOPS_POOL_GRADIENT_KERNELS(bf16, 4, 8),
    PYOPS_POOL_GRADIENT_KERNELS(f16, 4, 8),
});

}  // namespace pyops::conv
