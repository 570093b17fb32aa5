// What the fused MLP computes, and the parameter block that reaches it. No torch type below this line of the house.
//
//   x = (input[m] - mean) / sqrt(variance + eps) over the row's C values with `norm` (LayerNorm; its affine is in weights), else input[m]
//   output[m] = second @ activation(first @ x + first_bias) + second_bias + residual[m]
//
// first [H, C], second [O, H]. Sums, activation and statistics in float. The hidden rows [M, H] never reach memory.
// Floors: 2*M*H*(C + O) flops; input, residual and output over memory bandwidth, weights over that of the cache they fit.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::linear {

using conv::Activation;
using conv::DType;

struct MlpSizes {
  int64_t C, H, O;
};

struct MlpWeights {
  DType dtype;  // f32 or bf16; on a GPU f16 as well
  const void *first, *second;
  const float *first_bias, *second_bias;  // [H], [O]
};

struct Mlp {
  MlpSizes sizes;
  int64_t M;
  DType dtype;  // of input, residual, output
  bool norm, pairs;
  float eps, slope;
  Activation activation;
  const void *input, *residual;
  const float* packed;
  void* output;
};

}  // namespace pyops::linear
