// What every depthwise convolution kernel computes, and the parameter blocks that reach it. No torch type below this line of the house.
//
// Names: N images, C channels, H x W input and OH x OW output positions, KH x KW taps.
//   z[n,y,x,c] = bias[c] + sum over taps of weight[c,ky,kx] * input[n, y*stride_h - pad_h + ky*dilation_h, x*stride_w - ... , c] +
//   residual[n,y,x,c] output = activation(z);   means[n,c] = mean over y, x of output
// Zero padding. OH = (H + 2*pad_h - dilation_h*(KH-1) - 1) / stride_h + 1, and OW likewise. Products, sums, activation and means in float.
//
// Activations are tensor memory's best friend: every tensor [N, H, W, C] is dense with channels innermost (torch's channels_last).
// Backward recomputes z (a depthwise convolution costs less than reading z back); with activation none it never needs it.
#pragma once
#include <cstdint>

namespace pyops::conv {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
enum class Activation : int32_t {
  none = 0,
  relu = 1,
  relu6 = 2,
  silu = 3,
  hardswish = 4,
  gelu = 5,
  sigmoid = 6,
  leaky_relu = 7,
  tanh = 8,
  hardsigmoid = 9
};  // gelu: the exact one, with erf
enum class Pool : int32_t { none, maximum, average };  // of whole 2x2 windows of a finished output

struct DepthwiseShape {
  int64_t N, H, W, C, OH, OW;
  int32_t KH, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct DepthwiseForward {
  DepthwiseShape s;
  DType dtype;         // of input, residual, output
  DType weight_dtype;  // of weight and bias: dtype or f32 (folded weights keep f32)
  Activation activation;
  float slope;           // leaky_relu's
  const void* input;     // [N, H, W, C]
  const void* weight;    // [C, KH, KW], as torch stores [C, 1, KH, KW]
  const void* bias;      // [C] or null
  const void* residual;  // [N, OH, OW, C] or null
  void* output;          // [N, OH, OW, C]
  float* means;          // [N, C] or null
};

struct DepthwiseBackward {
  DepthwiseShape s;
  DType dtype, weight_dtype;
  Activation activation;
  float slope;
  const void* grad_output;  // [N, OH, OW, C] or null: zeros
  const float* grad_means;  // [N, C] or null
  const void *input, *weight, *bias, *residual;
  void* grad_input;     // null: not wanted
  float* grad_weight;   // [C, KH, KW]; null: not wanted
  float* grad_bias;     // [C]; null: not wanted
  void* grad_residual;  // [N, OH, OW, C], the gradient of z; null: not wanted
};

}  // namespace pyops::conv
