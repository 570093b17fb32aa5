// CPU side of the linear layer of a few rows: the entry point, and the kernels that are compiled per instruction set.
#pragma once
#include "../common/parallel.h"
#include "linear.h"

namespace pyops::linear {

void linear_cpu(const Linear& p);

#define PYOPS_LINEAR_KERNELS(isa)            \
  namespace isa {                            \
  void linear(const Linear& p, int threads); \
  }
PYOPS_LINEAR_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_LINEAR_KERNELS(avx2)
PYOPS_LINEAR_KERNELS(avx512)
#endif

}  // namespace pyops::linear
