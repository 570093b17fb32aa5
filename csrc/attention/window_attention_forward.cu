// Attention within the windows of a map, forward (attention_forward.cuh).
#include "attention_forward.cuh"

#include "attention_cuda.h"

namespace pyops::attention {
namespace {

void check_sizes(const WindowAttention& p) {
  if (p.tokens() > kMostTokens || p.D > kMostCudaHeadSize)
    throw std::runtime_error("window attention on a GPU: windows of up to " + std::to_string(kMostTokens) + " tokens and heads of " +
                             std::to_string(kMostCudaHeadSize) + ", got " + std::to_string(p.tokens()) + " and " + std::to_string(p.D));
  if (p.rows * p.wh * p.columns * p.ww > INT32_MAX) throw std::runtime_error("window attention on a GPU: the map is too large");
  if (p.dtype == DType::f32) throw std::runtime_error("window attention on a GPU: bfloat16 or float16");
}

}  // namespace

void window_attention_cuda(const WindowAttention& p, cudaStream_t stream) {
  check_sizes(p);
  if (p.windows() == 0) return;
  ForwardParams<Windows> params{};
  params.place = windows_of(p);
  if (p.threshold) params.dropout = {p.seed, p.threshold, p.keep_scale};
  else params.dropout = {nullptr, 0, 1.f};
  const auto run = [&](auto type) {
    launch_forward_of_head<decltype(type)>(params, p.windows() * p.heads, params.place.tokens, params.place.tokens, stream);
  };
  if (p.dtype == DType::bf16) run(bf16{});
  else run(f16{});
}

static const KernelRegistration registration({PYOPS_ATTENTION_FORWARD_KERNELS(bf16, Windows),
                                              PYOPS_ATTENTION_FORWARD_KERNELS(f16, Windows)});

}  // namespace pyops::attention
