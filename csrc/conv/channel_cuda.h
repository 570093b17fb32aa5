// The channelwise kernels on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "channel.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::conv {

// For the current device. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of no matter; apply and
// gradient need none. All work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws
// std::runtime_error on a CUDA error. The same call on the same device gives the same bits.
size_t channel_moments_workspace(const Channelwise& p);
void channel_moments(const Channelwise& p, void* workspace, cudaStream_t stream);
void channel_apply(const Channelwise& p, cudaStream_t stream);
size_t channel_totals_workspace(const Channelwise& p);
void channel_totals(const Channelwise& p, void* workspace, cudaStream_t stream);
size_t channel_reduce_workspace(const Channelwise& p);
void channel_reduce(const Channelwise& p, void* workspace, cudaStream_t stream);
void channel_gradient(const Channelwise& p, cudaStream_t stream);

}  // namespace pyops::conv
