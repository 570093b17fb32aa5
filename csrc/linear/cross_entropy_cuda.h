// Cross entropy over rows on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include "cross_entropy.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::linear {

// For the current device, queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error
// on a CUDA error. The same call gives the same bits.
void cross_entropy_cuda(const CrossEntropy& p, cudaStream_t stream);

}  // namespace pyops::linear
