// The depthwise convolution on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "depthwise.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::conv {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All
// work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA
// error, or for images too large to index.
size_t depthwise_forward_workspace(const DepthwiseForward& p);
void depthwise_forward(const DepthwiseForward& p, void* workspace, cudaStream_t stream);
size_t depthwise_backward_workspace(const DepthwiseBackward& p);
void depthwise_backward(const DepthwiseBackward& p, void* workspace, cudaStream_t stream);

}  // namespace pyops::conv
