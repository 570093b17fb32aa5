// What the channelwise kernels share: how images are cut into blocks, vectors of channels, a thread's walk over positions.
//
//   images [M, C], M = N*P positions, C channels innermost; vectors [C] or [N, C] of float
//
// A thread owns V channels (16 or 8 bytes of storage, or one channel where that does not fit) of positions `lanes` apart, B at a time, so
// that several loads are in flight. A block is `groups` vectors of channels x `lanes` positions at once and walks a run of neighbouring
// positions; what belongs to a channel stays in registers. Sums leave a block as one row of partial sums and a second kernel adds the
// rows in order. How work is cut depends on the shape and the number of SMs alone: the same call gives the same bits. No atomics.
// Runs are short (kLaneRun positions a thread), so that no float is the sum of thousands of terms one after another.
//
// Floors: each image once; 3 to 30 float operations an element, of which an activation's exponential is the dearest.
#pragma once
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "activation.cuh"
#include "channel_cuda.h"
#include "vectors.cuh"

namespace pyops::conv {

constexpr int kChannelThreads = 128;  // a thread holds up to 150 registers: small blocks leave fewer of an SM's unused
constexpr int kLaneRun = 64;
constexpr int kMergeThreads = 512;

// Positions a thread has in flight: 32 bytes of an image.
template <class T, int V>
constexpr int kBatch = V == 1 ? 4 : 32 / (V * sizeof(T));

struct ChannelCut {
  int groups, lanes;          // a block: vectors of channels x positions at once
  int channel_blocks;         // blocks side by side
  int64_t run, slots;         // positions of a block; runs in a copy
  int64_t positions, copies;  // of a copy: all of M, or an image where sums are an image's own
  int threads() const { return round_up(groups * lanes, kWarpSize); }
  int64_t blocks() const { return channel_blocks * slots * copies; }
};

// blocks_per_sm: as many blocks, where there is the work for it.
inline ChannelCut cut_channels(int64_t positions, int64_t copies, int64_t C, int V, int blocks_per_sm) {
  if (positions > INT32_MAX / 2 || copies > INT32_MAX / 2) throw std::runtime_error("channelwise kernels on a GPU: up to 2^30 positions");
  const int64_t all = C / V, threads = kChannelThreads;
  int64_t wide = V == 1 ? 32 : 8;  // 64 to 128 neighbouring bytes; more where there are few positions
  if (positions * wide < threads) wide = threads / (positions < 1 ? 1 : positions);
  if (wide > threads) wide = threads;
  const int64_t channel_blocks = ceil_div(all, wide), groups = ceil_div(all, channel_blocks), room = threads / groups;
  const int64_t lanes = positions < 1 ? 1 : positions < room ? positions : room;
  const int64_t turns = positions < 1 ? 1 : ceil_div(positions, lanes);
  int64_t slots = int64_t{blocks_per_sm} * device_limits().sm_count / (channel_blocks * copies);
  slots = slots < 1 ? 1 : slots > turns ? turns : slots;
  const int64_t each = ceil_div(turns, slots), run = (each < kLaneRun ? each : kLaneRun) * lanes;
  ChannelCut cut{static_cast<int>(groups), static_cast<int>(lanes), static_cast<int>(channel_blocks), run, 0, positions, copies};
  cut.slots = positions < 1 ? 1 : ceil_div(positions, run);
  if (cut.blocks() > INT32_MAX) throw std::runtime_error("channelwise kernels: too much for one launch");
  return cut;
}

struct ChannelParams {
  const void *input, *grad, *residual;
  const float *affine, *keep, *gate, *offset, *terms;
  void *output, *grad_residual;
  float* partials;
  int64_t C;
  int P, step_images, step_within;  // `lanes` positions farther
  ChannelCut cut;
  Activation activation;
  float slope;
};

inline ChannelParams channel_params(const Channelwise& p, const ChannelCut& cut) {
  ChannelParams params{};
  params.input = p.input, params.grad = p.grad, params.residual = p.residual;
  params.affine = p.affine, params.keep = p.keep, params.gate = p.gate, params.offset = p.offset, params.terms = p.terms;
  params.output = p.output, params.grad_residual = p.grad_residual;
  params.C = p.C, params.cut = cut;
  // where nothing belongs to an image, all are one
  params.P = static_cast<int>(p.keep || p.gate || p.offset || cut.copies > 1 ? p.P : p.N * p.P);
  params.step_images = cut.lanes / params.P, params.step_within = cut.lanes % params.P;
  params.activation = p.activation, params.slope = p.slope;
  return params;
}

// Channels in a vector of kBytes, where every image can be read so; else one.
template <int kBytes>
int channel_vector(const Channelwise& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2, bytes = element == 4 ? 16 : kBytes;
  return vectors_fit(p.C, bytes / element, element, {p.input, p.grad, p.residual, p.output, p.grad_residual}) ? bytes / element : 1;
}

// Calls f(a value of the storage type, the number of channels in a vector).
template <int kBytes, class F>
void with_channels(const Channelwise& p, F&& f) {
  with_type(p.dtype, [&](auto type) {
    constexpr int V = sizeof(type) == 4 ? 4 : kBytes / 2;
    if (channel_vector<kBytes>(p) == V) f(type, std::integral_constant<int, V>{});
    else f(type, std::integral_constant<int, 1>{});
  });
}

// Where a thread stands: its channels, and its positions first, first + lanes, ... of the images as one.
struct ChannelPlace {
  int group, lane, count, block_count;
  int64_t channel, first, slot;  // slot: of all copies
  bool active;
};

template <int V>
PYOPS_DEVICE ChannelPlace channel_place(const ChannelParams& p) {
  const ChannelCut& cut = p.cut;
  ChannelPlace me;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  me.group = thread % cut.groups, me.lane = thread / cut.groups;
  me.channel = (static_cast<int64_t>(block % cut.channel_blocks) * cut.groups + me.group) * V;
  me.slot = block / cut.channel_blocks;
  const int64_t begin = me.slot % cut.slots * cut.run, left = cut.positions - begin;
  me.block_count = static_cast<int>(left < cut.run ? left : cut.run);
  me.first = me.slot / cut.slots * cut.positions + begin + me.lane;
  me.active = me.lane < cut.lanes && me.channel < p.C;
  me.count = me.active && me.lane < me.block_count ? (me.block_count - me.lane - 1) / cut.lanes + 1 : 0;
  return me;
}

// Of which image a thread's positions are, one after another, without a division each.
struct ImageCursor {
  int image, within;
  PYOPS_DEVICE ImageCursor(const ChannelParams& p, int64_t position)
      : image(static_cast<int>(position / p.P)), within(static_cast<int>(position % p.P)) {}
  PYOPS_DEVICE int next(const ChannelParams& p) {
    const int now = image;
    image += p.step_images, within += p.step_within;
    if (within >= p.P) within -= p.P, ++image;
    return now;
  }
};

// V channels of B positions as they are stored.
template <class T, int V, int B>
struct Batch {
  using Raw = typename RawOf<V * sizeof(T)>::type;
  Raw raw[B];

  // Zeros without an image and past the last of `count` positions.
  PYOPS_DEVICE void load(const void* image, int64_t at, int64_t pitch, int count) {
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b)
      raw[b] = image && b < count ? *reinterpret_cast<const Raw*>(static_cast<const T*>(image) + at + b * pitch) : Raw{};
  }
  PYOPS_DEVICE float get(int i) const {  // of B*V, one position after another
    T values[V];
    __builtin_memcpy(values, &raw[i / V], sizeof(Raw));
    return to_float(values[i % V]);
  }
};

template <class T, int V, int B>
PYOPS_DEVICE void store_batch(void* image, int64_t at, int64_t pitch, int count, const float (&values)[B * V]) {
  PYOPS_UNROLL
  for (int b = 0; b < B; ++b) {
    float row[V];
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) row[v] = values[b * V + v];
    if (b < count) store_channels<T, V>(static_cast<T*>(image) + at + b * pitch, row);
  }
}

template <int V>
PYOPS_DEVICE void load_vector(const float* from, int64_t at, float otherwise, float (&to)[V]) {
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) to[v] = from ? from[at + v] : otherwise;
}

template <int V>
struct Affine {
  float mean[V], scale[V], bias[V];
  PYOPS_DEVICE void load(const ChannelParams& p, int64_t channel) {
    load_vector<V>(p.affine, channel, 0.f, mean);
    load_vector<V>(p.affine, p.C + channel, 1.f, scale);
    load_vector<V>(p.affine, 2 * p.C + channel, 0.f, bias);
  }
};

// gate and offset of an image's channels, read anew where the image changes.
template <int V>
struct Gate {
  int image = -1;
  float gate[V], offset[V];
  PYOPS_DEVICE Gate() {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) gate[v] = 1.f, offset[v] = 0.f;
  }
  PYOPS_DEVICE void move_to(const ChannelParams& p, int to, int64_t channel) {
    if ((!p.gate && !p.offset) || to == image) return;
    image = to;
    load_vector<V>(p.gate, static_cast<int64_t>(to) * p.C + channel, 1.f, gate);
    load_vector<V>(p.offset, static_cast<int64_t>(to) * p.C + channel, 0.f, offset);
  }
};

// u = ((input - mean) * scale + bias) * keep + residual, of B positions.
template <class T, int V, int B>
PYOPS_DEVICE void sum_up(const Affine<V>& affine, const Batch<T, V, B>& input, const Batch<T, V, B>& residual, const float (&keep)[B],
                         float (&u)[B * V]) {
  PYOPS_UNROLL
  for (int i = 0; i < B * V; ++i) {
    const float z = (input.get(i) - affine.mean[i % V]) * affine.scale[i % V] + affine.bias[i % V];
    u[i] = z * keep[i / V] + residual.get(i);
  }
}

// The images of the next B positions, and their multipliers.
template <int B>
PYOPS_DEVICE void next_images(const ChannelParams& p, ImageCursor& cursor, int count, int (&image)[B], float (&keep)[B]) {
  PYOPS_UNROLL
  for (int b = 0; b < B; ++b) {
    image[b] = cursor.next(p);
    if (b >= count) image[b] = image[0];
    keep[b] = p.keep ? p.keep[image[b]] : 1.f;
  }
}

// Writes the block's sums, row by row, to partials [slot][kRows][C]. Every thread of the block calls it. Shared memory: sums_room.
template <int V, int kRows>
PYOPS_DEVICE void write_sums(const ChannelParams& p, const ChannelPlace& me, const float (&sum)[kRows][V]) {
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const int channels = p.cut.groups * V;
  const int64_t channel0 = me.channel - me.group * V;
  if (me.lane < p.cut.lanes) {
    PYOPS_UNROLL
    for (int row = 0; row < kRows; ++row) {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) room[(row * p.cut.lanes + me.lane) * channels + me.group * V + v] = sum[row][v];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * channels; i += static_cast<int>(blockDim.x)) {
    const int row = i / channels, c = i % channels;
    if (channel0 + c >= p.C) continue;
    Sum over;
    for (int lane = 0; lane < p.cut.lanes; ++lane) over.add(room[(row * p.cut.lanes + lane) * channels + c]);
    p.partials[(me.slot * kRows + row) * p.C + channel0 + c] = over.total;
  }
}
inline size_t sums_room(const ChannelCut& cut, int V, int rows) { return sizeof(float) * rows * cut.lanes * cut.groups * V; }

// Of partials [copies, slots, width]; one slot's are the sums themselves.
inline size_t partial_bytes(const ChannelCut& cut, int64_t width) {
  return cut.slots == 1 ? 0 : sizeof(float) * static_cast<size_t>(cut.copies * cut.slots * width);
}

inline LaunchShape channel_shape(const ChannelCut& cut, size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(cut.blocks())), cut.threads(), shared_bytes};
}

// Merges means and squared deviations of runs: partials [slots][2][C] -> sums [2][C]. Each run has `run` of the `positions`, the last what
// is left. In channel_moments.cu; the 1x1 convolution's moments end there as well.
void merge_moments(const float* partials, float* sums, int64_t slots, int64_t run, int64_t positions, int64_t C, cudaStream_t stream);

// Adds rows of partial sums in order: partials [copies][slots][width] -> sums [copies][width]. In channel_sums.cu.
void merge_sums(const float* partials, float* sums, int64_t copies, int64_t slots, int64_t width, cudaStream_t stream);

}  // namespace pyops::conv
