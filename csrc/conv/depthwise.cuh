// What the GPU kernels of the depthwise convolution share: how work is cut into blocks, vectors of channels, filters in shared memory.
//
// A thread computes V channels (up to 16 bytes of storage) of a strip of neighbouring positions in a row. A block is `groups`
// vectors of channels x `lanes` strips; it keeps its channels' filters in shared memory, in float, and walks `passes` x lanes
// strips of each of `images` images with them. Which strips a block takes depends on the shape and the number of SMs alone, and
// sums over blocks are finished by a second kernel in a fixed order: the same call gives the same bits.
#pragma once
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "depthwise_cuda.h"
#include "vectors.cuh"

namespace pyops::conv {

constexpr int kDepthwiseThreads = 128;  // a thread holds up to 230 registers: small blocks leave fewer of an SM's unused
constexpr int kBlockChannels = 64;      // 128 bytes of a 16-bit position, and filters of 7x7 in 12.5 KiB
constexpr int kChunkTaps = 32;          // filters of a size known at run time alone pass through shared memory in chunks

struct Dims {  // DepthwiseShape in the ints that indices are computed in; offsets into tensors are 64 bits
  int N, H, W, C, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

inline Dims dims_of(const DepthwiseShape& s) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t reach_h = s.H + 2 * int64_t{s.pad_h} + int64_t{s.dilation_h} * s.KH;
  const int64_t reach_w = s.W + 2 * int64_t{s.pad_w} + int64_t{s.dilation_w} * s.KW;
  if (s.N > kMost || s.C > kMost || reach_h > kMost || reach_w > kMost || s.OH * s.OW > kMost || s.H * s.W > kMost || s.stride_h > kMost ||
      s.stride_w > kMost)
    throw std::runtime_error("depthwise convolution on a GPU: images up to 2^30 positions, filters that reach no further");
  auto small = [](int64_t value) { return static_cast<int>(value); };
  return {small(s.N), small(s.H), small(s.W), small(s.C), small(s.OH), small(s.OW),  s.KH,
          s.KW,       s.stride_h, s.stride_w, s.pad_h,    s.pad_w,     s.dilation_h, s.dilation_w};
}

// ------------------------------------------------------------------------------------------------------------- cutting work

struct Cut {
  int groups, lanes;                   // a block: vectors of channels x strips at once
  int strips_per_row, strips, passes;  // of an image; strips a lane takes of an image
  int tiles, channel_blocks;           // blocks per image
  int images, image_groups;            // images per block, and how many such
  int threads() const { return round_up(groups * lanes, kWarpSize); }
  int slots() const { return tiles * image_groups; }  // blocks that share channels
  unsigned blocks() const { return static_cast<unsigned>(slots()) * channel_blocks; }
};

// `most`: passes over strips a block takes at most. More of them read the filter less often, fewer fill more SMs: eight blocks an
// SM are kept as long as there are as many passes; `copies` of the grid share them.
inline Cut cut_work(int N, int C, int rows, int width, int V, int strip, int64_t most, int64_t copies = 1) {
  const int64_t all_groups = C / V, most_groups = kBlockChannels / V;
  const int64_t channel_blocks = ceil_div(all_groups, most_groups), strips_per_row = ceil_div(width, strip);
  const int64_t strips = strips_per_row * rows, groups = ceil_div(all_groups, channel_blocks);
  const int64_t room = kDepthwiseThreads / groups, lanes = strips < 1 ? 1 : strips < room ? strips : room;
  const int64_t all_passes = strips < 1 ? 1 : ceil_div(strips, lanes), wanted = int64_t{8} * device_limits().sm_count;
  int64_t work = channel_blocks * N * all_passes * copies / wanted;
  work = work < 1 ? 1 : work > most ? most : work;
  const int64_t tiles = ceil_div(all_passes, work < all_passes ? work : all_passes), passes = ceil_div(all_passes, tiles);
  const int64_t images = work / passes < 1 ? 1 : work / passes > N ? N : work / passes;
  const int64_t image_groups = ceil_div(static_cast<int64_t>(N), images);
  if (tiles * image_groups * channel_blocks > INT32_MAX) throw std::runtime_error("depthwise convolution: too much for one launch");
  auto small = [](int64_t value) { return static_cast<int>(value); };
  return {small(groups), small(lanes),          small(strips_per_row), small(strips),      small(passes),
          small(tiles),  small(channel_blocks), small(images),         small(image_groups)};
}

// Where a thread stands in the cut.
struct Place {
  int group, lane, channel, tile, slot, first_image, last_image;
  bool active;
};

template <int V>
PYOPS_DEVICE Place place_of(const Cut& cut, const Dims& d) {
  Place me;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  me.group = thread % cut.groups, me.lane = thread / cut.groups;
  me.channel = (block % cut.channel_blocks * cut.groups + me.group) * V;
  me.slot = block / cut.channel_blocks;
  me.tile = me.slot % cut.tiles;
  me.first_image = me.slot / cut.tiles * cut.images;
  me.last_image = me.first_image + cut.images < d.N ? me.first_image + cut.images : d.N;
  me.active = me.lane < cut.lanes && me.channel < d.C;
  return me;
}

// ------------------------------------------------------------------------------------------------ filters in shared memory

// [tap][quarter of the vector][group][4]: neighbouring threads read neighbouring 16 bytes.
template <int V>
PYOPS_DEVICE int filter_index(int tap, int group, int v, int groups) {
  constexpr int kPart = V < 4 ? V : 4;
  return ((tap * (V / kPart) + v / kPart) * groups + group) * kPart + v % kPart;
}

template <int V>
PYOPS_DEVICE void load_filter(const float* filter, int tap, int group, int groups, float (&to)[V]) {
  if constexpr (V >= 4) {
    PYOPS_UNROLL
    for (int v = 0; v < V; v += 4) {
      const float4 part = *reinterpret_cast<const float4*>(filter + filter_index<V>(tap, group, v, groups));
      to[v] = part.x, to[v + 1] = part.y, to[v + 2] = part.z, to[v + 3] = part.w;
    }
  } else {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) to[v] = filter[filter_index<V>(tap, group, v, groups)];
  }
}

// The block copies rows first .. first + rows of its channels' [C, pitch] into `filter`, in float; no source: zeros. Neighbouring
// threads take neighbouring channels: no bank conflicts, and the next tap finds the lines in L1.
template <class T, int V>
PYOPS_DEVICE void stage_filter(const void* source, bool is_float, int pitch, int first, int rows, int groups, int channel0, int C,
                               float* filter) {
  const int channels = groups * V;
  for (int i = static_cast<int>(threadIdx.x); i < channels * rows; i += static_cast<int>(blockDim.x)) {
    const int row = i / channels, c = i % channels;
    float value = 0.f;
    if (source && channel0 + c < C) {
      const int64_t at = static_cast<int64_t>(channel0 + c) * pitch + first + row;
      value = is_float ? static_cast<const float*>(source)[at] : to_float(static_cast<const T*>(source)[at]);
    }
    filter[filter_index<V>(row, c / V, c % V, groups)] = value;
  }
}

// --------------------------------------------------------------------------------------------------------- sums over a block

// out[row * pitch + channel] = the sum over the block's lanes of sum[row], rows x channels by as many threads; in lane order.
// Every thread of the block calls it. room: rows * lanes * groups * V floats.
template <int V, int kRows>
PYOPS_DEVICE void sum_lanes(const float (&sum)[kRows][V], const Place& me, const Cut& cut, int C, int rows, float* room, float* out,
                            int64_t pitch, float divisor) {
  const int channels = cut.groups * V, channel0 = me.channel - me.group * V;
  __syncthreads();  // whoever read what was here before has
  if (me.lane < cut.lanes) {
    PYOPS_UNROLL
    for (int row = 0; row < kRows; ++row) {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) room[(row * cut.lanes + me.lane) * channels + me.group * V + v] = me.active ? sum[row][v] : 0.f;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * channels; i += static_cast<int>(blockDim.x)) {
    const int row = i / channels, c = i % channels;
    if (channel0 + c >= C) continue;
    Sum over;
    for (int lane = 0; lane < cut.lanes; ++lane) over.add(room[(row * cut.lanes + lane) * channels + c]);
    out[row * pitch + channel0 + c] = over.total / divisor;
  }
}

// means [N, C] = sums [N, tiles, C] summed over tiles in order, divided by `positions`.
void merge_means(const float* sums, float* means, int64_t N, int64_t C, int tiles, float positions, cudaStream_t stream);

}  // namespace pyops::conv
