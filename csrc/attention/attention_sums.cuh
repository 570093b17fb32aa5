// The sums that attention's gradients leave in shares, a block's in a row of its own, put together in order: in attention_sums.cu.
#pragma once
#include "../common/launch.cuh"
#include "attention.h"
#include "window_attention.h"

namespace pyops::attention {

// to [width] = the sums over shares [slots, width]; a single share may be `to` itself.
void merge_shares(const float* shares, float* to, int64_t slots, int64_t width, cudaStream_t stream);

// ds [copies, heads, keys, pitch], transposed as the kernels leave it.
struct ScoreSums {
  const float* data;
  int heads, keys, pitch;
};

// grad_bias from the ds of the whole batch (one copy) or of each sequence.
void fold_bias(const AttentionGradient& g, const ScoreSums& sums, cudaStream_t stream);

// grad_table: each entry from the pairs of tokens that read it.
void fold_table(const WindowAttention& p, const ScoreSums& sums, cudaStream_t stream);

}  // namespace pyops::attention
