// The end of the 1x1 convolution's tile: output = activation((sums + bias) * keep + residual), and moments of what was stored.
//
//   sums [kM, 64] floats in shared memory  ->  output [M, O], partials [slots, 2, O]
//
// A thread takes a vector of 16 bytes of output: one column of vectors, rows some way apart. With moments the stored values go back
// to where their sums were; then a thread takes a column of 32 rows, its mean and deviations from that, and one thread per column joins
// the groups of rows, and this tile to the block's earlier ones, by Chan's formula.
#pragma once
#include "pointwise.cuh"

namespace pyops::conv {

template <class T>
PYOPS_DEVICE void load_some(bool vectors, const T* from, int count, float (&to)[kPiece<T>]) {
  if (vectors) return load_channels<T, kPiece<T>>(from, to);
  PYOPS_UNROLL
  for (int v = 0; v < kPiece<T>; ++v) to[v] = v < count ? to_float(from[v]) : 0.f;
}

template <class T, int kM>
PYOPS_DEVICE void finish_tile(const PointwiseParams& p, int m0, int o0, float* tile) {
  constexpr int V = kPiece<T>, kColumns = kTileO / V, kApart = kTileThreads<kM> / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns * V, first = static_cast<int>(threadIdx.x) / kColumns;
  const int o = o0 + column, count = p.O - o < V ? p.O - o : V;
  if (count <= 0) return;
  float bias[V];
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) bias[v] = p.bias && v < count ? p.bias[o + v] : 0.f;
  PYOPS_NO_UNROLL
  for (int row = first; row < kM && m0 + row < p.M; row += kApart) {
    const int m = m0 + row;
    float* const sums = tile + row * kSumsPitch + column;
    const float keep = p.keep ? p.keep[m / p.P] : 1.f;
    float y[V], skip[V];
    clear(skip);
    if (p.residual) load_some<T>(p.output_vectors, static_cast<const T*>(p.residual) + m * p.residual_stride + o, count, skip);
    PYOPS_UNROLL
    for (int v = 0; v < V; v += 4) {
      const float4 part = *reinterpret_cast<const float4*>(sums + v);
      y[v] = part.x, y[v + 1] = part.y, y[v + 2] = part.z, y[v + 3] = part.w;
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) y[v] = (y[v] + bias[v]) * keep + skip[v];
    activate<T, V>(p.activation, p.slope, y);
    T* const output = static_cast<T*>(p.output) + m * p.output_stride + o;
    if (p.output_vectors) store_channels<T, V>(output, y);
    else {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v)
        if (v < count) output[v] = from_float<T>(y[v]);
    }
    if (p.partials) {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) sums[v] = to_float(from_float<T>(y[v]));
    }
  }
}

// Of one column of the block's tiles so far, in the thread of that column.
struct ColumnMoments {
  float count = 0.f, mean = 0.f, deviation = 0.f;

  PYOPS_DEVICE void add(float n, float other_mean, float other_deviation) {
    if (n == 0.f) return;
    const float next = count + n, apart = other_mean - mean;
    mean += apart * (n / next);
    deviation += other_deviation + apart * apart * (count * n / next);
    count = next;
  }
};

// Of positions m0 .. M - 1, as far as the tile goes. Every thread of the block calls it, after a barrier. room: two floats a thread.
template <int kM>
PYOPS_DEVICE void add_moments(int M, int m0, const float* tile, float* room, ColumnMoments& moments) {
  constexpr int kRows = 32, kGroups = kTileThreads<kM> / kTileO;
  static_assert(kRows * kGroups == kM, "the block's threads share the tile's rows");
  const int column = static_cast<int>(threadIdx.x) % kTileO, group = static_cast<int>(threadIdx.x) / kTileO;
  auto count_of = [&](int g) {
    const int left = M - m0 - g * kRows;
    return left < 0 ? 0 : left < kRows ? left : kRows;
  };
  const float* const at = tile + group * kRows * kSumsPitch + column;
  const int count = count_of(group);
  float sum = 0.f, deviation = 0.f;
  for (int row = 0; row < count; ++row) sum += at[row * kSumsPitch];
  const float mean = count ? sum / static_cast<float>(count) : 0.f;
  for (int row = 0; row < count; ++row) deviation += (at[row * kSumsPitch] - mean) * (at[row * kSumsPitch] - mean);
  room[2 * threadIdx.x] = mean, room[2 * threadIdx.x + 1] = deviation;
  __syncthreads();
  if (group > 0) return;
  for (int g = 0; g < kGroups; ++g) {
    const float* const theirs = room + 2 * (g * kTileO + column);
    moments.add(static_cast<float>(count_of(g)), theirs[0], theirs[1]);
  }
}

}  // namespace pyops::conv
