// What window attention's kernels compute, and the parameter block that reaches them. No torch type below this line of the house.
//
// The map [B, H, W, 3C] is seen as one of whole windows, rows x columns of them an image; C = heads * D, a window has N = wh * ww tokens.
// Token (i, j) of window (a, b) stands at ((a*wh + i + shift_h) mod rows*wh, (b*ww + j + shift_w) mod columns*ww); beyond H or W its q, k,
// v are qkv_bias. Windows are numbered (image, a, b). For query t and key u of a window, in a head, c = logit_scale / (max(|q[t]|, 1e-12) *
// max(|k[u]|, 1e-12)) where there is a logit_scale, else scale:
//   score   = c * q[t].k[u] + table[(ti - ui + wh-1) * (2ww-1) + tj - uj + ww-1, head] - 100 where t and u are of different regions
//   p       = exp(score - lse[t]);  w = p * keep / (1 - dropout)
//   output  = sum of w * v[u]
//   gradient: s = p * (dw * keep / (1 - dropout) - sum of p * dw * keep / (1 - dropout)), dw = grad[t].v[u]; of the table: s, summed over
//             windows and over the pairs of a row; of logit_scale: sum of s * c * q.k / logit_scale; v[u]: sum of w * grad[t]; q and k: of
//             their unit vectors sum of s * logit_scale * the other's, then along the tangent and over the norm; without: sum of s * scale
//             * the other. Of qkv_bias: k's and v's of the tokens beyond the map, whose q has none.
// Regions of a shifted side, in the rolled map: rows from rows*wh - wh on, from rows*wh - shift_h on, the rest. keep: pyops/ops/_philox.py,
// whose counter is (u / 4, t, head, window).
//
// Floors: qkv (and grad) read once, each result written once; 4 * D flops a pair of tokens, 10 * D in the gradient.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::attention {

using conv::DType;

struct WindowAttention {
  int64_t B, H, W, heads, D;
  int64_t wh, ww, shift_h, shift_w;
  int64_t rows, columns;                        // windows of an image
  DType dtype;                                  // of qkv, output, grad, grad_qkv
  float scale;                                  // unused with logit_scale
  float keep_scale;                             // 1 / (1 - dropout)
  uint32_t threshold;                           // what a word must reach for its score to be kept; 0: no dropout
  const int64_t* seed;                          // [1], null without dropout
  const void *qkv, *grad;                       // grad: in the gradient alone
  const float *qkv_bias, *table, *logit_scale;  // [3C], [(2wh-1)*(2ww-1), heads], [heads]; or null
  void* output;                                 // [B, H, W, C]
  float* lse;                                   // [windows, heads, N]; the gradient reads it
  void* grad_qkv;
  float *grad_qkv_bias, *grad_table, *grad_logit_scale;  // null where not wanted

  int64_t tokens() const { return wh * ww; }
  int64_t windows() const { return B * rows * columns; }
  int64_t entries() const { return (2 * wh - 1) * (2 * ww - 1); }  // rows of the table
};

}  // namespace pyops::attention
