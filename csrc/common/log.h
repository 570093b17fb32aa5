// The natural logarithm of a vector, for CPU kernels.
#pragma once
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

// Of positive, normal numbers: Cephes' polynomial around one, and the exponent. NaN stays NaN.
inline vf log(vf x) {
  const vi u = bits<vi>(x), e = (u - 0x3f3504f3) >> 23;
  const vf f = bits<vf>(u - (e << 23)) - 1.f, n = __builtin_convertvector(e, vf);
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf square = f * f, tail = square * (f * p - 0.5f) + n * -2.12194440e-4f;
  return x == x ? n * 0.693359375f + (f + tail) : x;
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
