// Filters as dense_conv.cuh reads them, and what its launchers check: in dense_pack.cu.
//
//   weight [O, C/groups, KH, KW] or transposed [C, O/groups, KH, KW], any strides  ->  packed [O, pitch]: taps x depth, zeros behind
//
// Taps are sorted by residue along each axis, so that those of a phase are neighbours; a phase's are in the order of its rows.
// Taps of x that weight does not have are zeros.
#pragma once
#include <stdexcept>

#include "../common/launch.cuh"
#include "dense.h"

namespace pyops::conv {

struct Axis;

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Positions and channels that 32-bit arithmetic within a kernel can hold.
inline void check_counts(const DenseShape& s) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t channels = s.C > s.O ? s.C : s.O;
  if (s.N * s.H * s.W > kMost || s.N * s.OH * s.OW > kMost || channels * s.KH * s.KW > kMost)
    throw std::runtime_error("dense convolution on a GPU: up to 2^30 positions, and channels times taps");
}
inline void check_extent(int64_t padded, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  if (padded + 2 * pad + taps * dilation + stride >= 1 << 30)
    throw std::runtime_error("dense convolution on a GPU: padded images and dilated kernels of up to 2^30 rows and columns");
}

void pack_filters(const Dense& p, const Axis& y, const Axis& x, int depth, int64_t pitch, void* packed, cudaStream_t stream);

}  // namespace pyops::conv
