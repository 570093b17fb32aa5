// The fused expansion and depthwise convolution on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "expand_depthwise.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::conv {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All
// work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA
// error, for a kernel size or stride without an instance, or for more than 2^30 positions or channels. The same call on the same
// device gives the same bits.
size_t expand_depthwise_workspace(const ExpandDepthwise& p);
void expand_depthwise_run(const ExpandDepthwise& p, void* workspace, cudaStream_t stream);

// The tile of outputs that a block computes, and by how much halos multiply the expansion's products.
struct ExpandDepthwiseTile {
  int height, width;
  double recompute;
};
ExpandDepthwiseTile expand_depthwise_tile(const ExpandDepthwise& p);

}  // namespace pyops::conv
