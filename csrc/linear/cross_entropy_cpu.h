// CPU side of cross entropy over rows: the entry point, and the kernels that are compiled per instruction set.
#pragma once
#include "../common/parallel.h"
#include "cross_entropy.h"

namespace pyops::linear {

void cross_entropy_cpu(const CrossEntropy& p);

#define PYOPS_CROSS_ENTROPY_KERNELS(isa)                  \
  namespace isa {                                         \
  void cross_entropy(const CrossEntropy& p, int threads); \
  }
PYOPS_CROSS_ENTROPY_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_CROSS_ENTROPY_KERNELS(avx2)
PYOPS_CROSS_ENTROPY_KERNELS(avx512)
#endif

}  // namespace pyops::linear
