// CPU side of the depthwise convolution: the entry points, and what depthwise_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "depthwise.h"

namespace pyops::conv {

// What is convolved instead of the input, inside the image: activation((input - mean) * scale + bias), computed as rows are staged.
// Backward then gives the gradient of that.
struct DepthwisePrologue {
  const float* affine = nullptr;  // [3, C] = mean, scale, bias; null: the input itself
  Activation activation = Activation::none;
  float slope = 0.f;
};

void depthwise_forward_cpu(const DepthwiseForward& p, const DepthwisePrologue& before = {});
void depthwise_backward_cpu(const DepthwiseBackward& p, const DepthwisePrologue& before = {});

// How the work is cut: items are (image, band of rows, group of 16-channel blocks), groups fastest, and thread t of T takes the t-th
// of T even runs of them.
struct DepthwisePlan {
  int threads;
  int64_t blocks, group, groups, bands;  // group: blocks of the largest group
  int64_t first_block(int64_t g) const { return blocks * g / groups; }
};
// block_bytes: scratch that one block of channels takes while an item is worked on.
DepthwisePlan plan_depthwise(const DepthwiseShape& s, int64_t block_bytes);

#define PYOPS_DEPTHWISE_KERNELS(isa)                                                    \
  namespace isa {                                                                       \
  void depthwise_forward(const DepthwiseForward& p, const DepthwisePrologue& before);   \
  void depthwise_backward(const DepthwiseBackward& p, const DepthwisePrologue& before); \
  }
PYOPS_DEPTHWISE_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_DEPTHWISE_KERNELS(avx2)
PYOPS_DEPTHWISE_KERNELS(avx512)
#endif

}  // namespace pyops::conv
