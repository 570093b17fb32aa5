// The cells' pointwise math and everything a kernel does for one cell (one row b, one hidden unit u): shared by all paths.
//
// Steps. A kernel counts steps s = 0.. in processing order; row b takes part while s < length(b), at time
// t = s, or t = length - 1 - s when reversed. The times a row skips are exactly t = length..T-1 in both directions, so
// a row with s >= length writes its padding at t = s.
// State carried in float from step to step: forward c (lstm) or h (gru kinds); backward the gradient of c (lstm), or what
// reaches h of the step before without passing through W_hh (gru kinds).
#pragma once
#include "../common/convert.cuh"
#include "rnn.h"

namespace pyops::rnn {

enum class Kind : int { lstm, gru, gru_before, rnn };  // Cell, with the three activations of rnn as one kernel

PYOPS_HOST_DEVICE constexpr Kind kind_of(Cell cell) {
  return cell == Cell::lstm ? Kind::lstm : cell == Cell::gru ? Kind::gru : cell == Cell::gru_reset_before ? Kind::gru_before : Kind::rnn;
}
PYOPS_HOST_DEVICE constexpr int gates_of(Kind kind) { return kind == Kind::lstm ? 4 : kind == Kind::rnn ? 1 : 3; }
PYOPS_HOST_DEVICE constexpr int saved_of(Kind kind) { return kind == Kind::lstm ? 5 : kind == Kind::rnn ? 0 : 4; }

// --------------------------------------------------------------------------------------------------------- activations

// 16-bit dtypes round the result to 8 or 11 bits, so a few ulp of float are spent on speed; f32 gets the exact functions.
template <class T>
PYOPS_DEVICE float sigmoid(float x) {
  if constexpr (is_16bit<T>) return fast_divide(1.f, 1.f + fast_exp(-x));
  else return 1.f / (1.f + exact_exp(-x));
}

template <class T>
PYOPS_DEVICE float tanh_of(float x) {
  if constexpr (is_16bit<T>) {
    const float x2 = x * x;  // near zero 1 - 2/(1 + e^2x) cancels; the series' next term is below 6e-8 relative there
    if (x2 < 0.01f) return x * (1.f + x2 * (-0.33333333f + x2 * 0.13333333f));
    return 1.f - fast_divide(2.f, 1.f + fast_exp(2.f * x));
  } else {
    return exact_tanh(x);
  }
}

template <class T>
PYOPS_DEVICE float activate(Cell cell, float x) {
  if (cell == Cell::rnn_tanh) return tanh_of<T>(x);
  if (cell == Cell::rnn_relu) return x < 0.f ? 0.f : x;  // NaN stays NaN
  return sigmoid<T>(x);
}

PYOPS_DEVICE float activation_slope(Cell cell, float h) {  // from the activation's output
  if (cell == Cell::rnn_tanh) return 1.f - h * h;
  if (cell == Cell::rnn_relu) return h > 0.f ? 1.f : 0.f;
  return h * (1.f - h);
}

// ---------------------------------------------------------------------------------------------------------- addressing

template <class Params>
PYOPS_DEVICE int length_of(const Params& p, int b) {  // 0 for rows beyond the batch: they never take part
  if (b >= p.B) return 0;
  if (!p.lengths) return p.T;
  const int64_t length = p.lengths[b];
  return length < 0 ? 0 : length > p.T ? p.T : static_cast<int>(length);
}

template <class Params>
PYOPS_DEVICE int64_t time_of(const Params& p, int length, int s) {
  return p.reverse ? length - 1 - s : s;
}

template <class T>
PYOPS_DEVICE T* at(const Rows& rows, int64_t t, int b) {
  return static_cast<T*>(rows.data) + t * rows.t + b * rows.b;
}

template <class T>
PYOPS_DEVICE float load_or_zero(const void* tensor, int64_t index) {  // of a [B, H] tensor that may be null
  return tensor ? to_float(static_cast<const T*>(tensor)[index]) : 0.f;
}

template <class T>
PYOPS_DEVICE void store(void* tensor, int64_t index, float value) {
  static_cast<T*>(tensor)[index] = from_float<T>(value);
}

template <class Params>
PYOPS_DEVICE int64_t cell_index(const Params& p, int b, int u) {
  return static_cast<int64_t>(b) * p.H + u;
}

template <Kind K, class Params>
PYOPS_DEVICE int64_t reserve_index(const Params& p, int64_t t, int b, int u) {
  return (t * p.B + b) * saved_of(K) * p.H + u;
}

// ------------------------------------------------------------------------------------------------------------- forward

template <Kind K, class T>
PYOPS_DEVICE float initial_state(const ScanForward& p, int b, int u) {
  if constexpr (K == Kind::rnn) return 0.f;
  return load_or_zero<T>(K == Kind::lstm ? p.c0 : p.h0, cell_index(p, b, u));
}

template <Kind K, class T>
PYOPS_DEVICE void load_gates_x(const ScanForward& p, int64_t t, int b, int u, T (&gates_x)[gates_of(K)]) {
  const T* row = at<T>(p.gates_x, t, b) + u;
  PYOPS_UNROLL
  for (int q = 0; q < gates_of(K); ++q) gates_x[q] = row[static_cast<int64_t>(q) * p.H];
}

template <class T>
PYOPS_DEVICE void store_hidden(const ScanForward& p, int64_t t, int b, int u, bool last, float h, float c) {
  at<T>(p.output, t, b)[u] = from_float<T>(h);
  if (last) {
    store<T>(p.h_n, cell_index(p, b, u), h);
    if (p.cell == Cell::lstm) store<T>(p.c_n, cell_index(p, b, u), c);
  }
}

// Whether gate q is act(x + h W^T) as a whole, so that a product may start from x. gru's n gate is tanh(x + r * (h W^T + b)).
template <Kind K>
PYOPS_HOST_DEVICE constexpr bool joins_x(int q) {
  return K != Kind::gru || q != 2;
}

// From the pre-activations to h'. a[q] = gates_x + h W_hh^T + b_hh; gru's a[2] is without gates_x, which comes as `x_n`.
// Every kind but gru_before.
template <Kind K, class T>
PYOPS_DEVICE float forward_cell(const ScanForward& p, int64_t t, int b, int u, bool last, const float (&a)[gates_of(K)], float x_n,
                                float& state) {
  float hidden;
  if constexpr (K == Kind::lstm) {
    const float i = sigmoid<T>(a[0]), f = sigmoid<T>(a[1]);
    const float g = tanh_of<T>(a[2]), o = sigmoid<T>(a[3]);
    state = f * state + i * g;
    hidden = o * tanh_of<T>(state);
    if (p.reserve) {
      float* r = p.reserve + reserve_index<K>(p, t, b, u);
      const int64_t H = p.H;
      r[0] = i, r[H] = f, r[2 * H] = g, r[3 * H] = o, r[4 * H] = state;
    }
  } else if constexpr (K == Kind::gru) {
    const float r = sigmoid<T>(a[0]), z = sigmoid<T>(a[1]), n = tanh_of<T>(x_n + r * a[2]);
    hidden = state = n + z * (state - n);
    if (p.reserve) {
      float* saved = p.reserve + reserve_index<K>(p, t, b, u);
      const int64_t H = p.H;
      saved[0] = r, saved[H] = z, saved[2 * H] = n, saved[3 * H] = a[2];
    }
  } else {
    static_assert(K == Kind::rnn);
    hidden = activate<T>(p.cell, a[0]);
  }
  store_hidden<T>(p, t, b, u, last, hidden, state);
  return hidden;
}

// gru_before, first half: r and z from h; returns r*h, which the second product takes, and z.
template <class T>
PYOPS_DEVICE float forward_reset(const ScanForward& p, int64_t t, int b, int u, float a_r, float a_z, float state, float& z) {
  const float r = sigmoid<T>(a_r);
  z = sigmoid<T>(a_z);
  if (p.reserve) {
    float* saved = p.reserve + reserve_index<Kind::gru_before>(p, t, b, u);
    const int64_t H = p.H;
    saved[0] = r, saved[H] = z, saved[3 * H] = r * state;
  }
  return r * state;
}

// gru_before, second half: h' from the product of r*h.
template <class T>
PYOPS_DEVICE float forward_update(const ScanForward& p, int64_t t, int b, int u, bool last, float a_n, float z, float& state) {
  const float n = tanh_of<T>(a_n);
  if (p.reserve) p.reserve[reserve_index<Kind::gru_before>(p, t, b, u) + 2 * static_cast<int64_t>(p.H)] = n;
  state = n + z * (state - n);
  store_hidden<T>(p, t, b, u, last, state, 0.f);
  return state;
}

// Row b does not take part in step s: zeros at t = s. A row that never takes part ends as it began.
template <Kind K, class T>
PYOPS_DEVICE void forward_padding(const ScanForward& p, int s, int b, int u) {
  at<T>(p.output, s, b)[u] = from_float<T>(0.f);
  if (p.reserve) {
    PYOPS_UNROLL
    for (int k = 0; k < saved_of(K); ++k) p.reserve[reserve_index<K>(p, s, b, u) + static_cast<int64_t>(k) * p.H] = 0.f;
  }
  if (s == 0) {
    const int64_t i = cell_index(p, b, u);
    store<T>(p.h_n, i, load_or_zero<T>(p.h0, i));
    if (K == Kind::lstm) store<T>(p.c_n, i, load_or_zero<T>(p.c0, i));
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// What backward reads of forward for one cell: lstm i,f,g,o,c',c_prev; gru r,z,n,hn,h_prev; gru_before r,z,n,-,h_prev; rnn h'.
template <Kind K>
constexpr int kInputs = K == Kind::rnn ? 1 : saved_of(K) + 1;

template <Kind K, class T>
struct BackwardInputs {
  float saved[kInputs<K>];
  float dh;  // what reaches h' from outside the recurrence
};

template <Kind K, class T>
PYOPS_DEVICE BackwardInputs<K, T> load_backward(const ScanBackward& p, int s, int length, int b, int u) {
  BackwardInputs<K, T> in;
  const int64_t t = time_of(p, length, s), i = cell_index(p, b, u);
  if constexpr (K == Kind::rnn) {
    in.saved[0] = to_float(at<T>(p.output, t, b)[u]);
  } else {
    PYOPS_UNROLL
    for (int k = 0; k < saved_of(K); ++k)
      if (K != Kind::gru_before || k != 3) in.saved[k] = p.reserve[reserve_index<K>(p, t, b, u) + static_cast<int64_t>(k) * p.H];
    float& previous = in.saved[saved_of(K)];
    if (s == 0) previous = load_or_zero<T>(K == Kind::lstm ? p.c0 : p.h0, i);
    else {
      const int64_t before = time_of(p, length, s - 1);
      if constexpr (K == Kind::lstm) previous = p.reserve[reserve_index<K>(p, before, b, u) + 4 * static_cast<int64_t>(p.H)];
      else previous = to_float(at<T>(p.output, before, b)[u]);
    }
  }
  in.dh = p.grad_output.data ? to_float(at<T>(p.grad_output, t, b)[u]) : 0.f;
  if (s == length - 1) in.dh += load_or_zero<T>(p.grad_h_n, i);
  return in;
}

// What flows back into h of the step before: the product, and for gru kinds what bypasses it. Nothing at a row's last step.
template <Kind K>
PYOPS_DEVICE float recurrent_gradient(float product, float state) {
  return K == Kind::gru || K == Kind::gru_before ? product + state : product;
}

// From dh to the gradients of the gates' pre-activations. `grad` is what the product with W_hh takes: gradients of gates_x,
// but for gru's n gate that of h W_hn^T + b_hn. gru_before leaves grad[0] to backward_reset. Writes grad_gates_x (and _h).
template <Kind K, class T>
PYOPS_DEVICE void backward_cell(const ScanBackward& p, int s, int length, int b, int u, const BackwardInputs<K, T>& in, float dh,
                                float& state, float (&grad)[gates_of(K)]) {
  const int64_t t = time_of(p, length, s), H = p.H;
  T* row = at<T>(p.grad_gates_x, t, b) + u;
  const float (&v)[kInputs<K>] = in.saved;
  if constexpr (K == Kind::lstm) {
    const float i = v[0], f = v[1], g = v[2], o = v[3], tanh_c = tanh_of<T>(v[4]);
    if (s == length - 1) state = load_or_zero<T>(p.grad_c_n, cell_index(p, b, u));
    const float dc = state + dh * o * (1.f - tanh_c * tanh_c);
    grad[0] = dc * g * i * (1.f - i);
    grad[1] = dc * v[5] * f * (1.f - f);
    grad[2] = dc * i * (1.f - g * g);
    grad[3] = dh * tanh_c * o * (1.f - o);
    state = dc * f;
    if (s == 0 && p.grad_c0) store<T>(p.grad_c0, cell_index(p, b, u), state);
    PYOPS_UNROLL
    for (int q = 0; q < 4; ++q) row[q * H] = from_float<T>(grad[q]);
  } else if constexpr (K == Kind::gru || K == Kind::gru_before) {
    const float r = v[0], z = v[1], n = v[2], h = v[4];
    const float dn = dh * (1.f - z) * (1.f - n * n);
    grad[1] = dh * (h - n) * z * (1.f - z);
    grad[2] = dn;
    state = dh * z;
    row[H] = from_float<T>(grad[1]);
    row[2 * H] = from_float<T>(dn);
    if constexpr (K == Kind::gru) {
      grad[0] = dn * v[3] * r * (1.f - r);
      grad[2] = dn * r;
      row[0] = from_float<T>(grad[0]);
      store<T>(p.grad_gates_h, (t * p.B + b) * H + u, grad[2]);
    }
  } else {
    grad[0] = dh * activation_slope(p.cell, v[0]);
    row[0] = from_float<T>(grad[0]);
  }
}

// gru_before, second half: `product` is the gradient of r*h. Returns the gradient of r's pre-activation.
template <class T>
PYOPS_DEVICE float backward_reset(const ScanBackward& p, int s, int length, int b, int u, float r, float h, float product, float& state) {
  const float grad = product * h * r * (1.f - r);
  state += product * r;
  at<T>(p.grad_gates_x, time_of(p, length, s), b)[u] = from_float<T>(grad);
  return grad;
}

template <class T>
PYOPS_DEVICE void store_grad_h0(const ScanBackward& p, int b, int u, float value) {
  if (p.grad_h0) store<T>(p.grad_h0, cell_index(p, b, u), value);
}

template <Kind K, class T>
PYOPS_DEVICE void backward_padding(const ScanBackward& p, int s, int b, int u) {
  T* row = at<T>(p.grad_gates_x, s, b) + u;
  const int64_t H = p.H;
  PYOPS_UNROLL
  for (int q = 0; q < gates_of(K); ++q) row[q * H] = from_float<T>(0.f);
  if (K == Kind::gru) store<T>(p.grad_gates_h, (static_cast<int64_t>(s) * p.B + b) * H + u, 0.f);
  if (s == 0) {
    const int64_t i = cell_index(p, b, u);
    store_grad_h0<T>(p, b, u, load_or_zero<T>(p.grad_h_n, i));
    if (K == Kind::lstm && p.grad_c0) store<T>(p.grad_c0, i, load_or_zero<T>(p.grad_c_n, i));
  }
}

}  // namespace pyops::rnn
