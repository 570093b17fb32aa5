// Window attention on the CPU: the cut of the gradient's work, and the kernels of the machine's instruction set.
#include "window_attention_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::attention {
namespace {

int threads_for(const WindowAttention& p, int64_t units, int64_t flops_a_pair) {
  constexpr int64_t kShare = 1 << 19;  // flops worth a thread: some 10 us
  const int64_t flops = p.windows() * p.heads * p.tokens() * p.tokens() * flops_a_pair * p.D;
  return static_cast<int>(std::clamp<int64_t>(std::min(units, flops / kShare), 1, cpu::max_threads()));
}

}  // namespace

int window_threads(const WindowAttention& p, int64_t units) { return threads_for(p, units, 4); }

WindowPlan plan_windows(const WindowAttention& p, int64_t head_bytes) {
  constexpr int64_t kLeast = 8, kTasks = 64, kMostBytes = 1 << 18;  // windows of a chunk; tasks of a call; sums of a member: a part of L2
  WindowPlan plan{};
  plan.windows = p.windows();
  plan.chunks = std::clamp<int64_t>(plan.windows / kLeast, 1, kTasks);
  const int64_t most = std::max<int64_t>(1, std::min(p.heads, kMostBytes / head_bytes));
  plan.group = std::clamp<int64_t>(p.heads * plan.chunks / kTasks, 1, most);
  plan.groups = (p.heads + plan.group - 1) / plan.group;
  plan.threads = threads_for(p, plan.chunks * plan.groups, 10);
  return plan;
}

void window_attention_cpu(const WindowAttention& p) { PYOPS_CPU_KERNEL(window_attention)(p); }
void window_attention_gradient_cpu(const WindowAttention& p) { PYOPS_CPU_KERNEL(window_attention_gradient)(p); }

}  // namespace pyops::attention
