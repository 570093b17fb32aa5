// What every recurrent kernel computes, and the parameter blocks that reach it. No torch type below this line of the house.
//
// One layer, one direction. Names: T steps, B rows, I inputs, H hidden units, G gates per unit.
//   lstm              G=4  i,f,g,o = act(x W_ih^T + b_ih + h W_hh^T + b_hh);  c' = f*c + i*g;  h' = o*tanh(c')
//   gru               G=3  r,z = sigmoid(...);  n = tanh(x W_in^T + b_in + r*(h W_hn^T + b_hn));  h' = n + z*(h - n)
//   gru_reset_before  G=3  as gru, but n = tanh(x W_in^T + b_in + (r*h) W_hn^T + b_hn)        (Cho et al. 2014, v1)
//   rnn_*             G=1  h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh)
// Gate blocks stand in torch's order along the rows of the weights [G*H, I], [G*H, H] and of the biases [G*H].
//
// `lengths` (null, or one count per row, each in 0..T): row b takes part in steps 0..lengths[b]-1 only. Its output beyond
// is zero, h_n (c_n) is its state after its last step (h0 when the length is 0), and `reverse` starts at its own end.
// Gradients of padded input are zero.
//
// `reserve` is what forward leaves for backward, [T, B, S, H], zero where t >= lengths[b], always in the compute type
// (float; double for f64):
//   lstm S=5: i, f, g, o, c'     gru S=4: r, z, n, h W_hn^T + b_hn     gru_reset_before S=4: r, z, n, r*h     rnn S=0 (h' is enough)
#pragma once
#include <cstdint>

namespace pyops::rnn {

enum class Cell : int32_t { lstm = 0, gru = 1, gru_reset_before = 2, rnn_tanh = 3, rnn_relu = 4, rnn_sigmoid = 5 };
enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int gates(Cell cell) { return cell == Cell::lstm ? 4 : (cell == Cell::gru || cell == Cell::gru_reset_before) ? 3 : 1; }
constexpr int saved(Cell cell) { return cell == Cell::lstm ? 5 : (cell == Cell::gru || cell == Cell::gru_reset_before) ? 4 : 0; }

// A [T, B, width] tensor of the op's dtype whose last dimension is contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t t, b;
};

// ---------------------------------------------------------------------------------------------- CPU: the whole layer

struct LayerForward {
  Cell cell;
  DType dtype;  // of every tensor below unless said otherwise; states and gates are computed in float (f64: double)
  int64_t T, B, I, H;
  bool reverse;
  const int64_t* lengths;                                 // [B] or null
  Rows input;                                             // [T, B, I]
  const void *h0, *c0;                                    // [B, H] contiguous, or null for zeros; c0 lstm only
  const void *weight_ih, *weight_hh, *bias_ih, *bias_hh;  // contiguous; biases may be null
  Rows output;                                            // [T, B, H]
  void *h_n, *c_n;                                        // [B, H] contiguous; c_n lstm only
  void* reserve;                                          // [T, B, S, H] in the compute type, or null when nothing is kept for backward
};

struct LayerBackward {
  Cell cell;
  DType dtype;
  int64_t T, B, I, H;
  bool reverse;
  const int64_t* lengths;
  Rows grad_output;                 // data may be null: zeros
  const void *grad_h_n, *grad_c_n;  // [B, H] contiguous or null: zeros
  Rows input, output;
  const void *h0, *c0, *weight_ih, *weight_hh;
  const void* reserve;
  Rows grad_input;                                                      // data null: not wanted
  void *grad_h0, *grad_c0;                                              // [B, H] or null: not wanted
  void *grad_weight_ih, *grad_weight_hh, *grad_bias_ih, *grad_bias_hh;  // null: not wanted. lstm and rnn: both bias gradients are equal
};

void layer_forward(const LayerForward& p);  // throws std::runtime_error
void layer_backward(const LayerBackward& p);

// --------------------------------------------------------------------- GPU: the recurrence; the dense GEMMs are outside

struct ScanForward {
  Cell cell;
  DType dtype;  // f32, bf16, f16
  int32_t T, B, H;
  bool reverse;
  const int64_t* lengths;           // device, [B] or null; clamped to 0..T
  Rows gates_x;                     // [T, B, G*H] = x W_ih^T + b_ih
  const void *h0, *c0;              // [B, H] or null
  const void *weight_hh, *bias_hh;  // bias_hh may be null
  Rows output;                      // [T, B, H]
  void *h_n, *c_n;                  // [B, H]
  float* reserve;                   // [T, B, S, H] or null
  void* workspace;                  // scan_workspace(...) bytes, any content
};

struct ScanBackward {
  Cell cell;
  DType dtype;
  int32_t T, B, H;
  bool reverse;
  const int64_t* lengths;
  Rows grad_output;                 // data may be null
  const void *grad_h_n, *grad_c_n;  // or null
  Rows output;
  const void *h0, *c0, *weight_hh;
  const float* reserve;
  Rows grad_gates_x;        // [T, B, G*H]: gradient of gates_x, zero where t >= lengths[b]
  void* grad_gates_h;       // gru only (reset-after), [T, B, H] contiguous, time-major: gradient of h W_hn^T + b_hn; the
                            // other gates' equal grad_gates_x. Zero where t >= lengths[b].
  void *grad_h0, *grad_c0;  // [B, H]
  void* workspace;
};

}  // namespace pyops::rnn
