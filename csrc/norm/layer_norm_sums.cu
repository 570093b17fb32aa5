// The sums of LayerNorm's gradient over positions: weight's and bias's gradients.
//
//   sums [2, C] = sums of grad * z and of grad, z = (input - mean) * rstd
//
//   input, grad: rows [N, P, C] or planes [N, C, P];  statistics [N*P, 2] = mean, rstd  ->  partials [slots, 2, C]  ->  sums
//
// rows: vectors of four channels walk down the positions as in channel.cuh. planes: a block has eight channels, so that a position's
// statistics are read once for so many, and its threads neighbouring positions. merge_sums adds the runs' rows in order; a single run
// writes the result itself. Floors: input and grad read once.
#include "../conv/channel.cuh"
#include "norms.cuh"

namespace pyops::norm {
namespace {

using conv::ChannelCut;
using conv::ChannelParams;

constexpr int kPlaneChannels = 8;
constexpr int kSumBlocks = 4;  // an SM: all resident at once, and few rows to merge

struct RowSums {
  ChannelParams channels;
  const float2* statistics;
};

template <class T, int V>
PYOPS_KERNEL(conv::kChannelThreads)
layer_norm_rows_sums(RowSums p) {
  constexpr int B = conv::kBatch<T, V>;
  const ChannelParams& channels = p.channels;
  const conv::ChannelPlace me = conv::channel_place<V>(channels);
  const int64_t pitch = channels.C * channels.cut.lanes;
  float sum[2][V];
  conv::clear(sum[0]), conv::clear(sum[1]);
  int64_t at = me.first * channels.C + me.channel;
  PYOPS_NO_UNROLL
  for (int i = 0; i < me.count; i += B, at += B * pitch) {
    const int count = me.count - i;
    conv::Batch<T, V, B> grad, input;
    grad.load(channels.grad, at, pitch, count);
    input.load(channels.input, at, pitch, count);
    float part[2][V];
    conv::clear(part[0]), conv::clear(part[1]);
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b) {
      const float2 statistics = b < count ? p.statistics[me.first + (i + b) * channels.cut.lanes] : float2{};
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) {  // past the last position all are zeros
        const float g = grad.get(b * V + v);
        part[0][v] += g * ((input.get(b * V + v) - statistics.x) * statistics.y);
        part[1][v] += g;
      }
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) sum[0][v] += part[0][v], sum[1][v] += part[1][v];
  }
  conv::write_sums<V, 2>(channels, me, sum);
}

struct PlaneSums {
  const void *input, *grad;
  const float2* statistics;
  float* partials;  // [slots, 2, C]
  int64_t positions, C, P, run;
  int channel_blocks;
};

template <class T>
PYOPS_KERNEL(kNormThreads)
layer_norm_planes_sums(PlaneSums p) {
  constexpr int K = kPlaneChannels;
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, block = static_cast<int>(blockIdx.x);
  const int64_t channel = static_cast<int64_t>(block % p.channel_blocks) * K, slot = block / p.channel_blocks;
  const int64_t end = p.positions < (slot + 1) * p.run ? p.positions : (slot + 1) * p.run;
  const int count = static_cast<int>(p.C - channel < K ? p.C - channel : K);
  float sum[2 * K];
  conv::clear(sum);
  PYOPS_NO_UNROLL
  for (int64_t position = slot * p.run + thread; position < end; position += kNormThreads) {
    const int image = static_cast<int>(position) / static_cast<int>(p.P), within = static_cast<int>(position) % static_cast<int>(p.P);
    const int64_t at = (image * p.C + channel) * p.P + within;
    const float2 statistics = p.statistics[position];
    PYOPS_UNROLL
    for (int k = 0; k < K; ++k) {
      if (k >= count) continue;
      const float g = to_float(static_cast<const T*>(p.grad)[at + k * p.P]), x = to_float(static_cast<const T*>(p.input)[at + k * p.P]);
      sum[k] += g * ((x - statistics.x) * statistics.y), sum[K + k] += g;
    }
  }
  PYOPS_UNROLL
  for (int i = 0; i < 2 * K; ++i) sum[i] = group_sum(sum[i], kWarpSize);
  if (lane == 0) {
    PYOPS_UNROLL
    for (int i = 0; i < 2 * K; ++i) room[thread / kWarpSize * 2 * K + i] = sum[i];
  }
  __syncthreads();
  const int row = thread / K, k = thread % K;
  if (row >= 2 || k >= count) return;
  float total = 0.f;
  for (int w = 0; w < kNormWarps; ++w) total += room[w * 2 * K + thread];
  p.partials[(slot * 2 + row) * p.C + channel + k] = total;
}

// How the two sums are cut: rows by channel.cuh with vectors of four channels (or one), planes by runs of whole blocks of positions.
struct SumsCut {
  ChannelCut rows;
  int64_t run, slots;
  int channel_blocks;
};
int sums_vector(const LayerNorm& p) { return vectors_fit(p.C, 4, p.dtype == DType::f32 ? 4 : 2, {p.input, p.grad}) ? 4 : 1; }
SumsCut sums_cut(const LayerNorm& p) {
  const int64_t positions = p.N * p.P;
  SumsCut cut{};
  if (p.rows) {
    cut.rows = conv::cut_channels(positions, 1, p.C, sums_vector(p), kSumBlocks), cut.slots = cut.rows.slots;
    return cut;
  }
  const int64_t blocks = ceil_div(p.C, int64_t{kPlaneChannels}), turns = ceil_div(positions, int64_t{kNormThreads});
  int64_t slots = int64_t{kSumBlocks} * device_limits().sm_count / blocks;
  slots = slots < 1 ? 1 : slots > turns ? turns : slots;
  const int64_t each = ceil_div(turns, slots);
  cut.run = (each < conv::kLaneRun ? each : conv::kLaneRun) * kNormThreads;
  cut.slots = ceil_div(positions, cut.run), cut.channel_blocks = static_cast<int>(blocks);
  if (cut.slots * blocks > INT32_MAX) throw std::runtime_error("LayerNorm's gradient: too much for one launch");
  return cut;
}

}  // namespace

size_t layer_norm_sums_workspace(const LayerNorm& p) {
  const int64_t slots = sums_cut(p).slots;
  return slots == 1 ? 0 : sizeof(float) * 2 * static_cast<size_t>(slots * p.C);
}

void layer_norm_sums(const LayerNorm& p, const float2* statistics, float* workspace, cudaStream_t stream) {
  const SumsCut cut = sums_cut(p);
  float* const partials = cut.slots == 1 ? p.sums : workspace;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (!p.rows) {
      const PlaneSums params{p.input, p.grad, statistics, partials, p.N * p.P, p.C, p.P, cut.run, cut.channel_blocks};
      const LaunchShape shape{dim3(static_cast<unsigned>(cut.slots * cut.channel_blocks)), kNormThreads,
                              sizeof(float) * 2 * kPlaneChannels * kNormWarps};
      return launch("layer_norm_planes_sums", layer_norm_planes_sums<T>, shape, stream, params);
    }
    RowSums params{};
    params.channels.input = p.input, params.channels.grad = p.grad, params.channels.partials = partials;
    params.channels.C = p.C, params.channels.cut = cut.rows, params.statistics = statistics;
    const int V = sums_vector(p);
    const LaunchShape shape = conv::channel_shape(cut.rows, conv::sums_room(cut.rows, V, 2));
    if (V == 4) launch("layer_norm_rows_sums", layer_norm_rows_sums<T, 4>, shape, stream, params);
    else launch("layer_norm_rows_sums", layer_norm_rows_sums<T, 1>, shape, stream, params);
  });
  if (cut.slots > 1) conv::merge_sums(partials, p.sums, 1, cut.slots, 2 * p.C, stream);
}

#define PYOPS_SUMS_KERNELS(T) \
  PYOPS_KERNEL_INFO(layer_norm_rows_sums, T, 4), PYOPS_KERNEL_INFO(layer_norm_rows_sums, T, 1), PYOPS_KERNEL_INFO(layer_norm_planes_sums, T)

static const KernelRegistration registration({PYOPS_SUMS_KERNELS(float), PYOPS_SUMS_KERNELS(bf16), PYOPS_SUMS_KERNELS(f16)});

}  // namespace pyops::norm
