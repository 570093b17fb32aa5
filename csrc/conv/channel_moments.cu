// Mean and sum of squared deviations from it, for each channel: batch norm's statistics.
//
//   input [M, C]  ->  partials [slots, 2, C]  ->  sums [2, C]
//
// A thread takes B positions at a time: their mean and deviations from it, then Chan's formula to join them to what it has. A block's
// lanes are joined in one step: the mean of all relative to the first lane's, then each lane's deviation from that. No step subtracts
// large nearly equal sums of squares, so that a mean far above the standard deviation loses nothing. merge_moments does the same with
// the blocks' rows; a single block writes the result itself. Tiling: channel.cuh. Floors: input once; 6 operations an element.
// Source of the formula: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#include "channel.cuh"

namespace pyops::conv {
namespace {

constexpr int kMomentsBlocks = 4;  // an SM: all resident at once, and few rows to merge

template <int V>
struct Moments {
  float count = 0.f, mean[V], deviation[V];

  PYOPS_DEVICE Moments() { clear(mean), clear(deviation); }

  template <class T, int B>
  PYOPS_DEVICE void add(const Batch<T, V, B>& x) {
    const float next = count + B, share = B / next, weight = count * share;
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      float sum = 0.f, squares = 0.f;
      PYOPS_UNROLL
      for (int b = 0; b < B; ++b) sum += x.get(b * V + v);
      const float center = sum * (1.f / B);
      PYOPS_UNROLL
      for (int b = 0; b < B; ++b) squares += (x.get(b * V + v) - center) * (x.get(b * V + v) - center);
      const float apart = center - mean[v];
      mean[v] += apart * share;
      deviation[v] += squares + apart * apart * weight;
    }
    count = next;
  }
};

template <class T, int V>
PYOPS_KERNEL(kChannelThreads)
channel_moments_runs(ChannelParams p) {
  constexpr int B = 4;
  const ChannelPlace me = channel_place<V>(p);
  const int64_t pitch = p.C * p.cut.lanes;
  int64_t at = me.first * p.C + me.channel;
  Moments<V> moments;
  int i = 0;
  PYOPS_NO_UNROLL
  for (; i + B <= me.count; i += B, at += B * pitch) {
    Batch<T, V, B> x;
    x.load(p.input, at, pitch, B);
    moments.add(x);
  }
  PYOPS_NO_UNROLL
  for (; i < me.count; ++i, at += pitch) {
    Batch<T, V, 1> x;
    x.load(p.input, at, pitch, 1);
    moments.add(x);
  }

  float* const means = reinterpret_cast<float*>(dynamic_shared());
  const int lanes = p.cut.lanes, channels = p.cut.groups * V;
  float* const deviations = means + lanes * channels;
  if (me.lane < lanes) {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      means[me.lane * channels + me.group * V + v] = moments.mean[v];
      deviations[me.lane * channels + me.group * V + v] = moments.deviation[v];
    }
  }
  __syncthreads();
  const int64_t channel0 = me.channel - me.group * V;
  auto count_of = [&](int lane) { return lane < me.block_count ? static_cast<float>((me.block_count - lane - 1) / lanes + 1) : 0.f; };
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    if (channel0 + c >= p.C) continue;
    Sum apart, deviation;
    for (int lane = 1; lane < lanes; ++lane) apart.add(count_of(lane) * (means[lane * channels + c] - means[c]));
    const float offset = apart.total / static_cast<float>(me.block_count);
    for (int lane = 0; lane < lanes; ++lane) {
      const float distance = means[lane * channels + c] - means[c] - offset;
      deviation.add(deviations[lane * channels + c] + count_of(lane) * distance * distance);
    }
    p.partials[2 * me.slot * p.C + channel0 + c] = means[c] + offset;
    p.partials[(2 * me.slot + 1) * p.C + channel0 + c] = deviation.total;
  }
}

struct MergeParams {
  const float* partials;
  float* sums;
  int64_t slots, run, positions, C;
};

// A warp for every so many runs, a lane for a channel.
PYOPS_KERNEL(kMergeThreads)
channel_moments_merge(MergeParams p) {
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const float* const at = p.partials + (channel < p.C ? channel : p.C - 1);
  const float first = at[0], last_count = static_cast<float>(p.positions - p.run * (p.slots - 1));
  auto count_of = [&](int64_t slot) { return slot == p.slots - 1 ? last_count : static_cast<float>(p.run); };
  auto over_warps = [&](float mine) {
    room[warp * kWarpSize + lane] = mine;
    __syncthreads();
    Sum sum;
    for (int w = 0; w < warps; ++w) sum.add(room[w * kWarpSize + lane]);
    __syncthreads();
    return sum.total;
  };
  Sum apart, deviation;
  for (int64_t slot = warp; slot < p.slots; slot += warps) apart.add(count_of(slot) * (at[2 * slot * p.C] - first));
  const float offset = over_warps(apart.total) / static_cast<float>(p.positions);
  for (int64_t slot = warp; slot < p.slots; slot += warps) {
    const float distance = at[2 * slot * p.C] - first - offset;
    deviation.add(at[(2 * slot + 1) * p.C] + count_of(slot) * distance * distance);
  }
  const float total = over_warps(deviation.total);
  if (warp == 0 && channel < p.C) p.sums[channel] = first + offset, p.sums[p.C + channel] = total;
}

ChannelCut moments_cut(const Channelwise& p) { return cut_channels(p.N * p.P, 1, p.C, channel_vector<16>(p), kMomentsBlocks); }

}  // namespace

void merge_moments(const float* partials, float* sums, int64_t slots, int64_t run, int64_t positions, int64_t C, cudaStream_t stream) {
  constexpr int64_t kMostWarps = kMergeThreads / kWarpSize;
  const int threads = kWarpSize * static_cast<int>(slots < kMostWarps ? slots : kMostWarps);
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(C, int64_t{kWarpSize}))), threads, threads * sizeof(float)};
  launch("channel_moments_merge", channel_moments_merge, shape, stream, MergeParams{partials, sums, slots, run, positions, C});
}

size_t channel_moments_workspace(const Channelwise& p) {
  const int64_t slots = p.N * p.P * p.C == 0 ? 1 : moments_cut(p).slots;
  return slots == 1 ? 0 : sizeof(float) * 2 * static_cast<size_t>(slots * p.C);
}

void channel_moments(const Channelwise& p, void* workspace, cudaStream_t stream) {
  if (p.C == 0) return;
  if (p.N * p.P == 0) return zero_async(p.sums, sizeof(float) * 2 * p.C, stream);
  const ChannelCut cut = moments_cut(p);
  ChannelParams params = channel_params(p, cut);
  params.partials = cut.slots == 1 ? p.sums : static_cast<float*>(workspace);
  with_channels<16>(p, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    launch("channel_moments_runs", channel_moments_runs<decltype(type), V>, channel_shape(cut, sums_room(cut, V, 2)), stream, params);
  });
  if (cut.slots > 1) merge_moments(params.partials, p.sums, cut.slots, cut.run, cut.positions, p.C, stream);
}

#define PYOPS_MOMENTS_KERNELS(T, V) PYOPS_KERNEL_INFO(channel_moments_runs, T, V), PYOPS_KERNEL_INFO(channel_moments_runs, T, 1)

static const KernelRegistration registration({
    PYOPS_MOMENTS_KERNELS(float, 4),
    PYOPS_MOMENTS_KERNELS(bf16, 8),
    PYOPS_MOMENTS_KERNELS(f16, 8),
    {"channel_moments_merge", reinterpret_cast<const void*>(&channel_moments_merge)},
});

}  // namespace pyops::conv
