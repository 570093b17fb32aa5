// 1x1 convolution on the CPU: the cut of the work, and the kernel of the machine's instruction set.
#include "pointwise_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::conv {

PointwisePlan plan_pointwise(const Pointwise& p) {
  constexpr int64_t kPerThread = 400000, kMostChunks = 64;  // products, about 5 us; chunks: each has its moments
  PointwisePlan plan{};
  const int64_t M = p.N * p.P, blocks = (p.O + 15) / 16;
  plan.tiles = (M + kPointwiseTile - 1) / kPointwiseTile;
  plan.chunks = std::min(plan.tiles, kMostChunks);
  const int64_t work = std::max<int64_t>(1, M * p.C * p.O / kPerThread);
  plan.threads = static_cast<int>(std::min<int64_t>(cpu::max_threads(), work));
  plan.parts = plan.chunks >= 2 * plan.threads ? 1 : std::clamp<int64_t>(blocks / 2, 1, plan.threads);
  return plan;
}

PointwiseBackwardPlan plan_pointwise_backward(const PointwiseBackward& p) {
  const int64_t work = 2 * p.N * p.P * p.C * p.O / 400000;  // products, about 5 us
  PointwiseBackwardPlan plan{};
  const int64_t threads = std::clamp<int64_t>(work, 1, cpu::max_threads()), images = std::max<int64_t>(p.N, 1);
  plan.shares = std::max<int64_t>(1, (p.P + kPointwiseTile - 1) / kPointwiseTile);
  if (images * plan.shares < threads) plan.shares = std::clamp<int64_t>((threads + images - 1) / images, 1, std::max<int64_t>(1, p.P / 8));
  plan.threads = static_cast<int>(std::min(threads, images * plan.shares));
  return plan;
}

void pointwise_backward_cpu(const PointwiseBackward& p) { PYOPS_CPU_KERNEL(pointwise_backward)(p); }

void pointwise_cpu(const Pointwise& p) { PYOPS_CPU_KERNEL(pointwise)(p); }

}  // namespace pyops::conv
