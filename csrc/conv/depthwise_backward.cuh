// What the files of the depthwise convolution's backward pass share: from dz, the gradient of z, to the other gradients.
#pragma once
#include "depthwise.cuh"

namespace pyops::conv {

struct GradientParams {
  Dims d;
  Cut cut;
  bool weight_is_float;
  int chunk;                        // generic kernels: taps in shared memory at once
  const void *dz, *input, *weight;  // [N, OH, OW, C], [N, H, W, C], [C, KH, KW]
  void* grad_input;                 // [N, H, W, C] or null
  float* partials;                  // [slots, KH * KW + 1, C], the bias's gradient last; or null
};

// dz = activation'(z) * (grad_output + grad_means / (OH*OW)), z computed again.
void depthwise_gradient_launch(const DepthwiseBackward& p, void* dz, cudaStream_t stream);

// Any size, stride and dilation: one kernel for each of the gradients.
Cut generic_weight_cut(const Dims& d, int V);
void generic_gradients_launch(DType dtype, int V, GradientParams params, cudaStream_t stream);

}  // namespace pyops::conv
