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
  // Pieces of at most `most`, as many for each member, and up to kPieces of them where they keep `enough` each.
  const auto cut = [&](int64_t count, int64_t most, int64_t enough) {
    if (plan.threads == 1) return (count + most - 1) / most;
    const int64_t needed = (count + most * plan.threads - 1) / (most * plan.threads);
    return std::min(count, std::max(needed, std::min(kPieces, count / (enough * plan.threads))) * plan.threads);
  };
  const int64_t most = std::clamp<int64_t>(kBuffers / per_tile / 6 * 6, 12, 96), blocks = (p.O + 15) / 16;
  plan.chunks = plan.together ? (plan.tiles + most - 1) / most : cut(plan.tiles, most, kFew);
  plan.panels = plan.together ? cut(blocks, 4, 3) : (blocks + 3) / 4;
  plan.chunk = (plan.tiles + plan.chunks - 1) / plan.chunks;
  return plan;
}

void winograd_pack(const WinogradFilter& p) { PYOPS_CPU_KERNEL(winograd_filter)(p); }

void winograd_cpu(const Winograd& p) { PYOPS_CPU_KERNEL(winograd)(p); }

}  // namespace pyops::conv
