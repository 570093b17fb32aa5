// The pointwise half of a backward step, for one row and up to 64 units: from dh and what forward kept to the gradients of
// the preactivations, written beside each other with stride H, and to what the step before inherits (`carry`: dc for the
// LSTM, the direct part of dh for the GRU). `sums` [4][64] collects the bias gradients.
#pragma once
#include "rnn_cpu_cells.h"

namespace pyops::rnn::PYOPS_ISA {
namespace {

template <class T>
struct BackwardRow {
  const T* dh;       // [64], complete except for the GRU's carry
  const T* reserve;  // this step's, gates H apart
  const T* prev;     // [64] c_{t-1} (lstm) or h_{t-1} (gru)
  const T* y;        // [64] h_t (rnn)
  T *carry, *out, *sums;
  int64_t H;
  int n;  // units that exist
  // The k-th gradient block: store it and add it to the bias sums.
  void emit(int k, int u, Vec<T> v) const {
    put(out + k * H, u, n, v);
    store(sums + k * 64 + u, load(sums + k * 64 + u) + v);
  }
  Vec<T> kept(int k, int u) const { return get(reserve + k * H, u, n); }
};

template <class T>
inline void lstm_backward_row(const BackwardRow<T>& row) {
  for (int u = 0; u < row.n; u += Simd<T>::N) {
    const Vec<T> i = row.kept(0, u), f = row.kept(1, u), g = row.kept(2, u), o = row.kept(3, u);
    const Vec<T> tc = tanh(row.kept(4, u)), dh = load(row.dh + u);
    const Vec<T> dc = load(row.carry + u) + dh * o * (T(1) - tc * tc);
    store(row.carry + u, dc * f);
    row.emit(0, u, dc * g * i * (T(1) - i));
    row.emit(1, u, dc * load(row.prev + u) * f * (T(1) - f));
    row.emit(2, u, dc * i * (T(1) - g * g));
    row.emit(3, u, dh * tc * o * (T(1) - o));
  }
}

// [dn*r | dr | dz | dn]: the hidden side's gradients are the first three blocks, the input side's the last three.
template <class T>
inline void gru_backward_row(const BackwardRow<T>& row) {
  for (int u = 0; u < row.n; u += Simd<T>::N) {
    const Vec<T> r = row.kept(0, u), z = row.kept(1, u), n = row.kept(2, u), hn = row.kept(3, u);
    const Vec<T> dh = load(row.dh + u) + load(row.carry + u);
    const Vec<T> dn = dh * (T(1) - z) * (T(1) - n * n);
    store(row.carry + u, dh * z);
    row.emit(0, u, dn * r);
    row.emit(1, u, dn * hn * r * (T(1) - r));
    row.emit(2, u, dh * (load(row.prev + u) - n) * z * (T(1) - z));
    row.emit(3, u, dn);
  }
}

// gru_reset_before, [dr | dz | dn]. First dz and dn from dh; then, with dh = d(r*h) = dn W_hn, dr.
template <class T>
inline void gru_candidate_backward_row(const BackwardRow<T>& row) {
  for (int u = 0; u < row.n; u += Simd<T>::N) {
    const Vec<T> z = row.kept(1, u), n = row.kept(2, u), dh = load(row.dh + u) + load(row.carry + u);
    store(row.carry + u, dh * z);
    row.emit(1, u, dh * (load(row.prev + u) - n) * z * (T(1) - z));
    row.emit(2, u, dh * (T(1) - z) * (T(1) - n * n));
  }
}
template <class T>
inline void gru_reset_backward_row(const BackwardRow<T>& row) {
  for (int u = 0; u < row.n; u += Simd<T>::N) {
    const Vec<T> r = row.kept(0, u), drh = load(row.dh + u);
    store(row.carry + u, load(row.carry + u) + drh * r);
    row.emit(0, u, drh * load(row.prev + u) * r * (T(1) - r));
  }
}

template <class T>
inline void rnn_backward_row(Cell cell, const BackwardRow<T>& row) {
  for (int u = 0; u < row.n; u += Simd<T>::N) {
    const Vec<T> y = load(row.y + u), dh = load(row.dh + u);
    row.emit(0, u, cell == Cell::rnn_tanh ? dh * (T(1) - y * y) : cell == Cell::rnn_relu ? (y <= 0 ? Vec<T>{} : dh) : dh * y * (T(1) - y));
  }
}

}  // namespace
}  // namespace pyops::rnn::PYOPS_ISA
