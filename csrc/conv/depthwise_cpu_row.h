// The three inner loops of a depthwise convolution, on rows of 16 channels: [position][16] floats, zero padded, so that no
// loop knows about borders, storage types or channel tails.
//
//   conv_row     out[x] = bias + sum over taps of w * in[x * stride + kx * dilation]       (also the input gradient, with w flipped)
//   weight_row   grad[ky][kx] += sum over x of dz[x] * in[ky][x * stride + kx * dilation]
//   stage_row    an NHWC row -> [position][16] per block
// Registers: one tile of conv_row holds T sums and the KW weights of a kernel row and reads each input vector once: T * KW
// products for T * stride + KW - 1 loads (one FMA and one load a cycle on 512-bit machines).
#pragma once
#include "activation_cpu.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int kBlock = 16;  // channels
constexpr int kSlack = 5;   // positions of a row that a last, partial tile may compute in vain
#if defined(__AVX512F__)
constexpr int kWideTile = 14, kMidTile = 7, kNarrowTile = 4;
#else
constexpr int kWideTile = 6, kMidTile = 6, kNarrowTile = 3;
#endif
constexpr int kGeneralTile = 6;

struct RowConv {
  const float* const* in;  // per kernel row that meets the image: its input row, at the position of x = 0, kx = 0
  const float* const* w;   // and its weights, [KW][16]
  int64_t rows;
  int64_t KW, stride, dilation, width;  // width: outputs; `out` has room for kSlack more
  const float* bias;                    // [16]
  float* out;
};

template <int KW, int S, int T>
inline void conv_tile(const RowConv& c, int64_t x) {
  for (int v = 0; v < kBlock; v += kF) {
    vf acc[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = vf{};
    for (int64_t r = 0; r < c.rows; ++r) {
      const float* in = c.in[r] + x * S * kBlock + v;
      vf w[KW];
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) w[k] = load(c.w[r] + k * kBlock + v);
#pragma GCC unroll 40
      for (int i = 0; i < (T - 1) * S + KW; ++i) {
        const vf value = load(in + i * kBlock);
#pragma GCC unroll 8
        for (int k = 0; k < KW; ++k)
          if (i >= k && (i - k) % S == 0 && (i - k) / S < T) acc[(i - k) / S] += w[k] * value;
      }
    }
    // The bias last: a sum that starts from it rounds to its size at every tap (1.3 to 1.8 times eager's error).
    const vf bias = load(c.bias + v);
    float* out = c.out + x * kBlock + v;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(out + t * kBlock, acc[t] + bias);
  }
}

template <int KW, int S>
void conv_row(const RowConv& c) {
  for (int64_t x = 0; x < c.width;) {
    const int64_t left = c.width - x;
    if (left > kWideTile - 3) conv_tile<KW, S, kWideTile>(c, x), x += kWideTile;
    else if (kMidTile != kWideTile && left > kNarrowTile) conv_tile<KW, S, kMidTile>(c, x), x += kMidTile;
    else conv_tile<KW, S, kNarrowTile>(c, x), x += kNarrowTile;
  }
}

inline void conv_row_general(const RowConv& c) {
  constexpr int T = kGeneralTile;
  for (int64_t x = 0; x < c.width; x += T)
    for (int v = 0; v < kBlock; v += kF) {
      vf acc[T] = {};
      for (int64_t r = 0; r < c.rows; ++r) {
        vf row[T] = {};  // a sum of sums: kernels may be large
        for (int64_t k = 0; k < c.KW; ++k) {
          const vf w = load(c.w[r] + k * kBlock + v);
          const float* in = c.in[r] + (x * c.stride + k * c.dilation) * kBlock + v;
          for (int t = 0; t < T; ++t) row[t] += w * load(in + t * c.stride * kBlock);
        }
        for (int t = 0; t < T; ++t) acc[t] += row[t];
      }
      for (int t = 0; t < T; ++t) store(c.out + (x + t) * kBlock + v, acc[t] + load(c.bias + v));
    }
}

using RowFunction = void (*)(const RowConv&);
inline RowFunction pick_row(int64_t KW, int64_t stride, int64_t dilation) {
  if (dilation == 1 && stride == 1) switch (KW) {
      case 3: return conv_row<3, 1>;
      case 5: return conv_row<5, 1>;
      case 7: return conv_row<7, 1>;
    }
  if (dilation == 1 && stride == 2) switch (KW) {
      case 3: return conv_row<3, 2>;
      case 5: return conv_row<5, 2>;
      case 7: return conv_row<7, 2>;
    }
  return conv_row_general;
}

// ------------------------------------------------------------------------------------------------- weight gradient

struct RowGrad {
  const float* const* in;  // as RowConv's
  float* const* grad;      // per kernel row, [KW][16], added to
  int64_t rows;
  int64_t KW, stride, dilation, width;
  const float* dz;    // at x = 0
  int64_t dz_stride;  // positions from one output to the next
};

// Positions summed in a register before they are added to `grad`: a sum of sums.
constexpr int64_t kGradChunk = 64;

template <int KW, int R>
inline void grad_rows(const RowGrad& g, int64_t r, int64_t x0, int64_t x1, int v) {
  vf acc[R][KW];
  const float *in[R], *dz = g.dz + x0 * g.dz_stride * kBlock + v;
  for (int i = 0; i < R; ++i) {
    in[i] = g.in[r + i] + x0 * g.stride * kBlock + v;
    for (int k = 0; k < KW; ++k) acc[i][k] = vf{};
  }
  for (int64_t x = x0; x < x1; ++x, dz += g.dz_stride * kBlock) {
    const vf d = load(dz);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) acc[i][k] += d * load(in[i] + k * kBlock);
      in[i] += g.stride * kBlock;
    }
  }
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < KW; ++k) {
      float* to = g.grad[r + i] + k * kBlock + v;
      store(to, load(to) + acc[i][k]);
    }
}

template <int KW>
void weight_row(const RowGrad& g) {
#if defined(__AVX512F__)
  constexpr int R = KW == 5 ? 5 : 3;  // 25, 21, 9 sums
#else
  constexpr int R = KW == 3 ? 3 : KW == 5 ? 2 : 1;  // 9, 10, 7
#endif
  for (int64_t x = 0; x < g.width; x += kGradChunk) {
    const int64_t end = x + kGradChunk < g.width ? x + kGradChunk : g.width;
    for (int v = 0; v < kBlock; v += kF) {
      int64_t r = 0;
      for (; r + R <= g.rows; r += R) grad_rows<KW, R>(g, r, x, end, v);
      if constexpr (R > 1)
        for (; r < g.rows; ++r) grad_rows<KW, 1>(g, r, x, end, v);
    }
  }
}

inline void weight_row_general(const RowGrad& g) {
  for (int64_t x0 = 0; x0 < g.width; x0 += kGradChunk) {
    const int64_t x1 = x0 + kGradChunk < g.width ? x0 + kGradChunk : g.width;
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t k = 0; k < g.KW; ++k)
        for (int v = 0; v < kBlock; v += kF) {
          const float *in = g.in[r] + (x0 * g.stride + k * g.dilation) * kBlock + v, *dz = g.dz + x0 * g.dz_stride * kBlock + v;
          vf acc[4] = {};
          int64_t x = x0;
          for (; x + 4 <= x1; x += 4)
            for (int i = 0; i < 4; ++i, in += g.stride * kBlock, dz += g.dz_stride * kBlock) acc[i] += load(dz) * load(in);
          for (; x < x1; ++x, in += g.stride * kBlock, dz += g.dz_stride * kBlock) acc[0] += load(dz) * load(in);
          float* to = g.grad[r] + k * kBlock + v;
          store(to, load(to) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
        }
  }
}

using GradFunction = void (*)(const RowGrad&);
inline GradFunction pick_grad(int64_t KW, int64_t dilation) {
  if (dilation == 1) switch (KW) {
      case 3: return weight_row<3>;
      case 5: return weight_row<5>;
      case 7: return weight_row<7>;
    }
  return weight_row_general;
}

// --------------------------------------------------------------------------------------- between NHWC and [position][16]

// A vector of `lanes` channels that exist: none, some, or more than a vector.
template <class S>
inline vf get(const S* p, int64_t lanes) {
  return lanes >= kF ? load_as(p, float{}) : lanes > 0 ? load_part(p, static_cast<int>(lanes)) : vf{};
}
template <class S>
inline void put(S* p, vf v, int64_t lanes) {
  if (lanes >= kF) store_as(p, v);
  else if (lanes > 0) store_part(p, v, static_cast<int>(lanes));
}

// A row of `blocks` blocks, from NHWC (C from one position to the next, `channels` of them real) to planes of [position][16] that lie
// `plane` floats apart. Memory is read in its order, a position at a time.
template <class S>
inline void stage_row(float* to, int64_t plane, const S* from, int64_t width, int64_t C, int64_t channels, int64_t blocks) {
  const int64_t whole = channels / kBlock < blocks ? channels / kBlock : blocks;
  for (int64_t x = 0; x < width; ++x, from += C, to += kBlock) {
    for (int64_t g = 0; g < whole; ++g)
      for (int v = 0; v < kBlock; v += kF) store(to + g * plane + v, load_as(from + g * kBlock + v, float{}));
    if (whole < blocks)
      for (int v = 0; v < kBlock; v += kF) store(to + whole * plane + v, get(from + whole * kBlock + v, channels - whole * kBlock - v));
  }
}

// sums[0] += value for one vector, sums[16] carrying what the additions lost: a plain sum over hundreds of rows has three times
// the error of eager's pairwise mean.
inline void add_compensated(float* sums, vf value) {
  const vf old = load(sums), next = value - load(sums + kBlock), sum = old + next, lost = (sum - old) - next;
  store(sums, sum);
  store(sums + kBlock, lost == lost ? lost : vf{});  // an infinite sum loses nothing
}

inline void zero(float* to, int64_t positions) {
  if (positions > 0) __builtin_memset(to, 0, positions * kBlock * sizeof(float));
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
