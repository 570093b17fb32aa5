// Attention of short sequences, forward (attention_forward.cuh).
#include "attention_forward.cuh"

#include "attention_cuda.h"

namespace pyops::attention {
namespace {

void check_sizes(const Attention& p) {
  if (p.N > kMostRows || p.M > kMostColumns || p.D > kMostCudaHeadSize)
    throw std::runtime_error("attention on a GPU: up to " + std::to_string(kMostRows) + " rows, " + std::to_string(kMostColumns) +
                             " keys and heads of " + std::to_string(kMostCudaHeadSize) + ", got " + std::to_string(p.N) + ", " +
                             std::to_string(p.M) + " and " + std::to_string(p.D));
  if (p.dtype == DType::f32) throw std::runtime_error("attention on a GPU: bfloat16 or float16");
}

}  // namespace

void attention_cuda(const Attention& p, cudaStream_t stream) {
  check_sizes(p);
  attention_blanks_cuda(p, p.output, p.H, p.lse, false, stream);
  if (p.S * p.H * p.N == 0) return;
  ForwardParams<Sequences> params{};
  params.place = sequences_of(p);
  if (p.seed) params.dropout = {p.seed, p.threshold, p.dropout_factor};
  else params.dropout = {nullptr, 0, 1.f};
  const bool plain = p.bias.dtype == BiasType::none && !p.slopes && p.softcap == 0.f && p.scale > 0.f;
  params.plain = plain ? p.scale * kLog2E : 0.f;
  const auto run = [&](auto type) {
    launch_forward_of_head<decltype(type)>(params, p.S * p.H, static_cast<int>(p.N), static_cast<int>(p.M), stream);
  };
  if (p.dtype == DType::bf16) run(bf16{});
  else run(f16{});
}

static const KernelRegistration registration({PYOPS_ATTENTION_FORWARD_KERNELS(bf16, Sequences),
                                              PYOPS_ATTENTION_FORWARD_KERNELS(f16, Sequences)});

}  // namespace pyops::attention
