// What an MBConv kernel computes at inference, batch norms folded, and the parameter blocks that reach it. No torch type below this
// line of the house.
//
//   x [N,H,W,C] -> expand 1x1 + bias + activation -> depthwise KxK, padding K/2, stride 1 or more + bias + activation = y [N,OH,OW,E]
//   gates = gate_activation(gate(squeeze_activation(squeeze(mean of y)))), [N,E]
//   output [N,OH,OW,O] = project(y * gates) + bias (+ x)
// Without expand E = C and x goes straight to the depthwise convolution; S = 0 has no gates. OH = (H - 1) / stride + 1, and OW likewise.
// Sums, activations, means and gates in float. Images are dense [N, H, W, C]; mixed-precision weights are packed as bfloat16 pairs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "depthwise.h"

namespace pyops::conv {

struct MBConvSizes {
  int64_t C, E, S, O;  // channels: input, expanded, squeezed (0: no gates), output
  int32_t K;           // odd
  bool expand;
};

// Weights as torch stores them, float32; null where the sizes say there are none.
struct MBConvWeights {
  const float *expand, *expand_bias;        // [E, C], [E]
  const float *depthwise, *depthwise_bias;  // [E, K, K], [E]
  const float *squeeze, *squeeze_bias;      // [S, E], [S]
  const float *gate, *gate_bias;            // [E, S], [E]
  const float *project, *project_bias;      // [O, E], [O]
};

struct MBConvForward {
  MBConvSizes sizes;
  int64_t N, H, W;
  int32_t stride;
  bool residual;  // C = O, stride 1
  DType dtype;    // of input and output
  Activation activation, squeeze_activation, gate_activation;
  const void* input;
  const void* packed;  // by mbconv_pack
  void* output;
};

}  // namespace pyops::conv
