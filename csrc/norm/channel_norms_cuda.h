// The norms over channels on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "channel_norms.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::norm {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter. All work is
// queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error. The
// same call on the same device gives the same bits.
void lrn(const LocalResponse& p, cudaStream_t stream);
size_t lrn_gradient_workspace(const LocalResponse& p);
void lrn_gradient(const LocalResponse& p, void* workspace, cudaStream_t stream);
void layer_norm(const LayerNorm& p, cudaStream_t stream);
size_t layer_norm_gradient_workspace(const LayerNorm& p);
void layer_norm_gradient(const LayerNorm& p, void* workspace, cudaStream_t stream);

}  // namespace pyops::norm
