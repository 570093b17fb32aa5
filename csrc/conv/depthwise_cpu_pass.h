// What the forward and the backward pass of a depthwise convolution share: packed weights, the ring of staged input rows, and the
// rows that meet at one output row.
#pragma once
#include "../common/panel_gemm.h"
#include "depthwise_cpu.h"
#include "depthwise_cpu_row.h"

namespace pyops::conv::PYOPS_ISA {
namespace {
using cpu::Layout;
using cpu::Team;

// f(S{}) of a run-time storage type.
template <class F>
inline void with_storage(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  else if (dtype == DType::bf16) f(bf16{});
  else f(f16{});
}

// [C][taps] -> [blocks][taps][16] floats, zeros beyond C; the member's share of the blocks.
inline void pack_taps(const Team& team, DType dtype, const void* weight, int64_t C, int64_t taps, float* to) {
  with_storage(dtype, [&](auto s) {
    using S = decltype(s);
    for (int64_t block = team.rank; block * kBlock < C; block += team.size) {
      const S* rows[16];
      for (int64_t i = 0; i < 16; ++i) rows[i] = block * 16 + i < C ? static_cast<const S*>(weight) + (block * 16 + i) * taps : nullptr;
      pack_rows<16>(rows, 0, taps, taps, to + block * taps * kBlock);
    }
  });
}
inline void pack_bias(const Team& team, DType dtype, const void* bias, int64_t C, float* to) {
  for (int64_t block = team.rank; block * kBlock < C; block += team.size) {
    zero(to + block * kBlock, 1);
    if (bias)
      with_storage(dtype, [&](auto s) {
        const int64_t n = C - block * 16 < 16 ? C - block * 16 : 16;
        load_row(to + block * 16, static_cast<const decltype(s)*>(bias) + block * 16, n);
      });
  }
}

// A prologue's vectors, [3][blocks * 16], zeros beyond C.
inline void pack_affine(const Team& team, const float* affine, int64_t C, int64_t blocks, float* to) {
  for (int i = 0; i < 3 && affine; ++i) pack_bias(team, DType::f32, affine + i * C, C, to + i * blocks * kBlock);
}
struct Staging {
  const float* vectors;  // at the group's first block; null: rows are staged as they are
  int64_t stride;        // from mean to scale to bias
  Activation activation;
  float slope;

  // Staged rows of `blocks` blocks in place.
  void operator()(float* to, int64_t plane, int64_t width, int64_t blocks) const {
    with_activation(activation, [&](auto a) {
      for (int64_t g = 0; g < blocks; ++g)
        for (int v = 0; v < kBlock; v += kF) {
          const float* at = vectors + g * kBlock + v;
          const vf mean = load(at), scale = load(at + stride), bias = load(at + 2 * stride);
          float* row = to + g * plane + v;
          for (int64_t x = 0; x < width; ++x)
            store(row + x * kBlock, activate<decltype(a)::value>((load(row + x * kBlock) - mean) * scale + bias, slope));
        }
    });
  }
};

// The last input rows of a group of blocks, [slot][block][width][16] with the zero padding written out; row y lives in slot
// y mod slots. The window of an output row always fits.
struct InputRing {
  float* data;
  int64_t slots, blocks, width;  // blocks: of the group at hand
  int64_t next;                  // rows below it have been staged, or will not be
  Staging staging;

  static int64_t slots_of(const DepthwiseShape& s) { return (s.KH - 1) * s.dilation_h + 1; }
  static int64_t width_of(const DepthwiseShape& s) { return (s.OW - 1 + kSlack) * s.stride_w + (s.KW - 1) * s.dilation_w + 1; }
  // Input columns that some output sees.
  static int64_t columns(const DepthwiseShape& s) {
    const int64_t seen = width_of(s) - s.pad_w;
    return seen < 0 ? 0 : seen < s.W ? seen : s.W;
  }

  float* row(int64_t y) const { return data + y % slots * blocks * width * kBlock; }

  void start(const DepthwiseShape& s, int64_t group_blocks) {
    slots = slots_of(s), width = width_of(s), blocks = group_blocks, next = 0;
    const int64_t left = s.pad_w < width ? s.pad_w : width, end = left + columns(s);
    for (int64_t i = 0; i < slots * blocks; ++i)
      zero(data + i * width * kBlock, left), zero(data + (i * width + end) * kBlock, width - end);
  }

  // Stages what output row oy sees. image: [H, W, C], at the first channel of the group, of which `channels` exist.
  template <class S>
  void advance(const DepthwiseShape& s, int64_t oy, const S* image, int64_t channels) {
    const int64_t first = oy * s.stride_h - s.pad_h, end = first + slots < s.H ? first + slots : s.H;
    for (next = next < first ? first : next; next < end; ++next) {
      float* to = row(next) + s.pad_w * kBlock;
      stage_row(to, width * kBlock, image + next * s.W * s.C, columns(s), s.C, channels, blocks);
      if (staging.vectors) staging(to, width * kBlock, columns(s), blocks);
    }
  }
};

// The kernel rows that meet the image at output row oy: their input rows, and their places in a [KH][KW][16] array.
struct Window {
  const float** in;
  int64_t* tap;
  int64_t rows;
  void find(const DepthwiseShape& s, const InputRing& ring, int64_t oy) {
    rows = 0;
    for (int64_t ky = 0; ky < s.KH; ++ky) {
      const int64_t y = oy * s.stride_h - s.pad_h + ky * s.dilation_h;
      if (y >= 0 && y < s.H) in[rows] = ring.row(y), tap[rows++] = ky * s.KW * kBlock;
    }
  }
};

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
