// Depthwise convolution, the first step of backward: dz = activation'(z) * (grad_output + grad_means / (OH*OW)).
//
//   input [N, H, W, C], weight [C, KH, KW], grad_output, residual [N, OH, OW, C], grad_means [N, C]  ->  dz [N, OH, OW, C]
//
// z is computed again, as forward did. Backward skips this step where dz is grad_output itself: no activation, no residual whose
// gradient must be written, no means. Tiling and floors: depthwise_conv.cuh.
#include "depthwise_backward.cuh"
#include "depthwise_conv.cuh"

namespace pyops::conv {
namespace {

template <class T, int V, int K, int S>
PYOPS_KERNEL(kDepthwiseThreads)
depthwise_conv_gradient(ConvParams p) {
  depthwise_conv_block<T, V, K, S, true>(p);
}

}  // namespace

void depthwise_gradient_launch(const DepthwiseBackward& p, void* dz, cudaStream_t stream) {
  ConvParams params{};
  params.d = dims_of(p.s);
  params.activation = p.activation, params.slope = p.slope;
  params.weight_is_float = p.weight_dtype == DType::f32;
  params.input = p.input, params.weight = p.weight, params.bias = p.bias, params.residual = p.residual, params.output = dz;
  params.divisor = static_cast<float>(p.s.OH * p.s.OW);
  params.grad_output = p.grad_output, params.grad_means = p.grad_means;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = vectors_fit(p.s.C, 16 / sizeof(T), sizeof(T), {p.input, p.residual, p.grad_output, dz});
    with_instance<T>(p.s, vectors, [&](auto v, auto k, auto s) {
      constexpr int V = decltype(v)::value, K = decltype(k)::value, S = decltype(s)::value;
      const int taps = p.s.KH * p.s.KW;
      params.cut = cut_work(params.d.N, params.d.C, params.d.OH, params.d.OW, V, kStrip, 16);
      params.chunk = K > 0 || taps < kChunkTaps ? taps : kChunkTaps;
      const LaunchShape shape{dim3(params.cut.blocks()), params.cut.threads(), conv_shared_bytes(params, V)};
      launch("depthwise_conv_gradient", depthwise_conv_gradient<T, V, K, S>, shape, stream, params);
    });
  });
}

#define PYOPS_GRADIENT_KERNELS(T, V)                                                                                  \
  PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 3, 1), PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 3, 2),     \
      PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 5, 1), PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 5, 2), \
      PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 7, 1), PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 7, 2), \
      PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, V, 0, 0), PYOPS_KERNEL_INFO(depthwise_conv_gradient, T, 1, 0, 0)

static const KernelRegistration registration({
    PYOPS_GRADIENT_KERNELS(float, 4),
    PYOPS_GRADIENT_KERNELS(bf16, 8),
    PYOPS_GRADIENT_KERNELS(f16, 8),
});

}  // namespace pyops::conv
