// Batch norm, activation and pooling on the CPU: the cut of the work, and the kernels of the machine's instruction set.
#include "pool_cpu.h"

#include <algorithm>

namespace pyops::conv {
namespace {

struct Kernels {
  void (*run)(const Pooling&);
  void (*reduce)(const Pooling&);
  void (*gradient)(const Pooling&);
};
#define PYOPS_TABLE(isa) \
  Kernels { isa::pool_run, isa::pool_reduce, isa::pool_gradient }

const Kernels& kernels() {
  static const Kernels table = [] {
#if defined(__x86_64__)
    switch (cpu::cpu_isa()[3]) {  // "avx512", "avx2", "baseline"
      case '5': return PYOPS_TABLE(avx512);
      case '2': return PYOPS_TABLE(avx2);
    }
#endif
    return PYOPS_TABLE(baseline);
  }();
  return table;
}

}  // namespace

PoolPlan plan_pool(int64_t rows, int64_t values) {
  constexpr int64_t kChunk = 16384;  // values; about 5 us
  PoolPlan plan{};
  plan.rows = rows;
  plan.chunks = std::clamp<int64_t>(std::min(rows, rows * values / kChunk), 1, 32);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), plan.chunks));
  return plan;
}

void pool_cpu(const Pooling& p) { kernels().run(p); }
void pool_reduce_cpu(const Pooling& p) { kernels().reduce(p); }
void pool_gradient_cpu(const Pooling& p) { kernels().gradient(p); }

}  // namespace pyops::conv
