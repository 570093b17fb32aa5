// What the convolution of small images computes, and the parameter block that reaches it. No torch type below this line of the house.
//
//   input [N,H,W,C], filters [KH][KW][C][O padded to 16], any stride, zeros around  ->  y [N,OH,OW,O]
//   output = activation(y + bias); pool: the maximum or the average of each whole 2x2 window of that, [N,OH/2,OW/2,O]
#pragma once
#include "depthwise.h"

namespace pyops::conv {

struct SmallConv {
  int64_t N, C, H, W, O, OH, OW;  // OH, OW before pooling
  int32_t KH, KW, stride_h, stride_w, pad_h, pad_w;
  Pool pool;
  DType dtype;  // of the images
  Activation activation;
  float slope;
  const void* input;
  const float *weight, *bias;  // bias: [O] or null
  void* output;
};

}  // namespace pyops::conv
