// The one-dimensional transforms of F(4, 3) and F(2, 3), on vectors of channels; two dimensions are one after the other.
//   y = A^T [(G g) * (B^T d)]: g 3 taps, d m + 2 inputs, y m outputs. Interpolation points 0, 1, -1, 2, -2 and infinity; 0, 1, -1,
//   infinity.
#pragma once
#include "../common/simd.h"

namespace pyops::conv::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

template <int m>
struct Winograd1d;

template <>
struct Winograd1d<4> {
  static void filter(const vf (&g)[3], vf (&u)[6]) {
    const vf even = g[0] + g[2], far = g[0] + 4.f * g[2];
    u[0] = 0.25f * g[0];
    u[1] = (even + g[1]) * (-1.f / 6.f), u[2] = (even - g[1]) * (-1.f / 6.f);
    u[3] = (far + 2.f * g[1]) * (1.f / 24.f), u[4] = (far - 2.f * g[1]) * (1.f / 24.f);
    u[5] = g[2];
  }
  static void input(const vf (&d)[6], vf (&v)[6]) {
    v[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    const vf a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    v[1] = a + b, v[2] = a - b;
    v[3] = c + e, v[4] = c - e;
    v[5] = 4.f * d[1] - 5.f * d[3] + d[5];
  }
  static void output(const vf (&x)[6], vf (&y)[4]) {
    const vf a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = x[3] - x[4];
    y[0] = x[0] + a + c;
    y[1] = b + 2.f * d;
    y[2] = a + 4.f * c;
    y[3] = b + 8.f * d + x[5];
  }
};

template <>
struct Winograd1d<2> {
  static void filter(const vf (&g)[3], vf (&u)[4]) {
    const vf even = g[0] + g[2];
    u[0] = g[0], u[1] = 0.5f * (even + g[1]), u[2] = 0.5f * (even - g[1]), u[3] = g[2];
  }
  static void input(const vf (&d)[4], vf (&v)[4]) { v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3]; }
  static void output(const vf (&x)[4], vf (&y)[2]) { y[0] = x[0] + x[1] + x[2], y[1] = x[1] - x[2] - x[3]; }
};

// Both dimensions: `from` [kIn][kIn] to `to` [kOut][kOut], columns first.
template <int kIn, int kOut, class F>
inline void transform_2d(const vf (&from)[kIn][kIn], vf (&to)[kOut][kOut], const F& one) {
  vf half[kOut][kIn];
  for (int j = 0; j < kIn; ++j) {
    vf column[kIn], result[kOut];
    for (int i = 0; i < kIn; ++i) column[i] = from[i][j];
    one(column, result);
    for (int i = 0; i < kOut; ++i) half[i][j] = result[i];
  }
  for (int i = 0; i < kOut; ++i) one(half[i], to[i]);
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
