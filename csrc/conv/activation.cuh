// The activations of the convolution family on a GPU and their gradients, on V channels at a time, with torch's choices at the
// kinks. 16-bit results are rounded to 8 or 11 bits, so a few ulp of float are spent on speed there; f32 gets the exact functions.
#pragma once
#include "../common/convert.cuh"
#include "depthwise.h"

namespace pyops::conv {

template <class T>
PYOPS_DEVICE float exp_of(float x) {
  if constexpr (is_16bit<T>) return fast_exp(x);
  else return exact_exp(x);
}

template <class T>
PYOPS_DEVICE float sigmoid_of(float x) {
  if constexpr (is_16bit<T>) return fast_divide(1.f, 1.f + fast_exp(-x));
  else return 1.f / (1.f + exact_exp(-x));
}

template <class T>
PYOPS_DEVICE float tanh_of(float x) {
  if constexpr (is_16bit<T>) {
    const float x2 = x * x;  // near zero 1 - 2/(1 + e^2x) cancels; the series' next term is below 6e-8 relative there
    if (x2 < 0.01f) return x * (1.f + x2 * (-0.33333333f + x2 * 0.13333333f));
    return 1.f - fast_divide(2.f, 1.f + fast_exp(2.f * x));
  } else {
    return exact_tanh(x);
  }
}

// z between 0 and 6; NaN stays NaN.
PYOPS_DEVICE float clamp06(float z) { return z < 0.f ? 0.f : z > 6.f ? 6.f : z; }

template <int V, class F>
PYOPS_DEVICE void for_each(float (&z)[V], F&& f) {
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) z[v] = f(z[v]);
}

// z = activation(z)
template <class T, int V>
PYOPS_DEVICE void activate(Activation activation, float slope, float (&z)[V]) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return for_each(z, [](float x) { return x < 0.f ? 0.f : x; });
    case Activation::relu6: return for_each(z, clamp06);
    case Activation::silu: return for_each(z, [](float x) { return x * sigmoid_of<T>(x); });
    case Activation::hardswish: return for_each(z, [](float x) { return x * clamp06(x + 3.f) * (1.f / 6.f); });
    case Activation::gelu: return for_each(z, [](float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); });
    case Activation::sigmoid: return for_each(z, [](float x) { return sigmoid_of<T>(x); });
    case Activation::leaky_relu: return for_each(z, [slope](float x) { return x > 0.f ? x : x * slope; });
    case Activation::tanh: return for_each(z, [](float x) { return tanh_of<T>(x); });
    case Activation::hardsigmoid: return for_each(z, [](float x) { return clamp06(x + 3.f) * (1.f / 6.f); });
  }
}

// z = activation'(z)
template <class T, int V>
PYOPS_DEVICE void differentiate(Activation activation, float slope, float (&z)[V]) {
  switch (activation) {
    case Activation::none: return for_each(z, [](float) { return 1.f; });
    case Activation::relu: return for_each(z, [](float x) { return x <= 0.f ? 0.f : 1.f; });
    case Activation::relu6: return for_each(z, [](float x) { return x <= 0.f || x >= 6.f ? 0.f : 1.f; });
    case Activation::silu:
      return for_each(z, [](float x) {
        const float s = sigmoid_of<T>(x);
        return s * (1.f + x * (1.f - s));
      });
    case Activation::hardswish: return for_each(z, [](float x) { return x <= -3.f ? 0.f : x < 3.f ? x * (1.f / 3.f) + 0.5f : 1.f; });
    case Activation::gelu:
      return for_each(z, [](float x) {
        const float cdf = 0.5f * (1.f + erff(x * 0.70710678f)), pdf = 0.39894228f * exp_of<T>(-0.5f * x * x);
        return cdf + x * pdf;
      });
    case Activation::sigmoid:
      return for_each(z, [](float x) {
        const float s = sigmoid_of<T>(x);
        return s * (1.f - s);
      });
    case Activation::leaky_relu: return for_each(z, [slope](float x) { return x > 0.f ? 1.f : slope; });
    case Activation::tanh:
      return for_each(z, [](float x) {
        const float t = tanh_of<T>(x);
        return 1.f - t * t;
      });
    case Activation::hardsigmoid: return for_each(z, [](float x) { return x > -3.f && x < 3.f ? 1.f / 6.f : 0.f; });
  }
}

}  // namespace pyops::conv
