// How a dense convolution, or its transpose, gathers the input of a tile: axes, phases, taps, asynchronous copies.
//
//   input [N, H, W, C] (positions input_stride apart), packed weight [O, weight_pitch], output [N, OH, OW, O]
//
// Along one axis the output positions p * out_step + first of a phase read, by their tap j, input position p * in_step + base +
// j * tap_step. A convolution is one phase with in_step = stride. Of its transpose each residue of the output position by the stride is a
// phase of its own, with its own taps and in_step 1: no product with a hole is ever computed. Filter rows are packed so that the taps of
// a phase are neighbours: K = taps * depth of a phase is one run of memory, depth channels a tap.
//
// With pool the rows of a tile follow each other window by window: four neighbours are the positions of one 2x2 window. What is left of
// an odd number of rows or columns is not computed.
//
// K passes through shared memory in steps of 64 bytes a row; a thread's piece of 16 bytes belongs to some tap and channel of K, the
// same for its rows, and walks on by a step at a time without a division. Where channels come in whole pieces they go by cp.async, with
// zeros outside the image. Else (stems, odd channels) a piece is gathered element by element, through registers; there the taps
// of K follow each other without a gap, so that a stem of 3 channels wastes no product.
#pragma once
#include "pointwise_epilogue.cuh"

namespace pyops::conv {

constexpr int kDenseStages = 4;

template <int kM>
constexpr int kDenseStageBytes = (kM + kTileO) * kRowBytes;

template <int kM>
constexpr size_t dense_shared_bytes() {
  constexpr size_t stages = kDenseStages * kDenseStageBytes<kM>, sums = sizeof(float) * (kM * kSumsPitch + 2 * kTileThreads<kM>);
  return stages > sums ? stages : sums;
}

struct Axis {
  int in, out;  // positions
  int taps;
  int out_step, in_step, tap_step;
  int offset, dilation;  // of the transposed; a convolution has offset = -padding
  int residues;          // taps j, j + residues, ... belong to one phase
};

// Where the taps of residue r begin, and how many there are, when taps are sorted by residue.
PYOPS_HOST_DEVICE inline int taps_before(const Axis& a, int r) {
  const int rest = a.taps % a.residues;
  return r * (a.taps / a.residues) + (r < rest ? r : rest);
}
PYOPS_HOST_DEVICE inline int taps_of(const Axis& a, int r) { return a.taps / a.residues + (r < a.taps % a.residues ? 1 : 0); }

struct AxisPhase {
  int first, count;  // output positions
  int base;
  int tap, taps;  // in sorted order
};

// Phase i of out_step. Output position y takes tap k where out_step divides y + offset - dilation * k: for the i-th residue of taps
// that is y = dilation * i - offset; where stride and dilation share a divisor, the phases in between have no taps at all.
PYOPS_DEVICE AxisPhase phase_of(const Axis& a, int i) {
  AxisPhase phase;
  const int residue = i % a.residues, gap = i / a.residues, wanted = a.dilation * residue - a.offset;
  phase.first = ((wanted + gap) % a.out_step + a.out_step) % a.out_step;
  phase.count = phase.first < a.out ? (a.out - phase.first - 1) / a.out_step + 1 : 0;
  phase.base = gap ? 0 : (phase.first - wanted) / a.out_step;
  phase.tap = taps_before(a, residue), phase.taps = gap ? 0 : taps_of(a, residue);
  return phase;
}

struct DenseParams {
  const void *input, *weight, *residual;
  const float* bias;
  void* output;
  float* partials;  // moments [slots, 2, O], or null
  int64_t input_stride, residual_stride, output_stride, weight_pitch;
  Axis y, x;
  int N, C, O, groups;        // C, O: of a group
  int depth;                  // of K, a tap: C, or more where a phase must begin at a whole piece
  int tiles, o_tiles, slots;  // tiles a block takes; blocks side by side in a group; blocks below one another
  Activation activation;
  float slope;
  bool residual_last, output_vectors;
  Pool pool;
};

// What a block computes.
struct DenseBlock {
  static constexpr bool kHoles = false;  // rows of a tile that are no position, but those behind the last
  AxisPhase y, x;
  int group, o0, end, slot;  // output channels from o0 on, up to `end` at most
  int positions, K;          // of the phase
  int64_t k0;                // where its taps begin in a row of weight

  PYOPS_DEVICE explicit DenseBlock(const DenseParams& p) {
    int block = static_cast<int>(blockIdx.x);
    o0 = block % p.o_tiles * kTileO, block /= p.o_tiles;
    group = block % p.groups, block /= p.groups;
    slot = block % p.slots, block /= p.slots;
    o0 += group * p.O, end = (group + 1) * p.O;
    x = phase_of(p.x, block % p.x.out_step), y = phase_of(p.y, block / p.x.out_step);
    if (p.pool != Pool::none) y.count &= ~1, x.count &= ~1;
    positions = p.N * y.count * x.count;
    K = y.taps * x.taps * p.depth;
    k0 = (static_cast<int64_t>(y.tap) * p.x.taps + y.taps * x.tap) * p.depth;
  }
  PYOPS_DEVICE bool one_phase(const DenseParams& p) const { return p.y.out_step == 1 && p.x.out_step == 1; }
  // The phase's m-th position row by row.
  PYOPS_DEVICE int in_rows(const DenseParams& p, int m) const {
    if (p.pool == Pool::none) return m;
    const int within = m % (2 * x.count);  // of two rows
    return m - within + within % 4 / 2 * x.count + within / 4 * 2 + within % 2;
  }
  // The output position of the phase's m-th, before it is pooled.
  PYOPS_DEVICE int place(const DenseParams& p, int m) const {
    if (one_phase(p) && p.pool == Pool::none) return m;
    m = in_rows(p, m);
    const int n = m / (y.count * x.count), within = m % (y.count * x.count);
    const int row = within / x.count * p.y.out_step + y.first, column = within % x.count * p.x.out_step + x.first;
    return (n * p.y.out + row) * p.x.out + column;
  }
  // The pooled output position whose window begins with the phase's m-th.
  PYOPS_DEVICE int pooled_place(const DenseParams&, int m) const { return m / 4; }
};

// An element of K: tap (jy, jx) of the phase, and one of its channels.
struct TapCursor {
  int c, jx, jy;

  PYOPS_DEVICE static TapCursor at(int k, int depth, int columns) {
    const int tap = k / depth, width = columns < 1 ? 1 : columns;
    return {k % depth, tap % width, tap / width};
  }
  // `step` elements farther, itself given as a cursor.
  PYOPS_DEVICE void advance(const TapCursor& step, int depth, int columns) {
    c += step.c, jx += step.jx, jy += step.jy;
    if (c >= depth) c -= depth, ++jx;
    if (jx >= columns) jx -= columns, ++jy;
  }
};

// A thread's share of a step of the input: piece threadIdx % 4 of R rows. load() takes the steps one after another.
template <class T, int kM, bool kVectors>
struct DenseInput {
  static constexpr int V = kPiece<T>, R = kM * kStepPieces / kTileThreads<kM>, kApart = kTileThreads<kM> / kStepPieces;
  static constexpr int kNowhere = -(1 << 30);  // no tap reaches the image from there
  int y0[R], x0[R], image[R];                  // input positions of tap 0, and of the image's first
  TapCursor cursor, step;
  uint4 raw[R];

  PYOPS_DEVICE DenseInput(const DenseParams& p, const DenseBlock& block, int m0) {
    const int row = static_cast<int>(threadIdx.x) / kStepPieces, piece = static_cast<int>(threadIdx.x) % kStepPieces;
    cursor = TapCursor::at(piece * V, p.depth, block.x.taps), step = TapCursor::at(kStep<T>, p.depth, block.x.taps);
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const int m = block.in_rows(p, m0 + row + r * kApart), plane = block.y.count * block.x.count, within = m % plane;
      y0[r] = m < block.positions ? within / block.x.count * p.y.in_step + block.y.base : kNowhere;
      x0[r] = within % block.x.count * p.x.in_step + block.x.base;
      image[r] = m / plane * p.y.in * p.x.in;
    }
  }

  // Where channel `c` of a tap is read for row r; null outside the image.
  PYOPS_DEVICE const T* source(const DenseParams& p, int channel0, const TapCursor& at, int r) const {
    const int y = y0[r] + at.jy * p.y.tap_step, x = x0[r] + at.jx * p.x.tap_step;
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(p.y.in) || static_cast<unsigned>(x) >= static_cast<unsigned>(p.x.in))
      return nullptr;
    return static_cast<const T*>(p.input) + static_cast<int64_t>(image[r] + y * p.x.in + x) * p.input_stride + channel0 + at.c;
  }

  PYOPS_DEVICE void load(const DenseParams& p, const DenseBlock& block, unsigned char* tile) {
    const int channel0 = block.group * p.C;
    if constexpr (kVectors) {
      unsigned char* const to =
          tile + static_cast<int>(threadIdx.x) / kStepPieces * kRowBytes + static_cast<int>(threadIdx.x) % kStepPieces * 16;
      PYOPS_UNROLL
      for (int r = 0; r < R; ++r) {
        const T* const from = cursor.jy < block.y.taps ? source(p, channel0, cursor, r) : nullptr;
        ptx::cp_async_16_or_zero(to + r * kApart * kRowBytes, from ? from : p.input, from != nullptr);
      }
    } else {
      Piece<T> value[R];
      TapCursor at = cursor;
      PYOPS_UNROLL
      for (int r = 0; r < R; ++r) value[r].raw = uint4{0, 0, 0, 0};
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) {
        PYOPS_UNROLL
        for (int r = 0; r < R; ++r) {
          const T* const from = at.jy < block.y.taps && at.c < p.C ? source(p, channel0, at, r) : nullptr;
          if (from) value[r].element[v] = *from;
        }
        at.advance({1, 0, 0}, p.depth, block.x.taps);
      }
      PYOPS_UNROLL
      for (int r = 0; r < R; ++r) raw[r] = value[r].raw;
    }
    cursor.advance(step, p.depth, block.x.taps);
  }

  PYOPS_DEVICE void store(unsigned char* tile) const {
    unsigned char* const to =
        tile + static_cast<int>(threadIdx.x) / kStepPieces * kRowBytes + static_cast<int>(threadIdx.x) % kStepPieces * 16;
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) *reinterpret_cast<uint4*>(to + r * kApart * kRowBytes) = raw[r];
  }
};

// Starts the copy of a step of the weight's rows o0 .. o0 + 63; zeros where there are none.
template <class T, int kM, class Block>
PYOPS_DEVICE void copy_filters(const DenseParams& p, const Block& block, int step, unsigned char* tile) {
  constexpr int kApart = kTileThreads<kM> / kStepPieces;
  const int piece = static_cast<int>(threadIdx.x) % kStepPieces, k = step * kStep<T> + piece * kPiece<T>;
  PYOPS_UNROLL
  for (int row = static_cast<int>(threadIdx.x) / kStepPieces, turn = 0; turn < kTileO / kApart; ++turn, row += kApart) {
    const int o = block.o0 + row;
    const bool exists = o < block.end && k < block.K;
    const T* const from = static_cast<const T*>(p.weight) + (exists ? o * p.weight_pitch + block.k0 + k : 0);
    ptx::cp_async_16_or_zero(tile + row * kRowBytes + piece * 16, from, exists);
  }
}

// Stores V or fewer channels of a position.
template <class T>
PYOPS_DEVICE void store_some(bool vectors, T* to, int count, const float (&from)[kPiece<T>]) {
  if (vectors) return store_channels<T, kPiece<T>>(to, from);
  PYOPS_UNROLL
  for (int v = 0; v < kPiece<T>; ++v)
    if (v < count) to[v] = from_float<T>(from[v]);
}

// The end of a tile: output = activation(sums + bias + residual), or the residual after the activation. Threads share it as finish_tile's
// do. What is to be pooled goes back to where its sums were.
template <class T, int kM, class Block>
PYOPS_DEVICE void finish_dense(const DenseParams& p, const Block& block, int m0, float* tile) {
  constexpr int V = kPiece<T>, kColumns = kTileO / V, kApart = kTileThreads<kM> / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns * V, first = static_cast<int>(threadIdx.x) / kColumns;
  const int o = block.o0 + column, count = block.end - o < V ? block.end - o : V;
  if (count <= 0) return;
  float bias[V];
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) bias[v] = p.bias && v < count ? p.bias[o + v] : 0.f;
  PYOPS_NO_UNROLL
  for (int row = first; row < kM && m0 + row < block.positions; row += kApart) {
    const int m = block.place(p, m0 + row);
    if (Block::kHoles && m < 0) continue;
    float* const sums = tile + row * kSumsPitch + column;
    float y[V], skip[V];
    clear(skip);
    if (p.residual) load_some<T>(p.output_vectors, static_cast<const T*>(p.residual) + m * p.residual_stride + o, count, skip);
    PYOPS_UNROLL
    for (int v = 0; v < V; v += 4) {
      const float4 part = *reinterpret_cast<const float4*>(sums + v);
      y[v] = part.x, y[v + 1] = part.y, y[v + 2] = part.z, y[v + 3] = part.w;
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) y[v] += p.residual_last ? bias[v] : bias[v] + skip[v];
    activate<T, V>(p.activation, p.slope, y);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) y[v] += p.residual_last ? skip[v] : 0.f;
    const bool pools = p.pool != Pool::none;
    if (!pools) store_some(p.output_vectors, static_cast<T*>(p.output) + m * p.output_stride + o, count, y);
    if (p.partials || pools) {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) sums[v] = pools ? y[v] : to_float(from_float<T>(y[v]));
    }
  }
}

// The maximum or average of each four rows of a finished tile. Every thread of the block calls it, after a barrier.
template <class T, int kM, class Block>
PYOPS_DEVICE void store_pooled(const DenseParams& p, const Block& block, int m0, const float* tile) {
  constexpr int V = kPiece<T>, kColumns = kTileO / V, kApart = kTileThreads<kM> / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns * V, first = static_cast<int>(threadIdx.x) / kColumns;
  const int o = block.o0 + column, count = block.end - o < V ? block.end - o : V;
  if (count <= 0) return;
  PYOPS_NO_UNROLL
  for (int row = 4 * first; row < kM && m0 + row < block.positions; row += 4 * kApart) {
    const int m = block.pooled_place(p, m0 + row);
    if (Block::kHoles && m < 0) continue;
    float pooled[V];
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      const float* const at = tile + row * kSumsPitch + column + v;
      float highest = at[0], sum = at[0];
      PYOPS_UNROLL
      for (int i = 1; i < 4; ++i) {
        const float value = at[i * kSumsPitch];
        highest = is_above(value, highest) ? value : highest, sum += value;
      }
      pooled[v] = p.pool == Pool::maximum ? highest : 0.25f * sum;
    }
    store_some(p.output_vectors, static_cast<T*>(p.output) + m * p.output_stride + o, count, pooled);
  }
}

}  // namespace pyops::conv
