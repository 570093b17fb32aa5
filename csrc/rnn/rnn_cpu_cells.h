// The pointwise half of a recurrent step, for one row and one panel of units (16; 64 for G = 1), on either side of the GEMM.
//
// Forward: preactivation = tile (h W_hh^T) + gx (x W_ih^T) + bias, each [G][16] (rnn: [64]).
// An LSTM unit takes 5 exponentials and 3 divisions: sigmoid(i) tanh(g) and sigmoid(o) tanh(c) share one each.
#pragma once
#include "../common/panel_gemm.h"
#include "rnn_cpu.h"

namespace pyops::rnn::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using cpu::Layout;
using cpu::Team;

// A vector at lane u of a row of which n elements exist.
template <class T>
inline void put(T* row, int u, int n, Vec<T> v) {
  if (u + Simd<T>::N <= n) return store(row + u, v);
  for (int i = 0; u + i < n; ++i) row[u + i] = v[i];
}
template <class T>
inline Vec<T> get(const T* row, int u, int n) {
  if (u + Simd<T>::N <= n) return load(row + u);
  Vec<T> v{};
  for (int i = 0; u + i < n; ++i) v[i] = row[u + i];
  return v;
}

// Rows of one panel after the GEMM. Working on all of them in one loop keeps the polynomials' constants in registers and lets
// the rows' dependency chains overlap (an LSTM row alone: 270 cycles).
template <class T>
struct Block {
  static constexpr int kMost = 8;
  int rows, n;  // rows; units that exist
  int ld;       // floats from row to row of tile and gx
  int64_t H;
  const T *tile, *gx, *bias;
  T* state[kMost];   // this panel's units: c (lstm), h (gru)
  T* update[kMost];  // gru_reset_before: z
  T* save[kMost];    // reserve, gates H apart; all null when nothing is kept
  T* out;            // [rows][units]: h'
  Vec<T> gate(int r, int c) const { return load(tile + r * ld + c) + (load(gx + r * ld + c) + load(bias + c)); }
  bool keep() const { return save[0] != nullptr; }
};

template <class T>
inline void lstm_rows(const Block<T>& a) {
  for (int u = 0; u < 16; u += Simd<T>::N) {
    for (int r = 0; r < a.rows; ++r) {
      const Vec<T> i = a.gate(r, u), f = sigmoid(a.gate(r, 16 + u)), g = a.gate(r, 32 + u);
      store(a.state[r] + u, f * load(a.state[r] + u) + sigmoid_tanh(i, g));
      if (a.keep()) put(a.save[r], u, a.n, sigmoid(i)), put(a.save[r] + a.H, u, a.n, f), put(a.save[r] + 2 * a.H, u, a.n, tanh(g));
    }
    for (int r = 0; r < a.rows; ++r) {
      const Vec<T> o = a.gate(r, 48 + u), c = load(a.state[r] + u);
      store(a.out + r * 16 + u, sigmoid_tanh(o, c));
      if (a.keep()) put(a.save[r] + 3 * a.H, u, a.n, sigmoid(o)), put(a.save[r] + 4 * a.H, u, a.n, c);
    }
  }
}

// `state` is h in full precision, old and then new; bias_hn stands behind the bias, at column 48.
template <class T>
inline void gru_rows(const Block<T>& a) {
  for (int u = 0; u < 16; u += Simd<T>::N)
    for (int r = 0; r < a.rows; ++r) {
      const Vec<T> reset = sigmoid(a.gate(r, u)), z = sigmoid(a.gate(r, 16 + u));
      const Vec<T> hn = load(a.tile + r * a.ld + 32 + u) + load(a.bias + 48 + u);
      const Vec<T> n = tanh(reset * hn + (load(a.gx + r * a.ld + 32 + u) + load(a.bias + 32 + u)));
      const Vec<T> next = z * (load(a.state[r] + u) - n) + n;
      store(a.state[r] + u, next);
      store(a.out + r * 16 + u, next);
      if (a.keep()) {
        put(a.save[r], u, a.n, reset), put(a.save[r] + a.H, u, a.n, z);
        put(a.save[r] + 2 * a.H, u, a.n, n), put(a.save[r] + 3 * a.H, u, a.n, hn);
      }
    }
}

// gru_reset_before, first half: z and, as `out`, r*h, which the n gate's GEMM then reads.
template <class T>
inline void gru_reset_rows(const Block<T>& a) {
  for (int u = 0; u < 16; u += Simd<T>::N)
    for (int r = 0; r < a.rows; ++r) {
      const Vec<T> reset = sigmoid(a.gate(r, u)), z = sigmoid(a.gate(r, 16 + u)), product = reset * load(a.state[r] + u);
      store(a.update[r] + u, z);
      store(a.out + r * 16 + u, product);
      if (a.keep()) put(a.save[r], u, a.n, reset), put(a.save[r] + a.H, u, a.n, z), put(a.save[r] + 3 * a.H, u, a.n, product);
    }
}
// Second half; the tile's columns 32.. hold (r*h) W_hn^T.
template <class T>
inline void gru_candidate_rows(const Block<T>& a) {
  for (int u = 0; u < 16; u += Simd<T>::N)
    for (int r = 0; r < a.rows; ++r) {
      const Vec<T> n = tanh(a.gate(r, 32 + u)), next = load(a.update[r] + u) * (load(a.state[r] + u) - n) + n;
      store(a.state[r] + u, next);
      store(a.out + r * 16 + u, next);
      if (a.keep()) put(a.save[r] + 2 * a.H, u, a.n, n);
    }
}

template <class T>
inline void rnn_rows(Cell cell, const Block<T>& a) {
  const auto each = [&](auto activation) {
    for (int r = 0; r < a.rows; ++r)
      for (int u = 0; u < 64; u += Simd<T>::N) store(a.out + r * 64 + u, activation(a.gate(r, u)));
  };
  if (cell == Cell::rnn_tanh) each([](Vec<T> x) { return tanh(x); });
  else if (cell == Cell::rnn_relu) each([](Vec<T> x) { return relu(x); });
  else each([](Vec<T> x) { return sigmoid(x); });
}

// Biases in panel order, [panels][64] floats: b_ih + b_hh per column; gru keeps b_hn apart, at column 48.
template <int G, class S, class T>
void pack_bias(Cell cell, const S* bias_ih, const S* bias_hh, int64_t H, int64_t panel, T* to) {
  constexpr int U = G == 1 ? 64 : 16;
  for (int c = 0; c < 64; ++c) {
    const int gate = c / U;
    const int64_t unit = panel * U + c % U;
    T sum = 0;
    if (unit < H) {
      const bool split = cell == Cell::gru && gate >= 2;  // n: b_in at gate 2, b_hn at "gate 3"
      if (bias_ih && gate < G) sum += widen(bias_ih[gate * H + unit]);
      if (bias_hh && (split ? gate == 3 : gate < G)) sum += widen(bias_hh[(split ? 2 : gate) * H + unit]);
    }
    to[c] = sum;
  }
}

}  // namespace
}  // namespace pyops::rnn::PYOPS_ISA
