// The dense convolution on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>
#include <optional>

#include "dense.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::conv {

// By which kernel: dense_conv.cu's tile, or dense_halo.cu's; chosen by the shape where not said, an error where halo cannot be.
enum class DensePath : int { tile = 0, halo = 1 };

// For the current device. `workspace`: as many bytes as asked for with the same block and path, 256-byte aligned, contents of no matter.
// All work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA
// error, or for more than 2^30 positions or channels. The same call on the same device gives the same bits.
size_t dense_workspace(const Dense& p, std::optional<DensePath> path = std::nullopt);
void dense_run(const Dense& p, void* workspace, cudaStream_t stream, std::optional<DensePath> path = std::nullopt);

size_t dense_wgrad_workspace(const DenseGradient& p);
void dense_wgrad(const DenseGradient& p, void* workspace, cudaStream_t stream);

}  // namespace pyops::conv
