// The linear layer of a few rows on the CPU: how many threads, and the kernel of the machine's instruction set.
#include "linear_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::linear {

void linear_cpu(const Linear& p) {
  constexpr int64_t kPerThread = 64 << 10;  // bytes of weights: about 2 us
  const int64_t bytes = p.N * p.K * (p.dtype == DType::f32 ? 4 : 2);
  const int threads = static_cast<int>(std::clamp<int64_t>(bytes / kPerThread, 1, cpu::max_threads()));
  PYOPS_CPU_KERNEL(linear)(p, threads);
}

}  // namespace pyops::linear
