// output = activation(((input - mean) * scale + bias) * keep + residual) * gate + offset: batch norm, drop path, skip connection,
// activation and squeeze-excitation's gate in one pass.
//
//   input, residual, output [M, C]; affine [3, C], keep [N], gate and offset [N, C]
//
// Tiling: channel.cuh. Floors: input and residual read once, output written once.
#include "channel.cuh"

namespace pyops::conv {
namespace {

constexpr int kApplyBlocks = 16;  // an SM: nothing is kept of a block, so that many small ones even out the end

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
channel_apply_runs(ChannelParams p) {
  constexpr int B = kBatch<T, V>;
  const ChannelPlace me = channel_place<V>(p);
  if (me.count == 0) return;
  const int64_t pitch = p.C * p.cut.lanes;
  int64_t at = me.first * p.C + me.channel;
  Affine<V> affine;
  affine.load(p, me.channel);
  Gate<V> gate;
  ImageCursor cursor(p, me.first);
  PYOPS_NO_UNROLL
  for (int i = 0; i < me.count; i += B, at += B * pitch) {
    const int count = me.count - i;
    Batch<T, V, B> input, residual;
    input.load(p.input, at, pitch, count);
    residual.load(p.residual, at, pitch, count);
    int image[B];
    float keep[B], u[B * V];
    next_images<B>(p, cursor, count, image, keep);
    sum_up<T, V, B>(affine, input, residual, keep, u);
    activate<T, B * V>(p.activation, p.slope, u);
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b) {
      gate.move_to(p, image[b], me.channel);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) u[b * V + v] = u[b * V + v] * gate.gate[v] + gate.offset[v];
    }
    store_batch<T, V, B>(p.output, at, pitch, count, u);
  }
}

}  // namespace

void channel_apply(const Channelwise& p, cudaStream_t stream) {
  if (p.N * p.P * p.C == 0) return;
  with_channels<16>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    const ChannelCut cut = cut_channels(p.N * p.P, 1, p.C, V, kApplyBlocks);
    launch("channel_apply_runs", channel_apply_runs<decltype(type), V>, channel_shape(cut, 0), stream, channel_params(p, cut));
  });
}

#define PYOPS_APPLY_KERNELS(T, V) PYOPS_KERNEL_INFO(channel_apply_runs, T, V), PYOPS_KERNEL_INFO(channel_apply_runs, T, 1)

static const KernelRegistration registration({
    PYOPS_APPLY_KERNELS(float, 4),
    PYOPS_APPLY_KERNELS(bf16, 8),
    PYOPS_APPLY_KERNELS(f16, 8),
});

}  // namespace pyops::conv
