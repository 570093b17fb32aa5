// Sampling on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "gaussian.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::sampling {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All work is
// queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error. The
// same call gives the same bits.
size_t gaussian_workspace(const Gaussian& p);
void gaussian(const Gaussian& p, void* workspace, cudaStream_t stream);
void gaussian_gradient(const Gaussian& p, cudaStream_t stream);

}  // namespace pyops::sampling
