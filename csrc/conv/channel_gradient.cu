// The gradients of channel_apply's images: of input, in place of the incoming gradient if wanted, and of residual.
//
//   g = grad * gate + offset,  du = g * activation'(u),  dz = du * keep
//   output = dz * scale - terms[0] - (input - mean) * terms[1],  grad_residual = du
//
//   grad, input, residual, output, grad_residual [M, C]; affine [3, C], terms [2, C], keep [N], gate and offset [N, C]
//
// A thread reads its elements of every image before it writes any of them, and no others: output may be grad. Without an activation u
// is not needed, so that residual, and without terms input as well, are not read. Tiling: channel.cuh.
// Floors: grad, input, residual read once, output and grad_residual written once.
#include "channel.cuh"

namespace pyops::conv {
namespace {

constexpr int kGradientBlocks = 16;  // an SM, as in channel_apply.cu

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
channel_gradient_runs(ChannelParams p) {
  constexpr int B = kBatch<T, V>;
  const ChannelPlace me = channel_place<V>(p);
  if (me.count == 0) return;
  const int64_t pitch = p.C * p.cut.lanes;
  int64_t at = me.first * p.C + me.channel;
  Affine<V> affine;
  affine.load(p, me.channel);
  float constant[V], slope[V];
  load_vector<V>(p.terms, me.channel, 0.f, constant);
  load_vector<V>(p.terms, p.C + me.channel, 0.f, slope);
  Gate<V> gate;
  ImageCursor cursor(p, me.first);
  PYOPS_NO_UNROLL
  for (int i = 0; i < me.count; i += B, at += B * pitch) {
    const int count = me.count - i;
    Batch<T, V, B> grad, input, residual;
    grad.load(p.grad, at, pitch, count);
    input.load(p.input, at, pitch, count);
    residual.load(p.residual, at, pitch, count);
    int image[B];
    float keep[B], du[B * V];
    next_images<B>(p, cursor, count, image, keep);
    sum_up<T, V, B>(affine, input, residual, keep, du);
    differentiate<T, B * V>(p.activation, p.slope, du);
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b) {
      gate.move_to(p, image[b], me.channel);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) du[b * V + v] *= grad.get(b * V + v) * gate.gate[v] + gate.offset[v];
    }
    if (p.grad_residual) store_batch<T, V, B>(p.grad_residual, at, pitch, count, du);
    PYOPS_UNROLL
    for (int j = 0; j < B * V; ++j) {
      const int v = j % V;
      du[j] = du[j] * keep[j / V] * affine.scale[v] - constant[v] - (input.get(j) - affine.mean[v]) * slope[v];
    }
    store_batch<T, V, B>(p.output, at, pitch, count, du);
  }
}

}  // namespace

void channel_gradient(const Channelwise& p, cudaStream_t stream) {
  if (p.N * p.P * p.C == 0) return;
  with_channels<8>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    const ChannelCut cut = cut_channels(p.N * p.P, 1, p.C, V, kGradientBlocks);
    ChannelParams params = channel_params(p, cut);
    if (p.activation == Activation::none) {
      params.residual = nullptr;
      if (!p.terms) params.input = nullptr;
    }
    launch("channel_gradient_runs", channel_gradient_runs<decltype(type), V>, channel_shape(cut, 0), stream, params);
  });
}

#define PYOPS_GRADIENT_KERNELS(T, V) PYOPS_KERNEL_INFO(channel_gradient_runs, T, V), PYOPS_KERNEL_INFO(channel_gradient_runs, T, 1)

static const KernelRegistration registration({
    PYOPS_GRADIENT_KERNELS(float, 4),
    PYOPS_GRADIENT_KERNELS(bf16, 4),
    PYOPS_GRADIENT_KERNELS(f16, 4),
});

}  // namespace pyops::conv
