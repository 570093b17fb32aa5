// Batch norm, activation and pooling on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "pool_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::conv {

PoolPlan plan_pool(int64_t rows, int64_t values) {
  constexpr int64_t kChunk = 16384;  // values; about 5 us
  PoolPlan plan{};
  plan.rows = rows;
  plan.chunks = std::clamp<int64_t>(std::min(rows, rows * values / kChunk), 1, 32);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), plan.chunks));
  return plan;
}

void pool_cpu(const Pooling& p) { PYOPS_CPU_KERNEL(pool_run)(p); }
void pool_reduce_cpu(const Pooling& p) { PYOPS_CPU_KERNEL(pool_reduce)(p); }
void pool_gradient_cpu(const Pooling& p) { PYOPS_CPU_KERNEL(pool_gradient)(p); }

}  // namespace pyops::conv
