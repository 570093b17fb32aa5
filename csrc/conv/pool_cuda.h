// The pooling kernels on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "pool.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::conv {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All work is
// queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error, or for
// more than 2^30 positions. The same call on the same device gives the same bits.
void pool_run(const Pooling& p, cudaStream_t stream);
size_t pool_reduce_workspace(const Pooling& p);
void pool_reduce(const Pooling& p, void* workspace, cudaStream_t stream);
void pool_gradient(const Pooling& p, cudaStream_t stream);

}  // namespace pyops::conv
