// What attention's CPU kernels are made of: one matrix product, two ways of packing rows for it, and the softmax's exponential.
//
//   out[r][c] (+)= sum_k a[r * a_row + k * a_lane] * b[k * ldb + c]        r < rows, c < vectors * kF
//
// k counts lanes of 32 bits: floats (E = float), or pairs of bfloat16 neighbours of the summed dimension (E = bf16, where the machine
// multiplies those). With a_lane = 1 rows of `a` are rows of the product; with a_row = 1 they are its columns, so that a transposed
// product needs no transpose. Sums are cut every kSum lanes (panel_gemm.h says why).
//
//   transposed rows   panels [count/64][lanes of D][64]: keys as columns of q k^T; columns beyond `count` are zeros
//   straight rows     [count lanes][padded(D)]: values as rows of p v; zeros beyond D, and for an odd last row's neighbour
//
// Tile: 6 rows x 4 vectors in 32 registers, 6 x 2 in 16. One FMA a cycle is the floor; `b` streams from L2 at 4 * 64 bytes per 24 of them.
#pragma once
#include "../common/log.h"
#include "../common/panel_gemm.h"

namespace pyops::attention::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

constexpr int64_t kGroup = 6;   // rows of a tile
constexpr int64_t kPanel = 64;  // columns of a transposed panel
constexpr int64_t kUnit = 16;   // columns are computed in runs of so many
constexpr int64_t kSum = 64;    // lanes of one sequential sum

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t padded(int64_t D) { return round_up(D, kF); }

// ----------------------------------------------------------------------------------------------------------- product

template <int R, int NV, class E>
[[gnu::noinline]] void product_tile(const float* a, int64_t a_row, int64_t a_lane, const float* b, int64_t ldb, int64_t lanes, float* out,
                                    int64_t ldo, bool add) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a + r * a_row;
  int64_t k = 0, at = 0;
  do {
    vf acc[R][NV];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = vf{};
    for (const int64_t end = k + kSum < lanes ? k + kSum : lanes; k < end; ++k, at += a_lane, b += ldb) {
      vf w[NV];
      for (int v = 0; v < NV; ++v) w[v] = load(b + v * kF);
      for (int r = 0; r < R; ++r) {
        const vf x = splat<float>(rows[r][at]);
#if defined(__AVX512BF16__)
        if constexpr (sizeof(E) == 2) {
          for (int v = 0; v < NV; ++v)
            acc[r][v] = _mm512_dpbf16_ps(acc[r][v], reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w[v]));
          continue;
        }
#endif
        for (int v = 0; v < NV; ++v) acc[r][v] += x * w[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) {
        float* o = out + r * ldo + v * kF;
        store(o, add ? load(o) + acc[r][v] : acc[r][v]);
      }
    add = true;
  } while (k < lanes);
}

template <int NV, class E>
inline void product_rows(int rows, const float* a, int64_t a_row, int64_t a_lane, const float* b, int64_t ldb, int64_t lanes, float* out,
                         int64_t ldo, bool add) {
  switch (rows) {
    case 1: return product_tile<1, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
    case 2: return product_tile<2, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
    case 3: return product_tile<3, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
    case 4: return product_tile<4, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
    case 5: return product_tile<5, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
    default: return product_tile<6, NV, E>(a, a_row, a_lane, b, ldb, lanes, out, ldo, add);
  }
}

// Any number of rows and vectors, in even shares of a tile.
template <class E>
inline void multiply(int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t a_lane, const float* b, int64_t ldb,
                     int64_t lanes, float* out, int64_t ldo, bool add) {
  for (int64_t i = 0; i < rows;) {
    const int n = block_rows(rows - i, kGroup);
    const float* from = a + i * a_row;
    for (int64_t c = 0; c < vectors;) {
      const int width = block_rows(vectors - c, kMaxVectors);
      const float* w = b + c * kF;
      float* to = out + i * ldo + c * kF;
      if (width == 1) product_rows<1, E>(n, from, a_row, a_lane, w, ldb, lanes, to, ldo, add);
      else if (width == 2) product_rows<2, E>(n, from, a_row, a_lane, w, ldb, lanes, to, ldo, add);
      else if constexpr (kMaxVectors == 4) {
        if (width == 3) product_rows<3, E>(n, from, a_row, a_lane, w, ldb, lanes, to, ldo, add);
        else product_rows<4, E>(n, from, a_row, a_lane, w, ldb, lanes, to, ldo, add);
      }
      c += width;
    }
    i += n;
  }
}

// out[r][c] = a[r] . column c of transposed panels, begin <= c < end, both multiples of kUnit.
template <class E>
inline void multiply_panels(int64_t rows, const float* a, int64_t a_row, const float* panels, int64_t lanes, int64_t begin, int64_t end,
                            float* out, int64_t ldo) {
  for (int64_t c = begin, stop; c < end; c = stop) {
    stop = c / kPanel * kPanel + kPanel < end ? c / kPanel * kPanel + kPanel : end;
    const float* panel = panels + c / kPanel * lanes * kPanel + c % kPanel;
    multiply<E>(rows, (stop - c) / kF, a, a_row, 1, panel, kPanel, lanes, out + c, ldo, false);
  }
}

// ----------------------------------------------------------------------------------------------------------- packing

inline int64_t panel_floats(int64_t count, int64_t lanes) { return round_up(count, kPanel) * lanes; }

// `count` rows of D elements given by pointer -> transposed panels of lanes_of<E>(D) lanes, whole to the next kUnit columns.
template <class E, class S>
inline void pack_transposed(const S* const* rows, int64_t count, int64_t D, float* to) {
  const int64_t lanes = lanes_of<E>(D);
  for (int64_t c = 0; c < count; c += kUnit) {
    const S* w[16];
    for (int64_t i = 0; i < 16; ++i) w[i] = c + i < count ? rows[c + i] : nullptr;
    pack_rows<kPanel>(w, 0, D, D, reinterpret_cast<E*>(to + c / kPanel * lanes * kPanel + c % kPanel));
  }
}

template <class S>
inline vf load_upto(const S* p, int64_t n) {
  return n >= kF ? load_as(p, float{}) : load_part(p, static_cast<int>(n));
}
template <class S>
inline void store_upto(S* p, vf v, int64_t n) {
  if (n >= kF) store_as(p, v);
  else store_part(p, v, static_cast<int>(n));
}

#if defined(__AVX512BF16__)
// Neighbours of the summed dimension in one lane, `low` being the first; rounded to nearest even.
inline vf pair_lanes(vf low, vf high) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  return bits<vf>(_mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)),
                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16)));
}
#endif

// One row's vector as what is multiplied along it: rounded to bfloat16 where E is.
template <class E>
inline void put_lanes(float* row, int64_t column, vf v) {
  if constexpr (sizeof(E) == 4) store(row + column, v);
#if defined(__AVX512BF16__)
  else _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + column / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#endif
}

// A row of D elements -> lanes_of<E>(D) lanes of one row of `a`, zeros in what is left of the last vector.
template <class E, class S>
inline void pack_row(const S* row, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += kF) put_lanes<E>(to, d, load_upto(row + d, D - d));
}

// `count` rows of D elements given by pointer -> straight rows.
template <class E, class S>
inline void pack_straight(const S* const* rows, int64_t count, int64_t D, float* to) {
  const int64_t width = padded(D);
  for (int64_t k = 0; k < count; k += kPair<E>, to += width)
    for (int64_t d = 0; d < D; d += kF) {
      const vf x = load_upto(rows[k] + d, D - d);
      if constexpr (sizeof(E) == 4) store(to + d, x);
#if defined(__AVX512BF16__)
      else store(to + d, pair_lanes(x, k + 1 < count ? load_upto(rows[k + 1] + d, D - d) : vf{}));
#endif
    }
}

// ----------------------------------------------------------------------------------------------------------- softmax

// e^x for x <= 0 (and rounding errors above); zero below -87, so that no denormal appears, and at -inf. Keeps NaN.
inline vf exp_weight(vf x) {
  vf n;
  const vf q = expm1_reduced(x, n);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.f), _CMP_NLT_UQ), 1.f + q, n);
#else
  return x < -87.f ? vf{} : (1.f + q) * power_of_two(n);
#endif
}

// The second where either is NaN.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

template <class F, int... I>
inline float fold_lanes(vf v, F f, std::integer_sequence<int, I...>) {
  if constexpr (kF >= 16) v = f(v, shuffle(v, v, std::integer_sequence<int, ((I + 8) % kF)...>{}));
  if constexpr (kF >= 8) v = f(v, shuffle(v, v, std::integer_sequence<int, ((I + 4) % kF)...>{}));
  v = f(v, shuffle(v, v, std::integer_sequence<int, ((I + 2) % kF)...>{}));
  v = f(v, shuffle(v, v, std::integer_sequence<int, ((I + 1) % kF)...>{}));
  return v[0];
}
inline float max_lane(vf v) { return fold_lanes(v, larger, std::make_integer_sequence<int, kF>{}); }
inline float sum_lane(vf v) {
  return fold_lanes(v, [](vf a, vf b) { return a + b; }, std::make_integer_sequence<int, kF>{});
}

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
