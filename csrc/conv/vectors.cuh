// What every GPU kernel of the convolution family shares: vectors of neighbouring channels, careful sums, choice by storage type.
#pragma once
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "../common/convert.cuh"
#include "depthwise.h"

namespace pyops::conv {

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<2> {
  using type = uint16_t;
};
template <>
struct RawOf<1> {
  using type = uint8_t;
};

template <class T, int V>
PYOPS_DEVICE void load_channels(const T* from, float (&to)[V]) {
  using Raw = typename RawOf<V * sizeof(T)>::type;
  const Raw raw = *reinterpret_cast<const Raw*>(from);
  T values[V];
  __builtin_memcpy(values, &raw, sizeof(raw));
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) to[v] = to_float(values[v]);
}

template <class T, int V>
PYOPS_DEVICE void load_or_zero(bool exists, const T* from, float (&to)[V]) {
  if (exists) load_channels<T, V>(from, to);
  else {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) to[v] = 0.f;
  }
}

template <class T, int V>
PYOPS_DEVICE void store_channels(T* to, const float (&from)[V]) {
  using Raw = typename RawOf<V * sizeof(T)>::type;
  T values[V];
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) values[v] = from_float<T>(from[v]);
  Raw raw;
  __builtin_memcpy(&raw, values, sizeof(raw));
  *reinterpret_cast<Raw*>(to) = raw;
}

template <class T, int V>
PYOPS_DEVICE void clear(T (&values)[V]) {
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) values[v] = 0.f;
}

// Vectors of V channels that every image of the call can be read and written in.
inline bool vectors_fit(int64_t C, int V, int element, std::initializer_list<const void*> images) {
  bool fit = C % V == 0;
  for (const void* image : images) fit = fit && reinterpret_cast<uintptr_t>(image) % (V * element) == 0;
  return fit;
}

// Whether a value takes the place of the highest so far: of equal ones the first stays, and NaN is above all.
PYOPS_DEVICE bool is_above(float value, float highest) { return highest == highest && !(value <= highest); }
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Kahan's sum: means of many nearly equal values must be as good as torch's pairwise ones.
struct Sum {
  float total = 0.f, lost = 0.f;
  PYOPS_DEVICE void add(float value) {
    const float corrected = value - lost, next = total + corrected;
    lost = (next - total) - corrected;
    total = next;
  }
};

// Calls f(a value of the storage type).
template <class F>
auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    default: return f(f16{});
  }
}

}  // namespace pyops::conv
