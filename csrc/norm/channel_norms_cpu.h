// CPU side of the norms over channels: the entry points, and what channel_norms_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "channel_norms.h"

namespace pyops::norm {

void lrn_cpu(const LocalResponse& p);
void lrn_gradient_cpu(const LocalResponse& p);
void layer_norm_cpu(const LayerNorm& p);
void layer_norm_gradient_cpu(const LayerNorm& p);

// How the work is cut: units are positions of rows, or blocks of `block` positions of a plane; runs of units are chunks. A chunk has sums
// of its own, and its cut depends on sizes alone.
struct NormPlan {
  int threads;
  int64_t block, blocks, units, chunks;
  int64_t begin(int64_t chunk) const { return units * chunk / chunks; }
};
// widest: the most positions of a block, a multiple of `lanes`; sums: of a chunk.
NormPlan plan_norm(int64_t N, int64_t P, int64_t C, bool rows, int64_t widest, int64_t lanes, int64_t sums);

#define PYOPS_NORM_KERNELS(isa)                 \
  namespace isa {                               \
  void lrn(const LocalResponse& p);             \
  void lrn_gradient(const LocalResponse& p);    \
  void layer_norm(const LayerNorm& p);          \
  void layer_norm_gradient(const LayerNorm& p); \
  }
PYOPS_NORM_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_NORM_KERNELS(avx2)
PYOPS_NORM_KERNELS(avx512)
#endif

}  // namespace pyops::norm
