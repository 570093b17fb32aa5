// The activations of the convolution family and their gradients, one vector at a time, with torch's choices at the kinks.
#pragma once
#include "../common/simd.h"
#include "depthwise.h"

namespace pyops::conv::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

// 1 + e^-z, relative error 1e-7 while it matters: the rounding of z log2 e grows with |z|, but so does one of the two terms.
// 512-bit: 2^t with one polynomial over [0, 1), where simd.h's exp_neg reduces in two steps (10 cycles for 16 silu against 18).
inline vf one_plus_exp_neg(vf z) {
#if defined(__AVX512DQ__)
  const vf t = z * -1.44269504f, f = _mm512_reduce_ps(t, 1);  // t - floor(t); zero for infinities
  vf p = f * 1.87757658e-3f + 8.98934063e-3f;
  p = p * f + 5.58263175e-2f;
  p = p * f + 2.40153611e-1f;
  p = p * f + 6.93153083e-1f;
  p = p * f + 0.99999994f;
  return 1.f + vf(_mm512_scalef_ps(p, t));  // p 2^floor(t)
#else
  return 1.f + exp_neg(z);
#endif
}

template <Activation A>
inline vf activate(vf z, [[maybe_unused]] float slope) {
  if constexpr (A == Activation::relu) return relu(z);
  else if constexpr (A == Activation::relu6) return at_most(relu(z), 6.f);
  else if constexpr (A == Activation::silu) return z / one_plus_exp_neg(z);
  else if constexpr (A == Activation::hardswish) return z * at_most(relu(z + 3.f), 6.f) / 6.f;
  else if constexpr (A == Activation::gelu) return 0.5f * z * (1.f + erf(z * 0.70710678f));
  else if constexpr (A == Activation::sigmoid) return sigmoid(z);
  else if constexpr (A == Activation::leaky_relu) return z > 0.f ? z : z * slope;
  else if constexpr (A == Activation::tanh) return cpu::PYOPS_ISA::tanh(z);
  else if constexpr (A == Activation::hardsigmoid) return at_most(relu(z + 3.f), 6.f) / 6.f;
  else return z;
}

// g * activation'(z)
template <Activation A>
inline vf activation_gradient(vf z, vf g, [[maybe_unused]] float slope) {
  const vf zero{};
  if constexpr (A == Activation::relu) {
    return z <= 0.f ? zero : g;
  } else if constexpr (A == Activation::relu6) {
    return (z <= 0.f) | (z >= 6.f) ? zero : g;
  } else if constexpr (A == Activation::silu) {
    const vf s = sigmoid(z);
    return g * s * (1.f + z * (1.f - s));
  } else if constexpr (A == Activation::hardswish) {
    return z <= -3.f ? zero : z < 3.f ? g * (z / 3.f + 0.5f) : g;
  } else if constexpr (A == Activation::gelu) {
    const vf cdf = 0.5f * (1.f + erf(z * 0.70710678f)), pdf = 0.39894228f * exp_neg(0.5f * z * z);
    return g * (cdf + z * pdf);
  } else if constexpr (A == Activation::sigmoid) {
    const vf s = sigmoid(z);
    return g * s * (1.f - s);
  } else if constexpr (A == Activation::leaky_relu) {
    return z > 0.f ? g : g * slope;
  } else if constexpr (A == Activation::tanh) {
    const vf t = cpu::PYOPS_ISA::tanh(z);
    return g * (1.f - t * t);
  } else if constexpr (A == Activation::hardsigmoid) {
    return (z > -3.f) & (z < 3.f) ? g * (1.f / 6.f) : zero;
  } else {
    return g;
  }
}

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
// f(tag) of a run-time activation.
template <class F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f(ActivationTag<Activation::none>{});
    case Activation::relu: return f(ActivationTag<Activation::relu>{});
    case Activation::relu6: return f(ActivationTag<Activation::relu6>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::hardswish: return f(ActivationTag<Activation::hardswish>{});
    case Activation::gelu: return f(ActivationTag<Activation::gelu>{});
    case Activation::sigmoid: return f(ActivationTag<Activation::sigmoid>{});
    case Activation::leaky_relu: return f(ActivationTag<Activation::leaky_relu>{});
    case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
    case Activation::hardsigmoid: return f(ActivationTag<Activation::hardsigmoid>{});
  }
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
