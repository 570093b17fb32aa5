// Between storage types and float, which is what kernels compute in.
#pragma once
#include "ptx.cuh"

namespace pyops {

PYOPS_DEVICE float to_float(float value) { return value; }
PYOPS_DEVICE float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }
PYOPS_DEVICE float to_float(f16 value) { return ptx::f16_to_float(value.bits); }

template <class T>
PYOPS_DEVICE T from_float(float value);  // rounds to nearest even
template <>
PYOPS_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
PYOPS_DEVICE bf16 from_float<bf16>(float value) {
  return bf16{ptx::float_to_bf16(value)};
}
template <>
PYOPS_DEVICE f16 from_float<f16>(float value) {
  return f16{ptx::float_to_f16(value)};
}

}  // namespace pyops
