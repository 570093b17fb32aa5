// Attention on the CPU (attention.h says what it computes), compiled once per instruction set.
#include "../conv/depthwise_cpu_pass.h"
#include "attention_cpu_backward.h"

namespace pyops::attention::PYOPS_ISA {
namespace {

// f(S{}, plain) for the storage type and whether scores are scaled products alone.
template <class F>
void with_kind(const Attention& p, const F& f) {
  conv::PYOPS_ISA::with_storage(p.dtype, [&](auto s) {
    if (is_plain(p)) f(s, std::true_type{});
    else f(s, std::false_type{});
  });
}

}  // namespace

void attention_forward(const Attention& p, const Place* cuts, int threads) {
  with_kind(p, [&](auto s, auto plain) {
    using S = decltype(s);
    forward_as<S, typename Gemm<S>::Elem, decltype(plain)::value>(p, cuts, threads);
  });
}

void attention_backward(const AttentionGradient& a, const BackwardPlan& plan) {
  with_kind(a.forward, [&](auto s, auto plain) {
    using S = decltype(s);
    backward_as<S, typename Gemm<S>::Elem, decltype(plain)::value>(a, plan);
  });
}

}  // namespace pyops::attention::PYOPS_ISA
