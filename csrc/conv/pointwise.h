// What the 1x1 convolution's kernels compute, and the parameter block that reaches them. No torch type below this line of the house.
//
// M = N*P positions, C input and O output channels; position m belongs to image m / P. Vectors are float.
//   x = (input[m][c] - rows[0][m]) * rows[1][m]           rows [2, M]: LayerNorm's mean and 1/std of each position; null: x = input
//   a = activation_in((x - mean[c]) * scale[c] + shift[c])  affine [3, C] = mean, scale, shift; null: activation_in(x)
//   a = a * gate[n,c]                                     null: 1
//   y[m][o] = sum over c of weight[o][c] * a[m][c]        products summed in float
//   output[m][o] = activation((y + bias[o]) * keep[n] + residual[m][o])
//   moments [2, O] = mean and sum of squared deviations of the stored output over m (channel.h), where asked for
// Where the product takes 16-bit operands a is rounded to dtype; float operands are products of full floats, or of tf32 with `tf32`.
//
// Floors: input, residual read once, output written once; 2*M*C*O flops.
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct Pointwise {
  int64_t N, P, C, O;
  int64_t input_stride, residual_stride, output_stride;  // elements from one position to the next
  DType dtype;                                           // of input, residual, output
  DType weight_dtype;                                    // dtype or f32
  Activation input_activation, activation;
  float input_slope, slope;                         // leaky_relu's
  bool tf32;                                        // f32 images on a GPU: tensor cores may round operands to tf32
  bool packed;                                      // f32 on a CPU: weight is [O/16][C][16], zeros beyond O
  const void *input, *weight, *residual;            // weight [O, C]
  const float *rows, *affine, *gate, *bias, *keep;  // any may be null
  void* output;
  float* moments;  // [2, O] or null
};

}  // namespace pyops::conv
