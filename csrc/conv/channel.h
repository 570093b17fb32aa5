// What the channelwise kernels compute (batch norm, squeeze-excitation and drop path are made of them), and the parameter block that
// reaches them. No torch type below this line of the house.
//
// Images [N, P, C]: N images, P positions, C channels innermost (torch's channels_last). Vectors are float.
//   z = (input - mean[c]) * scale[c] + bias[c]     affine [3, C] = mean, scale, bias; null: z = input
//   u = z * keep[n] + residual                     either may be null
//   a = activation(u)
//   g = grad * gate[n,c] + offset[n,c]             in gradients: the gradient of a;   du = g * activation'(u);   dz = du * keep[n]
//
// moments:  sums [2, C] = mean over (n, p) of input, and the sum of squared deviations from it; Welford within a run of positions, runs
//           merged by Chan's formula in a fixed order. Zeros for no positions.
// apply:    output = a * gate[n,c] + offset[n,c]
// totals:   sums [N, C] = sum over p of a, or of a * grad where grad is given
// reduce:   sums [2, C] = sums over (n, p) of dz and of dz * (input - mean)
// gradient: output = dz * scale - terms[0][c] - (input - mean) * terms[1][c]   (terms [2, C]; null: zeros), grad_residual = du.
//           output may be grad itself.
// Floors: each image read once, each result written once; arithmetic is nothing beside that but for the activation's exponential.
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct Channelwise {
  int64_t N, P, C;
  DType dtype;  // of input, grad, residual, output, grad_residual
  Activation activation;
  float slope;  // leaky_relu's
  const void *input, *grad, *residual;
  const float *affine, *keep, *gate, *offset, *terms;
  void *output, *grad_residual;
  float* sums;
};

}  // namespace pyops::conv
