// Cross entropy over rows of logits, which become their own gradient (cross_entropy.h says what is computed).
//
//   logits [M, V];  target, scale, losses [M]
//
// A block has a row; neighbouring threads have neighbouring vectors of 16 bytes, or single logits. The first walk keeps each thread's
// highest logit and its sum of exponentials below that; lanes, then warps, merge theirs in a fixed order. The second walk, for the
// gradient, reads the row from L2. Floors: logits read once, and written once with scale.
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "../conv/vectors.cuh"
#include "cross_entropy_cuda.h"

namespace pyops::linear {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;

// What a walk knows of some of a row's logits.
struct RowSums {
  float top, sum, total;  // the highest, the sum of exponentials below it, the sum
};

// What exponentials below `top` are of those below `next`; one where both are -infinity.
PYOPS_DEVICE float share_of(float top, float next) { return top == next ? 1.f : exact_exp(top - next); }

PYOPS_DEVICE RowSums merged(const RowSums& a, const RowSums& b) {
  const float top = b.top > a.top ? b.top : a.top;
  return {top, a.sum * share_of(a.top, top) + b.sum * share_of(b.top, top), a.total + b.total};
}

// Of the block's threads. Every thread calls it.
PYOPS_DEVICE RowSums over_block(RowSums mine) {
  RowSums* const room = reinterpret_cast<RowSums*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const RowSums other{__shfl_xor_sync(0xffffffffu, mine.top, mask), __shfl_xor_sync(0xffffffffu, mine.sum, mask),
                        __shfl_xor_sync(0xffffffffu, mine.total, mask)};
    mine = merged(mine, other);
  }
  if (thread % kWarpSize == 0) room[thread / kWarpSize] = mine;
  __syncthreads();
  mine = room[0];
  for (int warp = 1; warp < kRowWarps; ++warp) mine = merged(mine, room[warp]);
  return mine;
}

// f(first, values) for each of a thread's vectors; those of a writer are stored back.
template <class T, int V, bool kWrites, class F>
PYOPS_DEVICE void each_vector(T* row, int64_t count, F&& f) {
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * V; at < count; at += kRowThreads * V) {
    float values[V];
    conv::load_channels<T, V>(row + at, values);
    f(at, values);
    if constexpr (kWrites) conv::store_channels<T, V>(row + at, values);
  }
}

template <class T, int V>
PYOPS_KERNEL(kRowThreads)
cross_entropy_rows(CrossEntropy p) {
  const int64_t m = blockIdx.x, target = p.target[m];
  T* const row = static_cast<T*>(p.logits) + m * p.V;
  const bool ignored = target == p.ignore_index, first = threadIdx.x == 0;
  if (ignored || target < 0 || target >= p.V) {
    const float value = ignored ? 0.f : bits_to_float(0x7fc00000u);
    if (first) p.losses[m] = value;
    if (p.scale)
      each_vector<T, V, true>(row, p.V, [&](int64_t, float (&values)[V]) {
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) values[v] = value;
      });
    return;
  }
  const auto bend = [&](float x) { return exact_tanh(x / p.softcap); };
  const auto capped = [&](float x) { return p.softcap == 0.f ? x : p.softcap * bend(x); };
  const float chosen = capped(to_float(row[target]));  // before the barrier: the gradient is written over it
  RowSums sums{conv::kLowest, 0.f, 0.f};
  each_vector<T, V, false>(row, p.V, [&](int64_t, float (&values)[V]) {
    float top = sums.top, sum = 0.f, total = 0.f;
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      values[v] = capped(values[v]);
      top = values[v] > top ? values[v] : top;
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      sum += values[v] == conv::kLowest ? 0.f : exact_exp(values[v] - top);
      total += values[v];
    }
    sums = {top, sums.sum * share_of(sums.top, top) + sum, sums.total + total};
  });
  sums = over_block(sums);
  if (first) {
    float loss = exact_log(sums.sum) + (1.f - p.smoothing) * (sums.top - chosen);
    if (p.smoothing != 0.f) loss += p.smoothing * (sums.top - sums.total / static_cast<float>(p.V));
    p.losses[m] = loss;
  }
  if (!p.scale) return;
  const float scale = p.scale[m], per_sum = 1.f / sums.sum, even = p.smoothing / static_cast<float>(p.V), own = 1.f - p.smoothing;
  each_vector<T, V, true>(row, p.V, [&](int64_t at, float (&values)[V]) {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      const float bent = p.softcap == 0.f ? 0.f : bend(values[v]), y = p.softcap == 0.f ? values[v] : p.softcap * bent;
      const float share = at + v == target ? even + own : even;
      values[v] = (exact_exp(y - sums.top) * per_sum - share) * scale * (1.f - bent * bent);
    }
  });
}

}  // namespace

void cross_entropy_cuda(const CrossEntropy& p, cudaStream_t stream) {
  if (p.M == 0) return;
  if (p.M > INT32_MAX) throw std::runtime_error("cross entropy on a GPU: up to 2^31 - 1 rows at a time");
  const LaunchShape shape{dim3(static_cast<unsigned>(p.M)), kRowThreads, kRowWarps * sizeof(RowSums)};
  conv::with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    if (conv::vectors_fit(p.V, V, sizeof(T), {p.logits})) launch("cross_entropy_rows", cross_entropy_rows<T, V>, shape, stream, p);
    else launch("cross_entropy_rows", cross_entropy_rows<T, 1>, shape, stream, p);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(cross_entropy_rows, float, 4),
    PYOPS_KERNEL_INFO(cross_entropy_rows, float, 1),
    PYOPS_KERNEL_INFO(cross_entropy_rows, bf16, 8),
    PYOPS_KERNEL_INFO(cross_entropy_rows, bf16, 1),
    PYOPS_KERNEL_INFO(cross_entropy_rows, f16, 8),
    PYOPS_KERNEL_INFO(cross_entropy_rows, f16, 1),
});

}  // namespace pyops::linear
