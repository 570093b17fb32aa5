// What attention's gradients leave to be summed: the bias' gradient over the dimensions that it is broadcast over, the relative-position
// table's over the pairs of tokens that read an entry, and shares of blocks.
//
//   ds [copies, heads, keys, pitch]  ->  grad_bias [1 or S, 1 or H, 1 or N', 1 or M'] or grad_table [entries, heads]
//
// A result is one thread's, or with many terms a warp's, whose lanes take them in turn: in the same order whatever the GPU.
// Floors: ds read once, results written once.
#include "attention_sums.cuh"

#include "../common/cuda_registry.h"
#include "../conv/vectors.cuh"

namespace pyops::attention {
namespace {

constexpr int kFoldThreads = 256;
constexpr int kFewTerms = 16;  // up to which a thread has a result for itself

struct MergeParams {
  const float* shares;  // [slots, width]
  float* to;
  int64_t slots, width;
};

PYOPS_KERNEL(kFoldThreads)
attention_merge_shares(MergeParams p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (column >= p.width) return;
  conv::Sum sum;
  for (int64_t slot = 0; slot < p.slots; ++slot) sum.add(p.shares[slot * p.width + column]);
  p.to[column] = sum.total;
}

struct FoldBiasParams {
  ScoreSums sums;
  float* to;
  int64_t total, sizes[4];
  int H, N, M, lanes;
};

struct Range {
  int begin, count;
};
// What a result at `place` of a dimension of `size` is summed over, of `extent`.
PYOPS_DEVICE Range range_of(int64_t size, int place, int extent) {
  if (size == 1) return {0, extent};
  return {place, place < extent ? 1 : 0};
}

PYOPS_KERNEL(kFoldThreads)
attention_fold_bias(FoldBiasParams p) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x) / p.lanes;
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t own = item < p.total ? item : p.total - 1, row_at = own / p.sizes[3], head_at = row_at / p.sizes[2];
  const Range columns = range_of(p.sizes[3], static_cast<int>(own % p.sizes[3]), p.M);
  const Range rows = range_of(p.sizes[2], static_cast<int>(row_at % p.sizes[2]), p.N);
  const Range heads = range_of(p.sizes[1], static_cast<int>(head_at % p.sizes[1]), p.H);
  const float* const from = p.sums.data + head_at / p.sizes[1] * p.H * p.sums.keys * p.sums.pitch;
  const int64_t count = int64_t{heads.count} * rows.count * columns.count;
  conv::Sum sum;
  for (int64_t i = lane; i < count; i += p.lanes) {
    const int row = rows.begin + static_cast<int>(i % rows.count), pair = static_cast<int>(i / rows.count);
    const int column = columns.begin + pair % columns.count, head = heads.begin + pair / columns.count;
    sum.add(from[(static_cast<int64_t>(head) * p.sums.keys + column) * p.sums.pitch + row]);
  }
  float total = sum.total;
  for (int mask = p.lanes / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
  if (lane == 0 && item < p.total) p.to[item] = total;
}

struct FoldTableParams {
  ScoreSums sums;
  float* to;
  int entries, wh, ww;
};

PYOPS_KERNEL(kFoldThreads)
attention_fold_table(FoldTableParams p) {
  const int item = static_cast<int>(blockIdx.x) * kFoldThreads + static_cast<int>(threadIdx.x);
  if (item >= p.entries * p.sums.heads) return;
  const int head = item / p.entries, entry = item % p.entries;
  const int down = entry / (2 * p.ww - 1) - p.wh + 1, right = entry % (2 * p.ww - 1) - p.ww + 1;  // from key to query
  const float* const from = p.sums.data + static_cast<int64_t>(head) * p.sums.keys * p.sums.pitch;
  conv::Sum sum;
  for (int row = down < 0 ? -down : 0; row < p.wh && row + down < p.wh; ++row)
    for (int column = right < 0 ? -right : 0; column < p.ww && column + right < p.ww; ++column) {
      const int key = row * p.ww + column, query = (row + down) * p.ww + column + right;
      sum.add(from[static_cast<int64_t>(key) * p.sums.pitch + query]);
    }
  p.to[static_cast<int64_t>(entry) * p.sums.heads + head] = sum.total;
}

}  // namespace

void merge_shares(const float* shares, float* to, int64_t slots, int64_t width, cudaStream_t stream) {
  if (shares == to) return;
  const int64_t blocks = ceil_div(width, int64_t{kFoldThreads});
  if (blocks > INT32_MAX) throw std::runtime_error("attention's gradient: too many sums for one launch");
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), kFoldThreads, 0};
  launch("attention_merge_shares", attention_merge_shares, shape, stream, MergeParams{shares, to, slots, width});
}

void fold_bias(const AttentionGradient& g, const ScoreSums& sums, cudaStream_t stream) {
  const Attention& a = g.forward;
  FoldBiasParams p{sums, g.grad_bias, 1, {}, static_cast<int>(a.H), static_cast<int>(a.N), static_cast<int>(a.M), 1};
  const int64_t extents[4] = {1, a.H, a.N, a.M};
  int64_t terms = 1;
  for (int d = 0; d < 4; ++d) {
    p.sizes[d] = a.bias.sizes[d], p.total *= p.sizes[d];
    if (p.sizes[d] == 1) terms *= extents[d];
  }
  if (p.total == 0) return;
  p.lanes = terms > kFewTerms ? kWarpSize : 1;
  const int64_t blocks = ceil_div(p.total * p.lanes, int64_t{kFoldThreads});
  if (blocks > INT32_MAX) throw std::runtime_error("attention's gradient: the bias is too large for one launch");
  launch("attention_fold_bias", attention_fold_bias, {dim3(static_cast<unsigned>(blocks)), kFoldThreads, 0}, stream, p);
}

void fold_table(const WindowAttention& p, const ScoreSums& sums, cudaStream_t stream) {
  const FoldTableParams params{sums, p.grad_table, static_cast<int>(p.entries()), static_cast<int>(p.wh), static_cast<int>(p.ww)};
  const int blocks = ceil_div(params.entries * sums.heads, kFoldThreads);
  launch("attention_fold_table", attention_fold_table, {dim3(static_cast<unsigned>(blocks)), kFoldThreads, 0}, stream, params);
}

static const KernelRegistration registration({
    {"attention_merge_shares", reinterpret_cast<const void*>(&attention_merge_shares)},
    {"attention_fold_bias", reinterpret_cast<const void*>(&attention_fold_bias)},
    {"attention_fold_table", reinterpret_cast<const void*>(&attention_fold_table)},
});

}  // namespace pyops::attention
