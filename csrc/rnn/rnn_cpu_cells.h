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
template <class T> inline void put(T* row, int u, int n, Vec<T> v) {
  if (u + Simd<T>::N <= n) return store(row + u, v);
  for (int i = 0; u + i < n; ++i) row[u + i] = v[i];
}
template <class T> inline Vec<T> get(const T* row, int u, int n) {
  if (u + Simd<T>::N <= n) return load(row + u);
  Vec<T> v{};
  for (int i = 0; u + i < n; ++i) v[i] = row[u + i];
  return v;
}

template <class T> struct Gates {
  const T *tile, *gx, *bias;
  Vec<T> at(int c) const { return load(tile + c) + (load(gx + c) + load(bias + c)); }
};

template <class T> inline void lstm_row(Gates<T> a, T* c, T* h, T* save, int64_t H, int n) {
  for (int u = 0; u < 16; u += Simd<T>::N) {
    const Vec<T> i = a.at(u), f = sigmoid(a.at(16 + u)), g = a.at(32 + u), o = a.at(48 + u);
    const Vec<T> cell = f * load(c + u) + sigmoid_tanh(i, g);
    store(c + u, cell);
    store(h + u, sigmoid_tanh(o, cell));
    if (save) {
      put(save, u, n, sigmoid(i)), put(save + H, u, n, f), put(save + 2 * H, u, n, tanh(g));
      put(save + 3 * H, u, n, sigmoid(o)), put(save + 4 * H, u, n, cell);
    }
  }
}

// `state` is h in full precision, old and then new; bias_hn stands behind bias, at column 48.
template <class T> inline void gru_row(Gates<T> a, T* state, T* h, T* save, int64_t H, int n) {
  for (int u = 0; u < 16; u += Simd<T>::N) {
    const Vec<T> r = sigmoid(a.at(u)), z = sigmoid(a.at(16 + u));
    const Vec<T> hn = load(a.tile + 32 + u) + load(a.bias + 48 + u);
    const Vec<T> candidate = tanh(r * hn + (load(a.gx + 32 + u) + load(a.bias + 32 + u)));
    const Vec<T> next = z * (load(state + u) - candidate) + candidate;
    store(state + u, next);
    store(h + u, next);
    if (save) put(save, u, n, r), put(save + H, u, n, z), put(save + 2 * H, u, n, candidate), put(save + 3 * H, u, n, hn);
  }
}

// gru_reset_before, first half: z and r*h (what the n gate's GEMM then reads).
template <class T> inline void gru_reset_row(Gates<T> a, const T* state, T* z, T* rh, T* save, int64_t H, int n) {
  for (int u = 0; u < 16; u += Simd<T>::N) {
    const Vec<T> r = sigmoid(a.at(u)), update = sigmoid(a.at(16 + u)), product = r * load(state + u);
    store(z + u, update);
    store(rh + u, product);
    if (save) put(save, u, n, r), put(save + H, u, n, update), put(save + 3 * H, u, n, product);
  }
}
// Second half; the tile's columns 32.. hold (r*h) W_hn^T.
template <class T> inline void gru_candidate_row(Gates<T> a, const T* z, T* state, T* h, T* save, int64_t H, int n) {
  for (int u = 0; u < 16; u += Simd<T>::N) {
    const Vec<T> candidate = tanh(a.at(32 + u));
    const Vec<T> next = load(z + u) * (load(state + u) - candidate) + candidate;
    store(state + u, next);
    store(h + u, next);
    if (save) put(save + 2 * H, u, n, candidate);
  }
}

template <class T> inline void rnn_row(Cell cell, Gates<T> a, T* h) {
  constexpr int N = Simd<T>::N;
  if (cell == Cell::rnn_tanh)
    for (int u = 0; u < 64; u += N) store(h + u, tanh(a.at(u)));
  else if (cell == Cell::rnn_relu)
    for (int u = 0; u < 64; u += N) store(h + u, relu(a.at(u)));
  else
    for (int u = 0; u < 64; u += N) store(h + u, sigmoid(a.at(u)));
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
