// Matrix product against blocks of 16 columns, [block][K][16], any one to four of them at a time: members of a team take odd shares of
// the blocks, which 64-column panels could not give them. Rows are read and written through pointers: pixels of a feature map on one
// side, positions of a padded ring on the other.
//
//   out[r][block * out_block + c] (+)= sum_k a[r][k] * w[block][k][c]
//
// Interleaved rows lie [k][rows of the tile], a lane of 32 bits each: one stream of memory in place of six is 15 % faster (2 cores of
// Sapphire Rapids), where something writes them so. They go by 8 x 3, which is faster by 6 % than 6 x 4.
//
// Tile: 6 rows x 4 vectors, 8 x 3 (24 sums in 32 registers), 8 x 2, 8 x 1; 6 x 2 in 16 registers. Depth is cut into slices of kDepth
// lanes that are summed apart (panel_gemm.h says why); within a slice, four blocks of weights take 16 KiB and stay in L1.
#pragma once
#include "../common/panel_gemm.h"

namespace pyops::conv::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

constexpr int64_t kDepth = 384;
constexpr int kMaxBlocks = 4;

template <int R, int NV, bool kInterleaved, class E>
[[gnu::noinline]] void block_tile(const E* const* a, const float* weights, int64_t block_stride, int64_t k0, int64_t k1, float* const* out,
                                  int64_t out_block, bool add) {
  const float* w[NV];
  const E* rows[R];
  vf acc[R][NV];
  for (int v = 0; v < NV; ++v) w[v] = weights + v * kF / 16 * block_stride + v * kF % 16;
  for (int r = 0; r < R; ++r) {
    rows[r] = a[r];
    for (int v = 0; v < NV; ++v) {
      acc[r][v] = vf{};
      __builtin_prefetch(out[r] + v * kF / 16 * out_block + v * kF % 16, 1);
    }
  }
  constexpr int64_t step = kInterleaved ? R : 1;
  for (int64_t k = k0; k < k1; ++k) {
    vf b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load(w[v] + k * 16);
    for (int r = 0; r < R; ++r) {
#if defined(__AVX512BF16__)
      if constexpr (sizeof(E) == 2) {
        int32_t pair;
        __builtin_memcpy(&pair, rows[r] + 2 * k * step, 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, reinterpret_cast<__m512bh>(b[v]));
        continue;
      }
#endif
      if constexpr (sizeof(E) == 4) {
        const vf x = splat<float>(rows[r][k * step]);
        for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) {
      float* o = out[r] + v * kF / 16 * out_block + v * kF % 16;
      store(o, add ? load(o) + acc[r][v] : acc[r][v]);
    }
}

template <int NV, bool kInterleaved, class E>
void block_rows_of(int rows, const E* const* a, const float* w, int64_t block_stride, int64_t k0, int64_t k1, float* const* out,
                   int64_t out_block, bool add) {
  switch (rows) {
    case 1: return block_tile<1, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 2: return block_tile<2, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 3: return block_tile<3, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 4: return block_tile<4, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 5: return block_tile<5, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 6: return block_tile<6, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
    case 7:
      if constexpr (kMaxVectors == 4 && NV <= 3) return block_tile<7, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
      break;
    case 8:
      if constexpr (kMaxVectors == 4 && NV <= 3) return block_tile<8, NV, kInterleaved>(a, w, block_stride, k0, k1, out, out_block, add);
  }
}
// Rows of a tile of `blocks` blocks.
inline int tile_rows(int blocks) { return kMaxVectors == 4 && kF == 16 && blocks <= 3 ? 8 : 6; }

// At most tile_rows(blocks) rows, lanes k0 to k1.
template <bool kInterleaved = false, class E>
inline void gemm_tile(int rows, int blocks, const E* const* a, const float* w, int64_t block_stride, int64_t k0, int64_t k1,
                      float* const* out, int64_t out_block, bool add) {
  if constexpr (kF == 16) {
    switch (blocks) {
      case 1: return block_rows_of<1, kInterleaved>(rows, a, w, block_stride, k0, k1, out, out_block, add);
      case 2: return block_rows_of<2, kInterleaved>(rows, a, w, block_stride, k0, k1, out, out_block, add);
      case 3: return block_rows_of<3, kInterleaved>(rows, a, w, block_stride, k0, k1, out, out_block, add);
      default: return block_rows_of<4, kInterleaved>(rows, a, w, block_stride, k0, k1, out, out_block, add);
    }
  } else {
    float* shifted[6];
    for (int block = 0; block < blocks; ++block)
      for (int v = 0; v < 16; v += 2 * kF) {
        for (int r = 0; r < rows; ++r) shifted[r] = out[r] + block * out_block + v;
        block_rows_of<2, kInterleaved>(rows, a, w + block * block_stride + v, block_stride, k0, k1, shifted, out_block, add);
      }
  }
}

// ------------------------------------------------------------------------------------------------ interleaved rows

// Rows of a tile of interleaved rows, and the most blocks that go with them.
constexpr int kInterleavedRows = kF == 16 ? 8 : 6, kInterleavedBlocks = 3;

// [lanes][n] from n <= kInterleavedRows rows. Eight rows: three perfect shuffles of all vectors, as many as their number has bits.
inline void interleave_rows(const float* const* rows, int n, int64_t lanes, float* to) {
  int64_t k = 0;
  if constexpr (kInterleavedRows == 8) {
    using Lanes = std::make_integer_sequence<int, kF>;
    for (; n == 8 && k + kF <= lanes; k += kF, to += kF * 8) {
      vf v[8];
      for (int r = 0; r < 8; ++r) v[r] = load(rows[r] + k);
#pragma GCC unroll 3
      for (int stage = 0; stage < 3; ++stage) {
        vf t[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          t[2 * i] = interleave<0>(v[i], v[i + 4], Lanes{});
          t[2 * i + 1] = interleave<1>(v[i], v[i + 4], Lanes{});
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) v[i] = t[i];
      }
      for (int r = 0; r < 8; ++r) store(to + r * kF, v[r]);
    }
  }
  for (; k < lanes; ++k, to += n)
    for (int r = 0; r < n; ++r) __builtin_memcpy(to + r, rows[r] + k, sizeof(float));
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
