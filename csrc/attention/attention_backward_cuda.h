// Attention's gradients on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "attention.h"
#include "window_attention.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::attention {

// Heads are of up to 128. The gradients of keys and values are a block's registers: of 384, 256 or 128 keys with heads of up to 32, 64 or
// 128. Sequences have any number of queries, and of keys, which take several passes then; windows no more tokens than these.
constexpr int64_t most_gradient_tokens(int64_t D) { return D <= 32 ? 384 : D <= 64 ? 256 : 128; }

// For the current device; bfloat16 and float16. `workspace`: as many bytes as asked for with the same block, 256-byte aligned, contents of
// no matter. All work is queued on `stream`: nothing is allocated, nothing waits, capturable into a CUDA graph. Throws std::runtime_error
// on a CUDA error. The same call on the same device gives the same bits.
size_t attention_gradient_workspace(const AttentionGradient& g);
void attention_gradient_cuda(const AttentionGradient& g, void* workspace, cudaStream_t stream);
size_t window_attention_gradient_workspace(const WindowAttention& p);
void window_attention_gradient_cuda(const WindowAttention& p, void* workspace, cudaStream_t stream);

}  // namespace pyops::attention
