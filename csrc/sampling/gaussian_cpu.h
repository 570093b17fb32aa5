// CPU side of sampling: the entry points, and what gaussian_cpu.cpp (compiled once) and the kernels (compiled per instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "gaussian.h"

namespace pyops::sampling {

void gaussian_cpu(const Gaussian& p);
void gaussian_gradient_cpu(const Gaussian& p);

// How the work is cut: rows into segments of up to `columns` columns, by sizes alone; members take runs of neighbouring segments.
struct GaussianPlan {
  int threads;
  int64_t columns, segments;  // segments: of a row
};
GaussianPlan plan_gaussian(int64_t N, int64_t D);

#define PYOPS_GAUSSIAN_KERNELS(isa)          \
  namespace isa {                            \
  void gaussian(const Gaussian& p);          \
  void gaussian_gradient(const Gaussian& p); \
  }
PYOPS_GAUSSIAN_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_GAUSSIAN_KERNELS(avx2)
PYOPS_GAUSSIAN_KERNELS(avx512)
#endif

}  // namespace pyops::sampling
