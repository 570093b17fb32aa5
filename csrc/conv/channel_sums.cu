// Sums over positions: squeeze-excitation's means and the gradient of its gate, and the two sums that batch norm's gradient needs.
//
//   totals: a, or a * grad            [N, P, C]  ->  partials [N * slots, C]     ->  sums [N, C]
//   reduce: dz, dz * (input - mean)   [M, C]     ->  partials [slots, 2, C]      ->  sums [2, C]
//
// with a = activation(u) and dz = (grad * gate + offset) * activation'(u) * keep. In totals a block stays within an image. One run of
// an image, or of all images, writes the sums themselves. Tiling: channel.cuh. Floors: each image once.
#include "channel.cuh"

namespace pyops::conv {
namespace {

constexpr int kSumBlocks = 4;  // an SM: all resident at once, and few rows to merge

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
channel_totals_runs(ChannelParams p) {
  constexpr int B = kBatch<T, V>;
  const ChannelPlace me = channel_place<V>(p);
  const int64_t pitch = p.C * p.cut.lanes;
  float sum[1][V];
  clear(sum[0]);
  if (me.count > 0) {
    int64_t at = me.first * p.C + me.channel;
    Affine<V> affine;
    affine.load(p, me.channel);
    float keep[B];
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b) keep[b] = p.keep ? p.keep[me.slot / p.cut.slots] : 1.f;
    PYOPS_NO_UNROLL
    for (int i = 0; i < me.count; i += B, at += B * pitch) {
      const int count = me.count - i;
      Batch<T, V, B> input, residual, grad;
      input.load(p.input, at, pitch, count);
      residual.load(p.residual, at, pitch, count);
      grad.load(p.grad, at, pitch, count);
      float a[B * V];
      sum_up<T, V, B>(affine, input, residual, keep, a);
      activate<T, B * V>(p.activation, p.slope, a);
      float part[V];
      clear(part);
      PYOPS_UNROLL
      for (int j = 0; j < B * V; ++j)
        if (j / V < count) part[j % V] += p.grad ? a[j] * grad.get(j) : a[j];
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) sum[0][v] += part[v];
    }
  }
  write_sums<V, 1>(p, me, sum);
}

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
channel_reduce_runs(ChannelParams p) {
  constexpr int B = kBatch<T, V>;
  const ChannelPlace me = channel_place<V>(p);
  const int64_t pitch = p.C * p.cut.lanes;
  float sum[2][V];
  clear(sum[0]), clear(sum[1]);
  if (me.count > 0) {
    int64_t at = me.first * p.C + me.channel;
    Affine<V> affine;
    affine.load(p, me.channel);
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
      float keep[B], dz[B * V], part[2][V];
      next_images<B>(p, cursor, count, image, keep);
      sum_up<T, V, B>(affine, input, residual, keep, dz);
      differentiate<T, B * V>(p.activation, p.slope, dz);
      clear(part[0]), clear(part[1]);
      PYOPS_UNROLL
      for (int b = 0; b < B; ++b) {
        gate.move_to(p, image[b], me.channel);
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) {
          const int j = b * V + v;
          const float value = b < count ? dz[j] * (grad.get(j) * gate.gate[v] + gate.offset[v]) * keep[b] : 0.f;
          part[0][v] += value;
          part[1][v] += value * (input.get(j) - affine.mean[v]);
        }
      }
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) sum[0][v] += part[0][v], sum[1][v] += part[1][v];
    }
  }
  write_sums<V, 2>(p, me, sum);
}

struct MergeParams {
  const float* partials;          // [copies, slots, width]
  float* sums;                    // [copies, width]
  int64_t slots, width, columns;  // columns: copies * width
};

// A warp for every so many rows, a lane for a column.
PYOPS_KERNEL(kMergeThreads)
channel_sums_merge(MergeParams p) {
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  Sum sum;
  if (column < p.columns) {
    const float* const at = p.partials + column / p.width * p.slots * p.width + column % p.width;
    for (int64_t slot = warp; slot < p.slots; slot += warps) sum.add(at[slot * p.width]);
  }
  room[warp * kWarpSize + lane] = sum.total;
  __syncthreads();
  if (warp > 0 || column >= p.columns) return;
  Sum total;
  for (int w = 0; w < warps; ++w) total.add(room[w * kWarpSize + lane]);
  p.sums[column] = total.total;
}

ChannelCut totals_cut(const Channelwise& p) { return cut_channels(p.P, p.N, p.C, channel_vector<16>(p), kSumBlocks); }
ChannelCut reduce_cut(const Channelwise& p) { return cut_channels(p.N * p.P, 1, p.C, channel_vector<8>(p), kSumBlocks); }

}  // namespace

void merge_sums(const float* partials, float* sums, int64_t copies, int64_t slots, int64_t width, cudaStream_t stream) {
  constexpr int64_t kMostWarps = kMergeThreads / kWarpSize;
  const int threads = kWarpSize * static_cast<int>(slots < kMostWarps ? slots : kMostWarps);
  const MergeParams params{partials, sums, slots, width, copies * width};
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(params.columns, int64_t{kWarpSize}))), threads, threads * sizeof(float)};
  launch("channel_sums_merge", channel_sums_merge, shape, stream, params);
}

size_t channel_totals_workspace(const Channelwise& p) { return p.N * p.P * p.C == 0 ? 0 : partial_bytes(totals_cut(p), p.C); }

void channel_totals(const Channelwise& p, void* workspace, cudaStream_t stream) {
  if (p.N * p.C == 0) return;
  if (p.P == 0) return zero_async(p.sums, sizeof(float) * p.N * p.C, stream);
  const ChannelCut cut = totals_cut(p);
  ChannelParams params = channel_params(p, cut);
  params.partials = cut.slots == 1 ? p.sums : static_cast<float*>(workspace);
  with_channels<16>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    launch("channel_totals_runs", channel_totals_runs<decltype(type), V>, channel_shape(cut, sums_room(cut, V, 1)), stream, params);
  });
  if (cut.slots > 1) merge_sums(params.partials, p.sums, cut.copies, cut.slots, p.C, stream);
}

size_t channel_reduce_workspace(const Channelwise& p) { return p.N * p.P * p.C == 0 ? 0 : partial_bytes(reduce_cut(p), 2 * p.C); }

void channel_reduce(const Channelwise& p, void* workspace, cudaStream_t stream) {
  if (p.C == 0) return;
  if (p.N * p.P == 0) return zero_async(p.sums, sizeof(float) * 2 * p.C, stream);
  const ChannelCut cut = reduce_cut(p);
  ChannelParams params = channel_params(p, cut);
  if (p.activation == Activation::none) params.residual = nullptr;  // u is not needed
  params.partials = cut.slots == 1 ? p.sums : static_cast<float*>(workspace);
  with_channels<8>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    launch("channel_reduce_runs", channel_reduce_runs<decltype(type), V>, channel_shape(cut, sums_room(cut, V, 2)), stream, params);
  });
  if (cut.slots > 1) merge_sums(params.partials, p.sums, cut.copies, cut.slots, 2 * p.C, stream);
}

#define PYOPS_SUMS_KERNELS(T, V, R)                                                           \
  PYOPS_KERNEL_INFO(channel_totals_runs, T, V), PYOPS_KERNEL_INFO(channel_totals_runs, T, 1), \
      PYOPS_KERNEL_INFO(channel_reduce_runs, T, R), PYOPS_KERNEL_INFO(channel_reduce_runs, T, 1)

static const KernelRegistration registration({
    PYOPS_SUMS_KERNELS(float, 4, 4),
    PYOPS_SUMS_KERNELS(bf16, 8, 4),
    PYOPS_SUMS_KERNELS(f16, 8, 4),
    {"channel_sums_merge", reinterpret_cast<const void*>(&channel_sums_merge)},
});

}  // namespace pyops::conv
