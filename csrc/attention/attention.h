// What attention computes, and the parameter blocks that reach it. No torch type below this line of the house.
//
// Query head h of sequence s reads key head h * G / H; its row i < n and column j < m are counted within the sequence:
//   x[i, j] = scale * query[i] . key[j];  x = softcap * tanh(x / softcap) where softcap > 0
//   score   = x - slopes[s, h] * |i + m - n - j| + bias[s, h, i, j];  -inf where j - i - (m - n) is below -left or above right (each unless
//             it is -1), or where a boolean bias is false
//   p = softmax(score);  output = dropped(p) value;  lse = log sum exp(score).  Rows that see nothing: zeros and -inf
//   gradient: dp = dropped(grad value^T);  ds = p * (dp - delta), delta = grad . output - grad_lse;  grad_bias = ds, summed to bias' shape;
//             dx = ds * scale * (1 - (x / softcap)^2);  grad_query = dx key, grad_key = dx^T query, grad_value = dropped(p)^T grad
// dropped() keeps what Philox4x32-7 says (pyops/ops/_philox.py), times dropout_factor, and zeroes the rest.
//
// Sums, softmax and lse are float. Rows and keys of no sequence get zeros (and -inf) and are never read.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::attention {

using conv::DType;
constexpr int64_t kMostHeadSize = 256;

// [B, heads, rows, D] with any strides, counted in elements, but elements of a row are neighbours.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

enum class BiasType : int32_t { none, f32, bf16, f16, boolean };

struct Bias {
  const void* data;
  BiasType dtype;
  int64_t sizes[4], strides[4];  // a dimension of one has stride 0; the last stride is 0 or 1
};

struct Attention {
  int64_t B, H, G, N, M, D, S;  // H query heads, G key heads, S sequences
  int64_t left, right;
  DType dtype;  // of query, key, value, output and their gradients
  float scale, softcap;
  Heads query, key, value, output;
  float* lse;  // [B, H, N]
  Bias bias;
  const float* slopes;      // null: none
  int64_t slopes_sequence;  // H, or 0 where all sequences share them
  const int32_t* spans;     // [S, 4]; null: sequence s is all of batch s
  const int64_t* seed;      // null: no dropout
  uint32_t threshold;       // a random word must reach it for its score to be kept
  float dropout_factor;
};

struct AttentionGradient {
  Attention forward;      // its output and lse are read
  Heads grad;             // of output
  const float* grad_lse;  // [B, H, N] or null
  Heads grad_query, grad_key, grad_value;
  float* grad_bias;  // contiguous, of bias' sizes; null: not wanted
};

struct Sequence {
  int64_t batch, first_row, rows, first_column, columns;
};

constexpr int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Clamped into the tensors, the bias among them.
constexpr Sequence sequence_of(const Attention& p, int64_t s) {
  Sequence q{p.spans == nullptr || p.B > 1 ? s : 0, 0, p.N, 0, p.M};
  if (p.spans != nullptr) {
    const int32_t* span = p.spans + 4 * s;
    q.first_row = clamped(span[0], 0, p.N), q.rows = clamped(span[1], 0, p.N - q.first_row);
    q.first_column = clamped(span[2], 0, p.M), q.columns = clamped(span[3], 0, p.M - q.first_column);
  }
  if (p.bias.dtype != BiasType::none) {
    if (p.bias.sizes[2] != 1 && q.rows > p.bias.sizes[2]) q.rows = p.bias.sizes[2];
    if (p.bias.sizes[3] != 1 && q.columns > p.bias.sizes[3]) q.columns = p.bias.sizes[3];
  }
  return q;
}

// Columns that rows first..last of a sequence may see, by left and right alone; empty where end <= begin.
struct Columns {
  int64_t begin, end;
};
constexpr Columns seen_by(const Attention& p, const Sequence& q, int64_t first, int64_t last) {
  const int64_t shift = q.columns - q.rows;
  Columns c{0, q.columns};
  if (p.left >= 0 && first + shift - p.left > 0) c.begin = first + shift - p.left;
  if (p.right >= 0 && last + shift + p.right + 1 < c.end) c.end = last + shift + p.right + 1;
  return c;
}

}  // namespace pyops::attention
