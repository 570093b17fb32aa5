// What cross entropy over rows of logits computes, and the parameter block that reaches it. No torch type below this line of the house.
//
//   y         = softcap * tanh(logits / softcap), or logits for a softcap of 0
//   losses[m] = lse(y[m]) - (1 - smoothing) * y[m][target[m]] - smoothing * mean(y[m])
//   with scale, in place: logits[m][v] = scale[m] * (softmax(y[m])[v] - smoothing/V - (1 - smoothing)*(v == target[m])) * y'(logits[m][v])
//
// logits [M, V]; target, scale, losses [M]. Rows of ignore_index: zeros; of another target outside of 0 .. V - 1: NaN. Sums in float of
// exponentials below their row's highest. Floors: logits read once, and written once with scale. Source: Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018 (highest and sum in one pass, on a GPU).
#pragma once
#include "../conv/depthwise.h"

namespace pyops::linear {

using conv::DType;

struct CrossEntropy {
  int64_t M, V, ignore_index;
  DType dtype;  // of logits
  float smoothing, softcap;
  void* logits;
  const int64_t* target;
  const float* scale;  // null: logits stay
  float* losses;
};

}  // namespace pyops::linear
