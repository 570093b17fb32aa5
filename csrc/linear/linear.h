// What the linear layer of a few rows computes, and the parameter block that reaches it. No torch type below this line of the house.
//
//   output[m][n] = activation(sum over k of input[m][k] * weight[n][k] + bias[n] + residual[m][n])
//
// Sums in float. Floors: weight read once over memory (or cache) bandwidth; 2*M*N*K flops.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::linear {

using conv::Activation;
using conv::DType;

constexpr int64_t kMostRows = 4;

struct Linear {
  int64_t M, N, K;  // M <= kMostRows
  DType dtype;      // of input, weight, residual, output
  Activation activation;
  float slope;
  const void *input, *weight, *residual;
  const float* bias;
  void* output;
};

}  // namespace pyops::linear
