// What attention's GPU kernels share: rows of 16-bit elements in shared memory, operands of m16n8k16 products from there, the scores of
// a problem (one head of a sequence, or of a window) and dropout's random numbers.
//
// A lane 4*g + t of a warp holds of a 16x8 tile of scores (ptx.cuh, C) queries g and g + 8 and keys 2t and 2t + 1: x[0], x[1], then x[2],
// x[3]. A kernel that has keys for rows and queries for columns says so: kTransposed.
#pragma once
#include "../common/convert.cuh"
#include "../common/philox.cuh"
#include "attention.h"

namespace pyops::attention {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// ------------------------------------------------------------------------------------------------------------- within a quad

PYOPS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
PYOPS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Lane t's w[b] becomes lane b's w[t]: between 8 neighbouring columns a lane, as in memory, and 2 of each of 4 tiles, as in products.
PYOPS_DEVICE void quad_transpose(uint32_t (&w)[4]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  PYOPS_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (t & bit) != 0;
    PYOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t &low = w[bit == 1 ? 2 * i : i], &high = w[bit == 1 ? 2 * i + 1 : i + 2];
      const uint32_t came = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
      (upper ? low : high) = came;
    }
  }
}

template <class T>
PYOPS_DEVICE uint32_t pack(float low, float high) {
  return ptx::floats_to_pair(T{}, low, high);
}

// --------------------------------------------------------------------------------------------------------------- shared rows

// Rows of 8 * chunks elements. Neighbouring rows have their pieces of 16 bytes in different banks: chunk c of row r stands at place
// c ^ (r >> shift & mask) of its row, so that eight rows' chunks, which is what ldmatrix reads at once, fall into all banks.
struct Tile {
  uint4* pieces;
  int chunks, shift, mask;
  PYOPS_DEVICE uint4* at(int row, int chunk) const { return pieces + row * chunks + (chunk ^ (row >> shift & mask)); }
};

PYOPS_DEVICE Tile tile_of(void* shared, int chunks) {
  const int power = chunks & -chunks;  // chunks is even
  const int side = power < 8 ? power : 8;
  return {static_cast<uint4*>(shared), chunks, side == 8 ? 0 : side == 4 ? 1 : 2, side - 1};
}

// Where a lane reads 16x16 blocks of a tile for ldmatrix_x4.
struct Blocks {
  const uint4* row;  // the lane's of block (0, 0)
  int chunks, chunk, flip;
  PYOPS_DEVICE const uint4* at(int row0, int step) const { return row + row0 * chunks + ((2 * step + chunk) ^ flip); }
};

// by_rows: matrices (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1):
//   plain   r[0], r[1] and r[2], r[3]: right operands B[column of the tile, row] for rows 0-7 and 8-15, as of keys in query key^T
//   trans   the left operand A[column of the tile, row]
// by_columns: matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1):
//   plain   the left operand A[row, column of the tile]
//   trans   r[0], r[1] and r[2], r[3]: right operands B[row, column of the tile] for columns 0-7 and 8-15, as of values
PYOPS_DEVICE Blocks blocks(const Tile& tile, bool by_rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, first = lane >> 3 & 1, second = lane >> 4;
  const int row = (lane & 7) + 8 * (by_rows ? second : first);
  return {tile.pieces + row * tile.chunks, tile.chunks, by_rows ? first : second, (lane & 7) >> tile.shift & tile.mask};
}

template <class T>
PYOPS_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k16(T{}, sum, a[0], a[1], a[2], a[3], b0, b1);
}

// Two tiles of results as the left operand of a product over their 16 columns.
template <class T>
PYOPS_DEVICE void left_operand(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack<T>(low[0], low[1]), a[1] = pack<T>(low[2], low[3]);
  a[2] = pack<T>(high[0], high[1]), a[3] = pack<T>(high[2], high[3]);
}

// ---------------------------------------------------------------------------------------------------------------- the scores

struct ScoreOptions {
  float scale, softcap;         // 0: no cap
  int left, right;              // -1: all; at most kFar
  const void* bias;             // [sequences, H, N', M']
  int64_t bias_step[4];         // bytes, 0 along a dimension of one; the last at most 4
  int bias_rows, bias_columns;  // how many there are, INT32_MAX along a dimension of one
  BiasType bias_type;
  const float* slopes;  // [sequences, H] or null
  int64_t slopes_stride;
};
constexpr int kFar = 1 << 24;

// A head of a sequence with n rows and m columns, none beyond the bias'.
struct HeadScores {
  int64_t bias_at;  // of its (0, 0), bytes
  float slope;
  int n, m;
};

PYOPS_DEVICE HeadScores head_scores(const ScoreOptions& o, int sequence, int head, int n, int m) {
  const float slope = o.slopes ? o.slopes[sequence * o.slopes_stride + head] : 0.f;
  return {sequence * o.bias_step[0] + head * o.bias_step[1], slope, n, m};
}

// The keys [first, last) that query i sees.
PYOPS_DEVICE void visible(const ScoreOptions& o, const HeadScores& of, int i, int& first, int& last) {
  const int own = i + of.m - of.n;
  first = o.left < 0 || own < o.left ? 0 : own - o.left;
  last = o.right < 0 || own + o.right >= of.m ? of.m : own + o.right + 1;
}

// Products become scores as they are before any bias.
PYOPS_DEVICE void scale_and_cap(const ScoreOptions& o, float (&x)[4]) {
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e) x[e] *= o.scale;
  if (o.softcap == 0.f) return;
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e) x[e] = o.softcap * exact_tanh(x[e] / o.softcap);
}

struct Seen {  // an element of a boolean bias
  uint8_t is;
};
using pyops::to_float;
PYOPS_DEVICE float to_float(Seen seen) { return seen.is ? 0.f : kMinusInfinity; }

template <class U>
PYOPS_DEVICE void load_bias(const unsigned char* const (&at)[4], float (&bias)[4]) {
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e)
    if (at[e]) bias[e] = to_float(*reinterpret_cast<const U*>(at[e]));
}

// Slopes and bias for queries i and keys j of a tile. Queries beyond n and keys beyond m may be among them.
template <bool kTransposed = false>
PYOPS_DEVICE void add_biases(const ScoreOptions& o, const HeadScores& of, const int (&i)[2], const int (&j)[2], float (&x)[4]) {
  if (o.slopes) {
    PYOPS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int apart = i[kTransposed ? e % 2 : e / 2] + of.m - of.n - j[kTransposed ? e / 2 : e % 2];
      x[e] -= of.slope * static_cast<float>(apart < 0 ? -apart : apart);
    }
  }
  if (o.bias_type == BiasType::none) return;
  const unsigned char* at[4];
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int row = i[kTransposed ? e % 2 : e / 2], column = j[kTransposed ? e / 2 : e % 2];
    const unsigned char* const bias = static_cast<const unsigned char*>(o.bias) + of.bias_at + row * o.bias_step[2];
    at[e] = row < of.n && column < of.m ? bias + column * static_cast<int>(o.bias_step[3]) : nullptr;
  }
  float value[4] = {0.f, 0.f, 0.f, 0.f};
  switch (o.bias_type) {
    case BiasType::f32: load_bias<float>(at, value); break;
    case BiasType::bf16: load_bias<bf16>(at, value); break;
    case BiasType::f16: load_bias<f16>(at, value); break;
    default: load_bias<Seen>(at, value); break;
  }
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e) x[e] += value[e];
}

// ------------------------------------------------------------------------------------------------------------------- dropout

struct Dropout {
  const int64_t* seed;  // null: none
  uint32_t threshold;   // what a score's word must reach
  float scale;          // 1 / (1 - p)
};

// Which scores of the tile with queries row, row + 8 and keys column, column + 1 (the lane's own) stay: bit e for x[e]. The lanes of keys
// 4k .. 4k + 3 are neighbours and need the same two blocks: each computes one. All lanes of a warp must call.
PYOPS_DEVICE uint32_t kept(const Dropout& o, uint64_t seed, int sequence, int head, int row, int column) {
  const bool odd = (column & 2) != 0;
  const uint4 own = philox(seed, static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(row + (odd ? 8 : 0)), static_cast<uint32_t>(head),
                           static_cast<uint32_t>(sequence));
  const uint32_t low = __shfl_xor_sync(0xffffffffu, odd ? own.x : own.z, 1), high = __shfl_xor_sync(0xffffffffu, odd ? own.y : own.w, 1);
  const uint32_t words[4] = {odd ? low : own.x, odd ? high : own.y, odd ? own.z : low, odd ? own.w : high};
  uint32_t bits = 0;
  PYOPS_UNROLL
  for (int e = 0; e < 4; ++e)
    if (words[e] >= o.threshold) bits |= 1u << e;
  return bits;
}

}  // namespace pyops::attention
