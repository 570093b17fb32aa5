// Routing between capsules on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "routing.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::capsule {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All work is
// queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error, and for
// sizes beyond the kernels'. The same call on the same device gives the same bits.
size_t routing_workspace(const Routing& p, bool gradient);
void routing(const Routing& p, void* workspace, cudaStream_t stream);
void routing_gradient(const Routing& p, void* workspace, cudaStream_t stream);

}  // namespace pyops::capsule
