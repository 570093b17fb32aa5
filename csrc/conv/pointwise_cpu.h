// CPU side of the 1x1 convolution: the entry point, and what pointwise_cpu.cpp (compiled once) and the kernels (compiled per instruction
// set) share.
#pragma once
#include "../common/parallel.h"
#include "pointwise.h"

namespace pyops::conv {

void pointwise_cpu(const Pointwise& p);

constexpr int64_t kPointwiseTile = 64;  // positions

// How the work is cut: chunks of positions, of whole tiles but for the last, and parts of the output's blocks of 16 channels where there
// are fewer chunks than threads. Chunks depend on sizes alone: each has moments of its own.
struct PointwisePlan {
  int threads;
  int64_t tiles, chunks, parts;
};
PointwisePlan plan_pointwise(const Pointwise& p);

#define PYOPS_POINTWISE_KERNELS(isa)  \
  namespace isa {                     \
  void pointwise(const Pointwise& p); \
  }
PYOPS_POINTWISE_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_POINTWISE_KERNELS(avx2)
PYOPS_POINTWISE_KERNELS(avx512)
#endif

}  // namespace pyops::conv
