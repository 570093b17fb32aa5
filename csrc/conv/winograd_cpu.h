// CPU side of the Winograd convolution: the entry points, and what winograd_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "winograd.h"

namespace pyops::conv {

struct WinogradFilter {
  int64_t O, C;
  int32_t m;
  const float* weight;  // [O, C, 3, 3]
  float* packed;        // [O/16][(m+2)^2][C][16], zeros beyond O
};
void winograd_pack(const WinogradFilter& p);
void winograd_cpu(const Winograd& p);

// How the work is cut. Members take chunks of tiles as they are free and do everything to them; where tiles are few, all transform
// tiles together and take panels of the output's channels, so that each reads a share of the filters alone.
struct WinogradPlan {
  int threads;
  bool together;
  int64_t tiles_h, tiles_w, tiles;  // of an image in each direction; of all images
  int64_t chunks, chunk;            // of tiles that are transformed, multiplied and transformed back at a time; those of the largest
  int64_t panels;                   // of blocks of 16 output channels
};
WinogradPlan plan_winograd(const Winograd& p);

#define PYOPS_WINOGRAD_KERNELS(isa)              \
  namespace isa {                                \
  void winograd(const Winograd& p);              \
  void winograd_filter(const WinogradFilter& p); \
  }
PYOPS_WINOGRAD_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_WINOGRAD_KERNELS(avx2)
PYOPS_WINOGRAD_KERNELS(avx512)
#endif

}  // namespace pyops::conv
