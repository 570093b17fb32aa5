// What the pooling kernels compute, and the parameter block that reaches them. No torch type below this line of the house.
//
// N images [N, H, W, C], channels innermost (torch's channels_last), C channels; windows of kernel[0] x kernel[1] positions, stride apart,
// the first of them padding outside the image: OH x OW of them. Vectors are float.
//   u = (input - mean[c]) * scale[c] + bias[c]     affine [3, C] = mean, scale, bias; null: u = input
//   a = activation(u)
//
// run:      output [N, OH, OW, C] = the maximum or the average of a over each window. Padding is never the maximum, and counts as zeros in
//           an average. Of equal values the first is the maximum, and NaN is above all. index_out [N, OH, OW, C] = the place of the maximum
//           in its window, row by row; null: not wanted.
// reduce:   sums [2, C] = sums over (n, y, x) of du and of du * (input - mean), where da = sum over the windows that hold (y, x) of grad,
//           for a maximum where index names (y, x), or of grad / (kernel[0] * kernel[1]) for an average, and du = da * activation'(u)
// gradient: output [N, H, W, C] = du * scale - terms[0][c] - (input - mean) * terms[1][c]     terms [2, C]; null: zeros
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct Pooling {
  int64_t N, C, H, W, OH, OW;
  int32_t kernel[2], stride[2], padding[2];  // of rows and columns
  bool maximum;
  DType dtype;  // of input, grad, output
  Activation activation;
  float slope;               // leaky_relu's
  const void *input, *grad;  // grad [N, OH, OW, C]
  const uint8_t* index;      // of a maximum, in reduce and gradient
  uint8_t* index_out;
  const float *affine, *terms;
  void* output;
  float* sums;
};

}  // namespace pyops::conv
