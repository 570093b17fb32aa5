// What the Winograd convolution computes, and the parameter block that reaches it. No torch type below this line of the house.
//
//   input [N,H,W,C], filters 3x3, stride 1, pad_h x pad_w zeros around  ->  y [N,OH,OW,O], OH = H + 2*pad_h - 2, OW likewise
//   output = activation(y + bias + residual), or with residual_last activation(y + bias) + residual
//   pool: output is the maximum or the average of each whole 2x2 window of that, [N,OH/2,OW/2,O]
//   upsample: what is stored is [N,H/2,W/2,C], and input is that enlarged twice, each position repeated or bilinear (half-pixel centres)
//
// F(m x m, 3x3): m*m outputs of a channel pair cost (m+2)^2 products instead of 9*m*m: 4 times fewer for m = 4, 2.25 times for m = 2.
// Sums and transforms in float. Transforms with m = 4 multiply by up to 5 and 8 and divide by 24: the result's relative L2 error was 2 to 8
// times a direct convolution's (m = 2: 0.6 to 1.3 times, or within a unit in the last place).
//
// Source: Winograd, 1980; Lavin and Gray, 2016.
#pragma once
#include "depthwise.h"

namespace pyops::conv {

enum class Upsample : int32_t { none, nearest, bilinear };

struct Winograd {
  int64_t N, C, H, W, O;
  int64_t out_stride;  // between output's positions: O, or more where it is a slice of a wider image's channels
  int32_t m;           // 4 or 2
  int32_t pad_h, pad_w;
  bool residual_last;
  Pool pool;
  Upsample upsample;
  DType dtype;  // of the images
  Activation activation;
  float slope;
  const void *input, *residual;
  const float *packed, *bias;  // [O/16][(m+2)^2][C][16] by winograd_pack; [O] or null
  void* output;
};

}  // namespace pyops::conv
