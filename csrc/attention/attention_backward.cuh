// What the two attention gradients on a GPU share: which warp has what, the products, rows into and out of shared memory.
//
// A block has the keys and values of one head in shared memory, each warp kWarpKeys of them, whose gradients are its sums in registers.
// Queries come kBlockRows at a time. Of the keys by 16 queries, in the layout of mma's sums, p and ds become left operands of the products
// that add to the gradients of values and keys without leaving the lane:
//
//   x [keys, 16] = K Q^T,  dp = V dO^T,  dV += p dO,  dK += ds Q
//
// ds also goes to shared memory, so that dQ [32, D] = ds^T K is complete at once: written once, nothing is added up in global memory.
#pragma once
#include <type_traits>

#include "../common/launch.cuh"
#include "attention_rows.cuh"

namespace pyops::attention {

constexpr int kBlockRows = 32, kRowSteps = kBlockRows / 16;
// Pieces of 16 bytes of a tile's row, an odd number: eight rows' are in different banks, and where they are is known without a register.
template <int kD>
constexpr int kChunks = kD / 8 + 1;
constexpr int kRowChunks = kChunks<kBlockRows>;

// By the most elements of a head: the gradients of 32 keys x 64 or of 16 keys x 128 are half of a lane's registers.
template <int kD>
constexpr int kKeyTiles = kD <= 64 ? 2 : 1;
template <int kD>
constexpr int kWarpKeys = 16 * kKeyTiles<kD>;
template <int kD>
constexpr int kBackwardWarps = kD <= 32 ? 12 : 8;  // at most; 168 and 255 registers a thread then
template <int kD>
constexpr int kMostKeys = kBackwardWarps<kD> * kWarpKeys<kD>;

using KeyScores = float[2][4];  // of 16 keys and queries, [half]: key g + 8*(e/2), query 8*half + 2t + e%2
template <int kD>
using KeySums = float[kKeyTiles<kD>][kD / 8][4];
template <int kD>
using KeyOperand = uint32_t[kKeyTiles<kD>][4];

// The lane's number, unknown to the compiler before: the addresses that follow from it are not to occupy registers all along.
PYOPS_DEVICE int fresh_lane() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return __shfl_sync(0xffffffffu, lane, lane);
}

// The same of a number that a warp's lanes share.
PYOPS_DEVICE int fresh(int shared_by_all) { return __shfl_sync(0xffffffffu, shared_by_all, 0); }

template <int kD>
PYOPS_DEVICE void clear(KeySums<kD>& sums) {
  PYOPS_UNROLL
  for (int i = 0; i < kKeyTiles<kD> * (kD / 8) * 4; ++i) sums[i / (kD / 2)][i / 4 % (kD / 8)][i % 4] = 0.f;
}

// 16 keys (from row `key` of their tile) times 16 rows.
template <class T, int kD>
PYOPS_DEVICE void keys_by_rows(const Blocks& keys, int key, const Blocks& rows, int row, KeyScores& sum) {
  PYOPS_UNROLL
  for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = 0.f;
  PYOPS_UNROLL
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(b, rows.at(row, step));
    ptx::ldmatrix_x4(a, keys.at(key, step));
    multiply<T>(sum[0], a, b[0], b[1]);
    multiply<T>(sum[1], a, b[2], b[3]);
  }
}

// sum += a times 16 rows.
template <class T, int kD>
PYOPS_DEVICE void add_rows(const KeyOperand<kD>& a, const Blocks& rows, int row, KeySums<kD>& sum) {
  PYOPS_UNROLL
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, rows.at(row, step));
    PYOPS_UNROLL
    for (int tile = 0; tile < kKeyTiles<kD>; ++tile) {
      multiply<T>(sum[tile][2 * step], a[tile], b[0], b[1]);
      multiply<T>(sum[tile][2 * step + 1], a[tile], b[2], b[3]);
    }
  }
}

// Rows [0, count) of D elements into a tile, zeros behind them up to `padded` rows. Wait for asynchronous copies, then for all threads.
template <class T, int kD>
PYOPS_DEVICE void copy_rows(const Tile& tile, const Rows<T>& rows, int count, int padded, int D) {
  constexpr int kPieces = kD / 8;
  PYOPS_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < padded * kPieces; i += static_cast<int>(blockDim.x)) {
    const int row = i / kPieces, chunk = i % kPieces;
    uint4* const to = tile.at(row, chunk);
    const T* const from = row < count ? rows.at(row) : nullptr;
    if (from && rows.width == 8) {
      ptx::cp_async_16_or_zero(to, from + (8 * chunk < D ? 8 * chunk : 0), 8 * chunk < D);
      continue;
    }
    PYOPS_NO_UNROLL  // as it is rare, in few instructions
        for (int column = 8 * chunk; column < 8 * chunk + 8; ++column) {
      T value{};
      if (row < count && column < D && from) value = from[column];
      else if (row < count && column < D && rows.beyond) value = from_float<T>(rows.beyond[column]);
      reinterpret_cast<T*>(to)[column % 8] = value;
    }
  }
}

// A pair of neighbouring results into a tile.
template <class T>
PYOPS_DEVICE void put_pair(const Tile& tile, int row, int column, float low, float high) {
  reinterpret_cast<uint32_t*>(tile.at(row, column / 8))[column % 8 / 2] = pack<T>(low, high);
}

// The warp's ds of 16 rows into their tile [keys, kBlockRows].
template <int kD>
PYOPS_DEVICE void put_scores(const Tile& to, int key, int row, const KeyOperand<kD>& ds) {
  const int lane = fresh_lane(), g = lane / 4, t = lane % 4;
  PYOPS_UNROLL
  for (int tile = 0; tile < kKeyTiles<kD>; ++tile) PYOPS_UNROLL
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(to.at(key + 16 * tile + g + 8 * (i % 2), row / 8 + i / 2))[t] = ds[tile][i];
}

// What the passes over a sequence's keys leave of its queries' gradients.
struct Partial {
  float* sums;  // [rows of the block, kD]; null where there is one pass
  bool first, last;
};

// The queries' gradients of a block, times `scale`, into a tile from `to_row` on: a warp has 16 rows x 16 columns at a time.
template <class T, int kD>
PYOPS_DEVICE void query_gradients(const Blocks& ds, const Blocks& keys, int m, int rows, int D, float scale, const Tile& to, int to_row,
                                  const Partial& partial) {
  const int lane = fresh_lane(), warps = static_cast<int>(blockDim.x) / kWarpSize;
  PYOPS_NO_UNROLL
  for (int unit = static_cast<int>(threadIdx.x) / kWarpSize; unit < kRowSteps * (kD / 16); unit += warps) {
    const int block = unit / (kD / 16), step = unit % (kD / 16);
    if (16 * block >= rows || 16 * step >= D) continue;
    float sum[2][4] = {};
    for (int key = 0; key < m; key += 16) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4_trans(a, ds.at(key, block));
      ptx::ldmatrix_x4_trans(b, keys.at(key, step));
      multiply<T>(sum[0], a, b[0], b[1]);
      multiply<T>(sum[1], a, b[2], b[3]);
    }
    PYOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * block + lane / 4 + 8 * (i % 2), column = 16 * step + 8 * (i / 2) + lane % 4 * 2;
      float2 pair{sum[i / 2][i % 2 * 2] * scale, sum[i / 2][i % 2 * 2 + 1] * scale};
      if (partial.sums) {
        float2& kept = *reinterpret_cast<float2*>(partial.sums + row * kD + column);
        if (!partial.first) pair = {pair.x + kept.x, pair.y + kept.y};
        if (!partial.last) kept = pair;
      }
      put_pair<T>(to, to_row + row, column, pair.x, pair.y);
    }
  }
}

// The warp's sums, times `scale`, into its rows of a tile.
template <class T, int kD>
PYOPS_DEVICE void put_sums(const Tile& to, int key, const KeySums<kD>& sums, float scale) {
  const int lane = fresh_lane();
  PYOPS_UNROLL
  for (int tile = 0; tile < kKeyTiles<kD>; ++tile) PYOPS_UNROLL
  for (int i = 0; i < kD / 4; ++i) {
    const float* const pair = &sums[tile][i / 2][i % 2 * 2];
    put_pair<T>(to, key + 16 * tile + lane / 4 + 8 * (i % 2), i / 2 * 8 + lane % 4 * 2, pair[0] * scale, pair[1] * scale);
  }
}

// Which of the lane's scores of 16 keys and queries dropout keeps: bit 4 * half + e. The lanes of keys 4k .. 4k + 3 need the same blocks
// of random words: each computes those of one of the four queries.
PYOPS_DEVICE uint32_t kept_scores(const Dropout& o, uint64_t seed, int sequence, int head, int key, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, t = lane % 4, word = lane / 4 % 4;
  const uint32_t own = static_cast<uint32_t>(row + 8 * (word / 2) + 2 * t + word % 2);
  uint32_t bits = 0, kept = 0;  // bits: of keys 4k .. 4k + 3, then of those eight further
  PYOPS_NO_UNROLL
  for (int far = 0; far < 2; ++far) {
    const uint32_t group = static_cast<uint32_t>(key) / 4 + lane / 16 + 2 * far;
    const uint4 words = philox(seed, group, own, static_cast<uint32_t>(head), static_cast<uint32_t>(sequence));
    bits |= ((words.x >= o.threshold ? 1u : 0u) | (words.y >= o.threshold ? 2u : 0u) | (words.z >= o.threshold ? 4u : 0u) |
             (words.w >= o.threshold ? 8u : 0u))
            << (4 * far);
  }
  PYOPS_UNROLL
  for (int query = 0; query < 4; ++query) {
    const uint32_t theirs = __shfl_sync(0xffffffffu, bits, (lane & ~12) | query << 2) >> word;
    kept |= (theirs & 1u) << (4 * (query / 2) + query % 2) | (theirs >> 4 & 1u) << (4 * (query / 2) + 2 + query % 2);
  }
  return kept;
}

// ------------------------------------------------------------------------------------------------- a launch, and rows to memory

struct SequenceGradients {
  Layout grad, grad_query, grad_key, grad_value;
  const float* grad_lse;  // [B, H, N] or null
};

struct WindowGradients {
  const void* grad;  // [B, H, W, C]
  void* grad_qkv;    // [B, H, W, 3C]
  float* logits;     // partial sums [slots, heads] or null
  float* beyond;     // of the tokens beyond the map [slots, 3C] or null
};

constexpr int kSharedSide = 64, kSharedPitch = kSharedSide + 8;  // sums in shared memory; the pitch keeps lanes' pairs in different banks

// Where in shared memory a block keeps what, in bytes: what has a place of its own whatever the sizes, so that addresses are known, ...
template <int kD, bool kWindows>
struct FixedRoom {
  static constexpr int kRow = kChunks<kD> * 16, kStages = 2 * kBlockRows * kRow, kFloats = kBlockRows * 4;
  static constexpr int kQuery = 0, kGrad = kStages, kOutput = 2 * kStages;  // tiles of two blocks of rows each
  static constexpr int kLse = (kWindows ? 2 : 3) * kStages, kLess = kLse + kFloats, kDelta = kLess + kFloats;
  static constexpr int kShares = kDelta + kFloats, kKey = kShares + (kWindows ? kBackwardWarps<kD> * kFloats : 0);  // of delta, a warp's
};
// ... and what has not.
struct BackwardRoom {
  int value, ds;               // tiles [keys, kD], [keys, kBlockRows]
  int beyond, sums, own, end;  // of windows [warps, 2, kD] floats; own: theirs
};

template <class Source>
struct BackwardParams {
  Source in;
  std::conditional_t<Source::kWindows, WindowGradients, SequenceGradients> out;
  Dropout dropout;
  BackwardRoom room;
  int sequences, slots, key_heads, group, D;
  int keys;          // a block's, at a time
  int key_rows;      // a multiple of keys, at least a sequence's
  float* partial;    // of the queries' gradients [slots, heads, query_rows, kD], where keys take several passes; else null
  int query_rows;    // whole blocks of rows
  float* sums;       // of ds [copies, heads, key_rows, pitch], zeroed where not in shared memory; null: not wanted
  int copies;        // slots; or sequences, where each has its own
  int pitch;         // of a key's sums, at least the queries
  bool sums_shared;  // one head a block, and few keys and queries
};

template <int kD, class Source>
BackwardRoom backward_room(const BackwardParams<Source>& p) {
  using Fixed = FixedRoom<kD, Source::kWindows>;
  BackwardRoom room{};
  room.value = Fixed::kKey + p.keys * Fixed::kRow, room.ds = room.value + p.keys * Fixed::kRow;
  room.beyond = room.ds + p.keys * kRowChunks * 16;
  room.sums = room.beyond + (Source::kWindows ? p.keys / kWarpKeys<kD> * 2 * kD * 4 : 0);
  room.own = room.end = room.sums + (p.sums_shared ? kSharedSide * kSharedPitch * 4 : 0);
  if constexpr (Source::kWindows) room.end += p.in.shared_bytes();
  return room;
}

// From row `first` on.
template <class T>
PYOPS_DEVICE Rows<T> from_row(Rows<T> rows, int first) {
  if (rows.tokens) rows.tokens += first;
  else rows.data += first * rows.step;
  return rows;
}
PYOPS_DEVICE Tile from_row(Tile tile, int first) {  // a multiple of eight
  tile.pieces += first * tile.chunks;
  return tile;
}

// 1 / max(|row|, 1e-12), and what becomes of a gradient along the row: F.normalize's own.
constexpr float kLargestUnit = 1e12f;
template <class T>
PYOPS_DEVICE float unit_of(const Rows<T>& rows, int row, int D) {
  float squares = 0.f;
  for (int chunk = 0; 8 * chunk < D; ++chunk) {
    Piece<T> piece;
    piece.raw = load_piece(rows, row, chunk, D);
    PYOPS_UNROLL
    for (int v = 0; v < 8; ++v) squares += to_float(piece.element[v]) * to_float(piece.element[v]);
  }
  const float norm = sqrtf(squares);
  return norm > 1.f / kLargestUnit ? 1.f / norm : kLargestUnit;
}
// What scores' gradients are multiplied by, before the rows that they are multiplied with: a row without direction waits for its own.
PYOPS_DEVICE float unit_factor(float unit) { return unit < kLargestUnit ? unit : 1.f; }

// Gradients of rows [0, count) from a tile to memory. units: of rows that were made units, which stand in `from`; null: they were not.
// beyond: [kD] sums of what belongs to no row of the map, by the calling warp alone; null: dropped.
template <class T, int kD>
PYOPS_DEVICE void write_rows(const Tile& tile, const Rows<T>& to, int count, int padded, int D, int thread, int threads, const Tile& from,
                             const float* units, float* beyond) {
  constexpr int kPieces = kD / 8;
  PYOPS_NO_UNROLL
  for (int i = thread; i < padded * kPieces; i += threads) {
    const int row = i / kPieces, chunk = i % kPieces;
    Piece<T> piece;
    piece.raw = *tile.at(row, chunk);
    if (units) {
      Piece<T> source;
      source.raw = *from.at(row, chunk);
      float along = 0.f;
      PYOPS_UNROLL
      for (int v = 0; v < 8; ++v) along += to_float(piece.element[v]) * to_float(source.element[v]);
      for (int mask = kPieces / 2; mask > 0; mask /= 2) along += __shfl_xor_sync(0xffffffffu, along, mask);
      const float unit = row < count ? units[row] : 1.f;
      PYOPS_UNROLL
      for (int v = 0; v < 8; ++v) {
        const float own = to_float(piece.element[v]);
        piece.element[v] = from_float<T>(unit < kLargestUnit ? own - to_float(source.element[v]) * (unit * unit * along) : own * unit);
      }
    }
    if (row < count) store_piece(to, row, chunk, D, piece.raw);
    if (!beyond) continue;
    const bool outside = row < count && !to.at(row);
    if (!__any_sync(0xffffffffu, outside)) continue;
    PYOPS_UNROLL
    for (int v = 0; v < 8; ++v) {
      float value = outside ? to_float(piece.element[v]) : 0.f;
      for (int mask = kPieces; mask < kWarpSize; mask *= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
      if (thread % kWarpSize < kPieces) beyond[8 * chunk + v] += value;
    }
  }
}

}  // namespace pyops::attention
