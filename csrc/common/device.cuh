// What kernel code may use of the machine: CUDA when nvcc compiles it, cuda_host.h's fibers when a host compiler does.
// Kernels use CUDA's own names for thread indices, barriers, shuffles, votes and atomics; everything else comes from here
// (types, dynamic shared memory), convert.cuh, ptx.cuh (tensor cores, asynchronous copies, flags) and launch.cuh.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// One resident block per SM is enough: without the 1, ptxas spills to make room for a second.
#define PYOPS_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#define PYOPS_DEVICE __device__ __forceinline__
#define PYOPS_HOST_DEVICE __host__ __device__
#define PYOPS_UNROLL _Pragma("unroll")
#define PYOPS_NO_UNROLL _Pragma("unroll 1")
#else
#include <cmath>
#include "cuda_host_intrinsics.h"
#define PYOPS_KERNEL(max_threads) void
#define PYOPS_DEVICE inline
#define PYOPS_HOST_DEVICE
#define PYOPS_UNROLL
#define PYOPS_NO_UNROLL
#endif

namespace pyops {

constexpr int kWarpSize = 32;

// 16-bit floats as storage; all arithmetic is float. Not CUDA's classes: their headers cost seconds per file and do not
// exist for the host compiler.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr bool is_16bit = sizeof(T) == 2;

PYOPS_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
PYOPS_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// The block's dynamic shared memory, 16-byte aligned.
PYOPS_DEVICE unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char pyops_dynamic_shared[];
  return pyops_dynamic_shared;
#else
  return host::machine().current->block->shared;
#endif
}

PYOPS_DEVICE float exact_exp(float x) {
#if defined(__CUDACC__)
  return expf(x);
#else
  return static_cast<float>(std::exp(static_cast<double>(x)));  // what a good expf gives, whatever the host's libm
#endif
}
PYOPS_DEVICE float exact_log(float x) {
#if defined(__CUDACC__)
  return logf(x);
#else
  return static_cast<float>(std::log(static_cast<double>(x)));
#endif
}
PYOPS_DEVICE float exact_tanh(float x) {
#if defined(__CUDACC__)
  return tanhf(x);
#else
  return static_cast<float>(std::tanh(static_cast<double>(x)));
#endif
}

PYOPS_DEVICE float exact_power(float x, float y) {
#if defined(__CUDACC__)
  return powf(x, y);
#else
  return static_cast<float>(std::pow(static_cast<double>(x), static_cast<double>(y)));
#endif
}

// exp for gates that are rounded to 16 bits afterwards: about 2 ulp of float, without expf's range reduction.
PYOPS_DEVICE float fast_exp(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// x to the power of y, x not negative, for results that are rounded to 16 bits afterwards.
PYOPS_DEVICE float fast_power(float x, float y) {
#if defined(__CUDACC__)
  return __powf(x, y);
#else
  return std::pow(x, y);
#endif
}

PYOPS_DEVICE float fast_divide(float x, float y) {
#if defined(__CUDACC__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

template <class A, class B>
PYOPS_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
PYOPS_HOST_DEVICE constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace pyops
