// How the norms over channels are cut into blocks: each thread has K neighbouring channels of one position.
//
//   rows [N, P, C]: neighbouring threads have neighbouring channels;  planes [N, C, P]: neighbouring positions
//
// A block has `groups` pieces of K channels x `lanes` positions, so that what a neighbour reads as well comes from L1.
#pragma once
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "../conv/vectors.cuh"
#include "channel_norms_cuda.h"

namespace pyops::norm {

using conv::Sum;
using conv::vectors_fit;
using conv::with_type;

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;

struct NormCut {
  int groups, lanes, channel_blocks;
  bool rows;
  int64_t positions, P, C;
  int threads() const { return round_up(groups * lanes, kWarpSize); }
};

inline void check_positions(int64_t positions) {
  if (positions > INT32_MAX / 2) throw std::runtime_error("norms over channels on a GPU: up to 2^30 positions");
}

inline NormCut cut_norm(int64_t N, int64_t P, int64_t C, bool rows, int K) {
  check_positions(N * P);
  const int64_t pieces = ceil_div(C, int64_t{K}), most = rows ? kNormThreads : kNormThreads / kWarpSize;
  const int64_t channel_blocks = ceil_div(pieces, most), groups = ceil_div(pieces, channel_blocks);
  const int64_t lanes = rows ? kNormThreads / groups : kWarpSize;
  if (channel_blocks * ceil_div(N * P, lanes) > INT32_MAX) throw std::runtime_error("norms over channels: too much for one launch");
  return {static_cast<int>(groups), static_cast<int>(lanes), static_cast<int>(channel_blocks), rows, N * P, P, C};
}

inline LaunchShape norm_shape(const NormCut& cut) {
  const int64_t blocks = cut.channel_blocks * ceil_div(cut.positions, int64_t{cut.lanes});
  return {dim3(static_cast<unsigned>(blocks)), cut.threads(), 0};
}

// Where a thread stands: its first channel, that element's place in the image, and how far the next channel is.
struct NormPlace {
  int64_t channel, at, step;
  bool active;
};

template <int K>
PYOPS_DEVICE NormPlace norm_place(const NormCut& cut) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int group = cut.rows ? thread % cut.groups : thread / cut.lanes, lane = cut.rows ? thread / cut.groups : thread % cut.lanes;
  NormPlace me;
  me.channel = (static_cast<int64_t>(block % cut.channel_blocks) * cut.groups + group) * K;
  const int64_t position = static_cast<int64_t>(block / cut.channel_blocks) * cut.lanes + lane;
  me.active = group < cut.groups && lane < cut.lanes && me.channel < cut.C && position < cut.positions;
  if (cut.rows) {
    me.at = position * cut.C + me.channel, me.step = 1;
  } else {
    const int image = static_cast<int>(position) / static_cast<int>(cut.P), within = static_cast<int>(position) % static_cast<int>(cut.P);
    me.at = (image * cut.C + me.channel) * cut.P + within, me.step = cut.P;
  }
  return me;
}

// The sum over neighbouring lanes, a power of two of them.
PYOPS_DEVICE float group_sum(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// LayerNorm's sums [2, C] of grad*z and grad, from each position's mean and 1/deviation. In layer_norm_sums.cu.
size_t layer_norm_sums_workspace(const LayerNorm& p);
void layer_norm_sums(const LayerNorm& p, const float2* statistics, float* workspace, cudaStream_t stream);

}  // namespace pyops::norm
