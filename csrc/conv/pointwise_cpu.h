// CPU side of the 1x1 convolution: the entry point, and what pointwise_cpu.cpp (compiled once) and the kernels (compiled per instruction
// set) share.
#pragma once
#include "../common/parallel.h"
#include "pointwise.h"

namespace pyops::conv {

void pointwise_cpu(const Pointwise& p);

// Backward of float32 images, with what pointwise.h calls a (but for the gate: a = activation((input - mean) * scale + shift)):
//   grad_a[m][c] = sum over o of grad[m][o] * weight[o][c]
//   grad_weight[o][c] = sum over m of grad[m][o] * a[m][c] * gate[n][c]
//   sums[n][c] = sum over p of grad_a * a
struct PointwiseBackward {
  int64_t N, P, C, O;
  Activation activation;
  float slope;
  const float *grad, *input, *weight, *affine, *gate;  // [M, O], [M, C], [O, C], [3, C] or null, [N, C] or null
  float *grad_a, *grad_weight, *sums;                  // [M, C] or null, [O, C], [N, C] or null
};
void pointwise_backward_cpu(const PointwiseBackward& p);

// Items are (image, even share of its positions, 64 at most).
struct PointwiseBackwardPlan {
  int threads;
  int64_t shares;
};
PointwiseBackwardPlan plan_pointwise_backward(const PointwiseBackward& p);

constexpr int64_t kPointwiseTile = 64;  // positions

// How the work is cut: chunks of positions, of whole tiles but for the last, and parts of the output's blocks of 16 channels where there
// are fewer chunks than threads. Chunks depend on sizes alone: each has moments of its own.
struct PointwisePlan {
  int threads;
  int64_t tiles, chunks, parts;
};
PointwisePlan plan_pointwise(const Pointwise& p);

#define PYOPS_POINTWISE_KERNELS(isa)                   \
  namespace isa {                                      \
  void pointwise(const Pointwise& p);                  \
  void pointwise_backward(const PointwiseBackward& p); \
  }
PYOPS_POINTWISE_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_POINTWISE_KERNELS(avx2)
PYOPS_POINTWISE_KERNELS(avx512)
#endif

}  // namespace pyops::conv
