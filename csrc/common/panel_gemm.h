// Matrix product against packed panels, the one dense kernel of the CPU side.
//
//   out[r, c] (+)= sum_k a[r][k] * panel[k, c]        r < rows, c < COLS
//
// `a` is a list of row POINTERS: batch-first, reversed, variable-length and strided activations need no copy. A panel is
// [K][LD] with LD = 64 or 48 columns (bf16: [K/2][LD][2], the pair along K that vdpbf16ps multiplies; rows of A and
// of the panel are then zero-padded to even K). Every element is the same sequence of sums over k, whatever the tile it falls
// in: a row's result depends neither on the other rows nor on the number of threads.
//
// Tile: 6 rows x 64 columns (24 accumulators + 4 panel vectors of 32 zmm), 8 x 48 for three gates; 6 rows x 2 vectors on the 16-register
// sets. One 512-bit FMA a cycle is the flop floor; the panel streams from L2 at 4*64/(6*4) = 11 bytes a cycle of its 32.
#pragma once
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// What the GEMM multiplies (Elem) and accumulates (Real) for a storage type.
#if defined(__AVX512BF16__)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif
template <class S>
struct Gemm {
  using Elem = float;
  using Real = float;
};
template <>
struct Gemm<double> {
  using Elem = double;
  using Real = double;
};
#if defined(__AVX512BF16__)
template <>
struct Gemm<bf16> {
  using Elem = bf16;
  using Real = float;
};
#endif

template <class E>
constexpr int kPair = sizeof(E) == 2 ? 2 : 1;  // elements of K in one lane
template <class E>
using Lane = std::conditional_t<sizeof(E) == 8, double, float>;
template <class E>
inline int64_t lanes_of(int64_t K) {
  return (K + kPair<E> - 1) / kPair<E>;
}

#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
#elif defined(__aarch64__)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif

// Lanes of K summed before they are added to `out`: a sum of sums. One sequential sum over K = 512 has 1.5 times the error
// of an eager float32 GEMM, sums of 64 have 0.7 times and cost 1 % of the speed; short rows, where eager's error is small
// too, take shorter sums. The choice depends on K alone, so rows stay independent of the batch.
inline int64_t block_k(int64_t lanes) { return lanes <= 128 ? 16 : lanes < 256 ? 32 : 64; }

// Columns taken in one pass, and rows that keep every accumulator in a register.
template <class E, int COLS>
constexpr int kPassVectors = [] {
  int v = COLS / Simd<Lane<E>>::N;
  while (v > kMaxVectors) v = v % 2 ? v / 3 : v / 2;
  return v;
}();
template <class E, int COLS>
constexpr int kRows = kMaxVectors == 4 && kPassVectors<E, COLS> <= 3 ? 8 : 6;

template <int R, int NV, int LD, class E>
[[gnu::noinline]] void tile_kernel(const E* const* a, const E* panel, int64_t K, Lane<E>* out, int64_t ldo, bool accumulate) {
  using T = Lane<E>;
  constexpr int N = Simd<T>::N;
  const T* w = reinterpret_cast<const T*>(panel);
  const E* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a[r];
  const int64_t lanes = lanes_of<E>(K);
  const int64_t block = block_k(lanes);
  int64_t k = 0;
  do {
    Vec<T> acc[R][NV];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = Vec<T>{};
    for (const int64_t end = k + block < lanes ? k + block : lanes; k < end; ++k, w += LD) {
      Vec<T> b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load(w + v * N);
      for (int r = 0; r < R; ++r) {
#if defined(__AVX512BF16__)
        if constexpr (sizeof(E) == 2) {
          int32_t pair;
          __builtin_memcpy(&pair, rows[r] + 2 * k, 4);
          const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
          for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, reinterpret_cast<__m512bh>(b[v]));
          continue;
        }
#endif
        if constexpr (sizeof(E) != 2) {
          const Vec<T> x = splat<T>(rows[r][k]);
          for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        T* o = out + r * ldo + v * N;
        store(o, accumulate ? load(o) + acc[r][v] : acc[r][v]);
      }
    accumulate = true;
  } while (k < lanes);
}

// rows <= kRows<E, COLS>; LD: columns of the panel, COLS: those wanted, starting at `panel`.
template <int LD, int COLS, class E>
void panel_rows(int rows, const E* const* a, const E* panel, int64_t K, Lane<E>* out, int64_t ldo, bool accumulate = false) {
  constexpr int NV = kPassVectors<E, COLS>, step = NV * Simd<Lane<E>>::N;
  for (int c = 0; c < COLS; c += step) {
    const E* w = panel + c * kPair<E>;
    switch (rows) {
      case 1: tile_kernel<1, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      case 2: tile_kernel<2, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      case 3: tile_kernel<3, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      case 4: tile_kernel<4, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      case 5: tile_kernel<5, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      case 6: tile_kernel<6, NV, LD>(a, w, K, out + c, ldo, accumulate); break;
      default:
        if constexpr (kRows<E, COLS> == 8) {
          if (rows == 7) tile_kernel<7, NV, LD>(a, w, K, out + c, ldo, accumulate);
          else tile_kernel<8, NV, LD>(a, w, K, out + c, ldo, accumulate);
        }
    }
  }
}

// The next block of `left` rows, in even shares: 16 rows go as 6 + 5 + 5, not 6 + 6 + 4.
inline int block_rows(int64_t left, int most) {
  const int64_t blocks = (left + most - 1) / most;
  return static_cast<int>((left + blocks - 1) / blocks);
}

// --------------------------------------------------------------------------------------------------------- packing

// One vector of lanes from storage.
template <class E, class S>
inline Vec<Lane<E>> load_whole(const S* p) {
  if constexpr (sizeof(E) == 2) return load(reinterpret_cast<const float*>(p));
  else return load_as(p, E{});
}
// The same from element k of a row of `width` elements; zero beyond the row.
template <class E, class S>
inline Vec<Lane<E>> load_lanes(const S* row, int64_t k, int64_t width) {
  constexpr int count = Simd<Lane<E>>::N * kPair<E>;
  S tail[count] = {};
  if (k + count > width) {
    if (k < width) __builtin_memcpy(tail, row + k, (width - k) * sizeof(S));
    row = tail, k = 0;
  }
  return load_whole<E>(row + k);
}

// panel[k, c] = w[c][k] for k0 <= k < k1 and 16 columns c (k0 a multiple of 32): rows of a row-major matrix become columns.
// Null rows, which can only be the last ones, are zeros.
template <int LD, class E, class S>
void pack_rows(const S* const (&w)[16], int64_t k0, int64_t k1, int64_t width, E* panel) {
  using T = Lane<E>;
  constexpr int N = Simd<T>::N;
  T* to = reinterpret_cast<T*>(panel);
  const int64_t end = lanes_of<E>(k1);
  int64_t k = lanes_of<E>(k0);
  // Whole blocks, fetched ahead (packing happens at every call: an LSTM step of 40 rows, H = I = 256, 0.27 ms against 0.30).
  const int64_t whole = w[15] ? k1 / kPair<E> : k;
  for (; k + N <= whole; k += N)
    for (int c = 0; c < 16; c += N) {
      Vec<T> v[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        v[i] = load_whole<E>(w[c + i] + k * kPair<E>);
        __builtin_prefetch(w[c + i] + (k + 4 * N) * kPair<E>);
      }
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) store(to + (k + i) * LD + c, v[i]);
    }
  for (; k < end; k += N)
    for (int c = 0; c < 16; c += N) {
      Vec<T> v[N];
      for (int i = 0; i < N; ++i) v[i] = w[c + i] ? load_lanes<E>(w[c + i], k * kPair<E>, width) : Vec<T>{};
      transpose<T>(v);
      for (int i = 0; i < N && k + i < end; ++i) store(to + (k + i) * LD + c, v[i]);
    }
}

// panel[k, c] = w[k][c0 + c] for 64 columns of `count` rows given by pointer; null rows and columns beyond `width` are zeros.
template <class E, class S>
void pack_columns(const S* const* w, int64_t count, int64_t c0, int64_t width, E* panel) {
  const int64_t n = width - c0 < 64 ? width - c0 : 64;
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (sizeof(E) == 2) {
      for (int c = 0; c < 64; ++c) panel[(k / 2 * 64 + c) * 2 + k % 2] = w[k] && c < n ? w[k][c0 + c] : E{};
      if (k + 1 == count && k % 2 == 0)
        for (int c = 0; c < 64; ++c) panel[(k / 2 * 64 + c) * 2 + 1] = E{};
    } else {
      E* to = panel + k * 64;
      if (w[k]) load_row(to, w[k] + c0, n);
      for (int64_t c = w[k] ? n : 0; c < 64; ++c) to[c] = E{};
    }
  }
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
