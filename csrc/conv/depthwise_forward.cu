// Depthwise convolution, forward: output = activation(conv(input) + bias + residual), and its means over positions.
//
//   input [N, H, W, C], weight [C, KH, KW], bias [C], residual [N, OH, OW, C]  ->  output [N, OH, OW, C], means [N, C]
//
// Tiling and floors: depthwise_conv.cuh. Means: a block sums its positions of an image, `depthwise_means` sums an image's blocks in
// order; an image that one block holds needs no second kernel.
#include "depthwise_conv.cuh"

namespace pyops::conv {
namespace {

template <class T, int V, int K, int S>
PYOPS_KERNEL(kDepthwiseThreads)
depthwise_conv_forward(ConvParams p) {
  depthwise_conv_block<T, V, K, S, false>(p);
}

struct MeansParams {
  const float* sums;  // [N, tiles, C]
  float* means;       // [N, C]
  int64_t N, C;
  int tiles;
  float positions;
};

PYOPS_KERNEL(kDepthwiseThreads)
depthwise_means(MeansParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.N * p.C; i += step) {
    const float* sum = p.sums + i / p.C * p.tiles * p.C + i % p.C;
    Sum over;
    for (int tile = 0; tile < p.tiles; ++tile) over.add(sum[tile * p.C]);
    p.means[i] = over.total / p.positions;
  }
}

}  // namespace

void merge_means(const float* sums, float* means, int64_t N, int64_t C, int tiles, float positions, cudaStream_t stream) {
  const MeansParams params{sums, means, N, C, tiles, positions};
  const int64_t blocks = ceil_div(N * C, int64_t{kDepthwiseThreads});
  launch("depthwise_means", depthwise_means, LaunchShape{dim3(blocks < 65536 ? blocks : 65536), kDepthwiseThreads, 0}, stream, params);
}

namespace {

bool vectors_of(const DepthwiseForward& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2;
  return vectors_fit(p.s.C, 16 / element, element, {p.input, p.residual, p.output});
}

Cut forward_cut(const DepthwiseForward& p) {
  const int V = !vectors_of(p) ? 1 : p.dtype == DType::f32 ? 4 : 8;
  const Dims d = dims_of(p.s);
  return cut_work(d.N, d.C, d.OH, d.OW, V, kStrip, 16);
}

bool nothing(const DepthwiseShape& s) { return s.N == 0 || s.C == 0; }

}  // namespace

size_t depthwise_forward_workspace(const DepthwiseForward& p) {
  if (!p.means || nothing(p.s)) return 0;
  const Cut cut = forward_cut(p);
  return cut.tiles == 1 ? 0 : static_cast<size_t>(p.s.N) * cut.tiles * p.s.C * sizeof(float);
}

void depthwise_forward(const DepthwiseForward& p, void* workspace, cudaStream_t stream) {
  if (nothing(p.s)) return;
  ConvParams params{};
  params.d = dims_of(p.s), params.cut = forward_cut(p);
  params.activation = p.activation, params.slope = p.slope;
  params.weight_is_float = p.weight_dtype == DType::f32;
  params.input = p.input, params.weight = p.weight, params.bias = p.bias, params.residual = p.residual, params.output = p.output;
  const float positions = static_cast<float>(p.s.OH * p.s.OW);
  const bool one_tile = params.cut.tiles == 1;
  params.sums = !p.means ? nullptr : one_tile ? p.means : static_cast<float*>(workspace);
  params.divisor = one_tile ? positions : 1.f;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_instance<T>(p.s, vectors_of(p), [&](auto v, auto k, auto s) {
      constexpr int V = decltype(v)::value, K = decltype(k)::value, S = decltype(s)::value;
      const int taps = p.s.KH * p.s.KW;
      params.chunk = K > 0 || taps < kChunkTaps ? taps : kChunkTaps;
      const LaunchShape shape{dim3(params.cut.blocks()), params.cut.threads(), conv_shared_bytes(params, V)};
      launch("depthwise_conv_forward", depthwise_conv_forward<T, V, K, S>, shape, stream, params);
    });
  });
  if (p.means && !one_tile) merge_means(params.sums, p.means, p.s.N, p.s.C, params.cut.tiles, positions, stream);
}

#define PYOPS_FORWARD_KERNELS(T, V)                                                                                 \
  PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 3, 1), PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 3, 2),     \
      PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 5, 1), PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 5, 2), \
      PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 7, 1), PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 7, 2), \
      PYOPS_KERNEL_INFO(depthwise_conv_forward, T, V, 0, 0), PYOPS_KERNEL_INFO(depthwise_conv_forward, T, 1, 0, 0)

static const KernelRegistration registration({
    PYOPS_FORWARD_KERNELS(float, 4),
    PYOPS_FORWARD_KERNELS(bf16, 8),
    PYOPS_FORWARD_KERNELS(f16, 8),
    {"depthwise_means", reinterpret_cast<const void*>(&depthwise_means)},
});

}  // namespace pyops::conv
