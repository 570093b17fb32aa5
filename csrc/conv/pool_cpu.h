// CPU side of batch norm, activation and pooling: the entry points, and what pool_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "pool.h"

namespace pyops::conv {

void pool_cpu(const Pooling& p);
void pool_reduce_cpu(const Pooling& p);
void pool_gradient_cpu(const Pooling& p);

// How `rows` rows of `values` values each are cut: chunks of neighbouring rows, which depend on sizes alone, and threads for them.
struct PoolPlan {
  int threads;
  int64_t rows, chunks;
};
PoolPlan plan_pool(int64_t rows, int64_t values);

#define PYOPS_POOL_KERNELS(isa)         \
  namespace isa {                       \
  void pool_run(const Pooling& p);      \
  void pool_reduce(const Pooling& p);   \
  void pool_gradient(const Pooling& p); \
  }
PYOPS_POOL_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_POOL_KERNELS(avx2)
PYOPS_POOL_KERNELS(avx512)
#endif

}  // namespace pyops::conv
