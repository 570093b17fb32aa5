// Winograd convolution on the CPU: the cut of the work, and the kernel of the machine's instruction set.
#include "winograd_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::conv {

WinogradPlan plan_winograd(const Winograd& p) {
  constexpr int64_t kPerThread = 400000;   // products, about 5 us
  constexpr int64_t kBuffers = 640 << 10;  // of a chunk: most of L2 (1 MiB on Zen 4)
  constexpr int64_t kPieces = 4;           // of a thread, where they are not too small
  constexpr int64_t kFew = 24;             // tiles: fewer rows than that leave the filters' way from L3 in sight
  WinogradPlan plan{};
  const int64_t points = (p.m + 2) * (p.m + 2), OH = p.H + 2 * p.pad_h - 2, OW = p.W + 2 * p.pad_w - 2;
  plan.tiles_h = (OH + p.m - 1) / p.m, plan.tiles_w = (OW + p.m - 1) / p.m;
  plan.tiles = p.N * plan.tiles_h * plan.tiles_w;
  const int64_t work = plan.tiles * points * p.C * p.O / kPerThread;
  plan.threads = static_cast<int>(std::clamp<int64_t>(work, 1, cpu::max_threads()));
  plan.together = plan.threads > 1 && plan.tiles < kFew * plan.threads;
  const int64_t per_tile = points * static_cast<int64_t>(sizeof(float)) * (p.C + 16 + 64);
  const int64_t most = std::clamp<int64_t>(kBuffers / per_tile / 6 * 6, 12, 96), pieces = plan.threads > 1 ? kPieces * plan.threads : 1;
  plan.chunks = (plan.tiles + most - 1) / most;
  if (!plan.together) {  // as many for each member
    const int64_t each = std::max((plan.chunks + plan.threads - 1) / plan.threads, std::min(kPieces, plan.tiles / (kFew * plan.threads)));
    plan.chunks = each * plan.threads;
  }
  plan.chunk = (plan.tiles + plan.chunks - 1) / plan.chunks;
  const int64_t blocks = (p.O + 15) / 16, panels = (blocks + 3) / 4;
  plan.panels = plan.together ? std::max(panels, std::min(pieces, blocks / 2)) : panels;
  return plan;
}

void winograd_pack(const WinogradFilter& p) { PYOPS_CPU_KERNEL(winograd_filter)(p); }

void winograd_cpu(const Winograd& p) { PYOPS_CPU_KERNEL(winograd)(p); }

}  // namespace pyops::conv
