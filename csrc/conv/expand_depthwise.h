// What the fused expansion and depthwise convolution computes (the first two convolutions of an inverted-residual block), and the
// parameter block that reaches it. No torch type below this line of the house.
//
// Names: N images, C input and E expanded channels, H x W input and OH x OW output positions, K x K taps, padding K / 2.
//   e[n,y,x,c] = activation(expand_bias[c] + sum over i of expand_weight[c,i] * input[n,y,x,i])      rounded to dtype; never in memory
//   output     = activation(depthwise_bias[c] + sum over taps of depthwise_weight[c,ky,kx] * e[n, y*stride - K/2 + ky, ..., c])
//   means[n,c] = mean over y, x of output, before it is rounded
// Outside the image e is zero. OH = (H - 1) / stride + 1, and OW likewise. 16-bit operands of the expansion are multiplied as they are,
// float ones rounded to tf32; products, sums, activations and means are float.
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct ExpandDepthwise {
  int64_t N, H, W, C, E, OH, OW;
  int64_t input_stride;                                  // elements from one position to the next; output is dense
  int32_t K, stride;                                     // 3, 5 or 7; 1 or 2
  DType dtype;                                           // of input and output
  DType expand_weight_dtype, depthwise_weight_dtype;     // dtype or f32
  Activation activation;                                 // of both
  float slope;                                           // leaky_relu's
  const void *input, *expand_weight, *depthwise_weight;  // weights [E, C] and [E, K, K]
  const float *expand_bias, *depthwise_bias;             // [E] or null
  void* output;
  float* means;  // [N, E] or null
};

}  // namespace pyops::conv
