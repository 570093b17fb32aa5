// What the norms over an image's channels compute, and the parameter blocks that reach them. No torch type below this line of the house.
//
// Images [N, P, C] with `rows`, else planes [N, C, P]: N images, P positions, C channels; dense. Vectors are float.
//
// local response normalisation, a = relu(input) with `relu`, else input:
//   d[c]      = k + alpha / size * sum of a[j]^2 over the channels j = c - size/2 .. c + (size-1)/2 that exist
//   output[c] = a[c] / d[c]^beta
//   gradient: output[c] = grad[c] / d[c]^beta - 2*alpha*beta/size * a[c] * sum of grad[j]*a[j]/d[j]^(beta+1) over the outputs j that
//             read channel c: c - (size-1)/2 .. c + size/2; zero where `relu` and input <= 0
// LayerNorm, mean and variance over a position's C channels, z = (input - mean) / sqrt(variance + eps):
//   output = z * weight + bias
//   gradient: output = (h - mean(h) - z * mean(h*z)) / sqrt(variance + eps), h = grad * weight, means over channels;
//             sums [2, C] = sums over all positions of grad*z and of grad. Zeros for no positions.
//
// Sums are added anew for each result, none slides; the variance is the mean square of deviations from the mean. A gradient's output
// may not be its grad. Floors: each image read once, each result written once.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::norm {

using conv::DType;

struct LocalResponse {
  int64_t N, P, C, size;  // size: 1 or more; may exceed C
  DType dtype;            // of input, grad, output
  int32_t rows, relu;     // of bool
  float alpha, beta, k;
  const void *input, *grad;  // grad: in the gradient alone
  void* output;
};

struct LayerNorm {
  int64_t N, P, C;
  DType dtype;  // of input, grad, output
  int32_t rows;
  float eps;
  const void *input, *grad;    // grad: in the gradient alone
  const float *weight, *bias;  // [C]; null: ones, zeros
  void* output;                // in the gradient null where not wanted
  float* sums;                 // [2, C], of the gradient
};

}  // namespace pyops::norm
