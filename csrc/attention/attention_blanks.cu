// Zeros for the rows of a tensor [B, heads, rows, D] that belong to no sequence, which no other kernel writes, and -inf for their lse.
//
// A warp has a row of a head. It looks at the span of its batch, or in a ragged batch (B = 1) at all of them, a span a lane at a time.
// Floor: the rows written once.
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "attention_cuda.h"

namespace pyops::attention {
namespace {

constexpr int kWarps = 8;

struct BlankParams {
  Heads to;
  float* lse;
  const int32_t* spans;
  int64_t all;                      // rows of all heads and batches
  int B, S, heads, rows, D, first;  // first: where a span has its first row or column
};

PYOPS_KERNEL(kWarps* kWarpSize)
attention_blanks(BlankParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (number >= p.all) return;
  const int row = static_cast<int>(number % p.rows);
  const int64_t head = number / p.rows % p.heads, batch = number / p.rows / p.heads;
  const int from = p.B > 1 ? static_cast<int>(batch) : 0, to = p.B > 1 ? from + 1 : p.S;
  bool covered = false;
  for (int s = from + lane; s < to; s += kWarpSize) {
    const int32_t* const span = p.spans + int64_t{4} * s + p.first;
    covered |= row >= (span[0] < 0 ? 0 : span[0]) && row - int64_t{span[0] < 0 ? 0 : span[0]} < span[1];
  }
  if (__any_sync(0xffffffffu, covered)) return;
  uint16_t* const own = static_cast<uint16_t*>(p.to.data) + batch * p.to.batch + head * p.to.head + row * p.to.row;
  for (int i = lane; i < p.D; i += kWarpSize) own[i] = 0;
  if (lane == 0 && p.lse) p.lse[number] = -__builtin_huge_valf();
}

}  // namespace

void attention_blanks_cuda(const Attention& p, const Heads& to, int64_t heads, float* lse, bool columns, cudaStream_t stream) {
  BlankParams params{to, lse, p.spans, 0, static_cast<int>(p.B), static_cast<int>(p.S), static_cast<int>(heads), 0, 0, columns ? 2 : 0};
  params.rows = static_cast<int>(columns ? p.M : p.N), params.D = static_cast<int>(p.D), params.all = p.B * heads * params.rows;
  if (params.all == 0 || (!p.spans && p.S > 0)) return;  // no sequences: spans of none have no address
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(params.all, int64_t{kWarps}))), kWarps * kWarpSize, 0};
  launch("attention_blanks", attention_blanks, shape, stream, params);
}

static const KernelRegistration registration({{"attention_blanks", reinterpret_cast<const void*>(&attention_blanks)}});

}  // namespace pyops::attention
