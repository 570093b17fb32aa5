// Attention on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include "attention.h"
#include "window_attention.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::attention {

// What the kernels take: keys and values of a head stay in shared memory.
constexpr int64_t kMostRows = 320, kMostColumns = 320, kMostCudaHeadSize = 128;
constexpr int64_t kMostTokens = 304;  // of a window, whose positions are in shared memory as well

// For the current device; bfloat16 and float16. All work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA
// graph. Throws std::runtime_error on a CUDA error. The same call gives the same bits.
void attention_cuda(const Attention& p, cudaStream_t stream);
void window_attention_cuda(const WindowAttention& p, cudaStream_t stream);

// Zeros, and -inf in lse where it is not null, in the rows of `to` [B, heads, rows, D] that are of no sequence; `columns`: rows are a
// sequence's columns. Nothing where every batch is a sequence.
void attention_blanks_cuda(const Attention& p, const Heads& to, int64_t heads, float* lse, bool columns, cudaStream_t stream);

}  // namespace pyops::attention
