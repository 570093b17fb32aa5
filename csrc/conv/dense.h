// What the convolution with full or grouped filters computes, its transpose and its filter's gradient, and the parameter blocks that
// reach them. No torch type below this line of the house.
//
// N images of H x W input positions with C channels, OH x OW output positions with O channels, KH x KW taps, `groups` groups.
// Every image is [N, H, W, C], channels innermost. Group j reads input channels j*C/groups .. and gives output channels j*O/groups ..
//
//   convolution   sum[n,y,x,o] = sum over ky, kx, c of weight[o,c,ky,kx] * input[n, y*stride_h - pad_h + ky*dilation_h, ..., c]
//   transposed    sum[n,y,x,o] = sum over ky, kx, c of weight[c,o,ky,kx] * input[n, (y + pad_h - ky*dilation_h) / stride_h, ..., c]
//                 over the taps where the division is exact
//   output = activation(sum + bias + residual), or activation(sum + bias) + residual where residual_last
//   pool: of a convolution the maximum or the average of each whole 2x2 window of that is stored instead, [N, OH/2, OW/2, O]; no moments
//   moments [2, O] = mean and sum of squared deviations of the stored output over positions (channel.h), where asked for
//
//   gradient      grad_weight[o,c,ky,kx] = sum over n, y, x of grad[n,y,x,o] * input[n, y*stride_h - pad_h + ky*dilation_h, ..., c]
//
// Zeros outside the image. Products are summed in float, of operands as stored; of tf32 with `tf32`, where images are float.
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct DenseShape {
  int64_t N, H, W, C, OH, OW, O;
  int32_t KH, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

struct Dense {
  DenseShape s;
  DType dtype;  // of all images and of weight
  Activation activation;
  float slope;  // leaky_relu's
  bool transposed, residual_last, tf32;
  Pool pool;
  int64_t input_stride, residual_stride;  // elements from one position to the next; output is dense
  int64_t weight_strides[4];              // in elements, of [O, C/groups, KH, KW]; transposed: of [C, O/groups, KH, KW]
  const void *input, *weight, *residual;  // residual may be null
  const float* bias;                      // [O] or null
  void* output;
  float* moments;  // [2, O] or null
};

struct DenseGradient {
  DenseShape s;
  DType dtype;
  bool tf32;
  int64_t grad_stride, input_stride;
  const void *grad, *input;
  void* grad_weight;  // [O, C/groups, KH, KW], dense
};

}  // namespace pyops::conv
