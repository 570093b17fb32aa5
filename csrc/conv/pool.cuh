// What the pooling kernels share: the walk over windows or positions, and what becomes of the input before it is pooled.
//
//   images [N, H, W, C] and [N, OH, OW, C], channels innermost; vectors [C] of float
//
// Tiling: channel.cuh's, V channels of 16 or 8 bytes of storage a thread, positions those of the grid that is walked: windows, or the
// input's. A thread knows its image, row and column and walks on by `lanes` positions without a division. No atomics, the same bits each
// time.
#pragma once
#include "channel.cuh"
#include "pool_cuda.h"

namespace pyops::conv {

// A position of a grid of `rows` x `columns` an image.
struct GridCursor {
  int image, y, x;

  PYOPS_HOST_DEVICE static GridCursor at(int64_t position, int rows, int columns) {
    const int line = static_cast<int>(position / columns);
    return {line / rows, line % rows, static_cast<int>(position % columns)};
  }
  // `step` positions farther, itself given as a cursor.
  PYOPS_DEVICE void advance(const GridCursor& step, int rows, int columns) {
    image += step.image, y += step.y, x += step.x;
    if (x >= columns) x -= columns, ++y;
    if (y >= rows) y -= rows, ++image;
  }
  PYOPS_DEVICE int64_t position(int rows, int columns) const { return (image * rows + y) * columns + x; }
};

struct PoolParams : ChannelParams {
  const uint8_t* index;
  uint8_t* index_out;
  GridCursor step;  // `lanes` positions
  int H, W, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w;
  int row_of;   // (tap * row_of) >> 16 is tap / KW, for a byte
  float share;  // of grad, each position of a window gets
  bool maximum;
};

// To walk over the windows, or over the input's positions.
inline PoolParams pool_params(const Pooling& p, const ChannelCut& cut, bool windows) {
  PoolParams params{};
  params.input = p.input, params.grad = p.grad, params.affine = p.affine, params.terms = p.terms, params.output = p.output;
  params.index = p.index, params.index_out = p.index_out;
  params.C = p.C, params.cut = cut, params.activation = p.activation, params.slope = p.slope;
  params.H = static_cast<int>(p.H), params.W = static_cast<int>(p.W);
  params.OH = static_cast<int>(p.OH), params.OW = static_cast<int>(p.OW);
  params.step = GridCursor::at(cut.lanes, windows ? params.OH : params.H, windows ? params.OW : params.W);
  params.KH = p.kernel[0], params.KW = p.kernel[1], params.pad_h = p.padding[0], params.pad_w = p.padding[1];
  auto within = [](int stride, int64_t padded) { return static_cast<int>(stride < padded ? stride : padded); };
  params.stride_h = within(p.stride[0], p.H + 2 * p.padding[0]);  // what is farther apart is one window alone
  params.stride_w = within(p.stride[1], p.W + 2 * p.padding[1]);
  params.row_of = ceil_div(1 << 16, params.KW);
  params.maximum = p.maximum, params.share = p.maximum ? 1.f : 1.f / static_cast<float>(params.KH * params.KW);
  return params;
}

// Channels in a vector of kBytes, where every image can be read so; else one.
template <int kBytes>
int pool_vector(const Pooling& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2, V = element == 4 ? 4 : kBytes / 2;
  const bool fit = vectors_fit(p.C, V, element, {p.input, p.grad, p.output}) && vectors_fit(p.C, V, 1, {p.index, p.index_out});
  return fit ? V : 1;
}

// Calls f(a value of the storage type, the number of channels in a vector).
template <int kBytes, class F>
void with_pool_channels(const Pooling& p, F&& f) {
  with_type(p.dtype, [&](auto type) {
    constexpr int V = sizeof(type) == 4 ? 4 : kBytes / 2;
    if (pool_vector<kBytes>(p) == V) f(type, std::integral_constant<int, V>{});
    else f(type, std::integral_constant<int, 1>{});
  });
}

// Of the windows, or of the input's positions.
template <int kBytes>
ChannelCut cut_pool(const Pooling& p, bool windows, int blocks_per_sm) {
  const int64_t in = p.N * p.H * p.W, out = p.N * p.OH * p.OW;
  if (in > INT32_MAX / 2 || out > INT32_MAX / 2) throw std::runtime_error("pooling kernels on a GPU: up to 2^30 positions");
  return cut_channels(windows ? out : in, 1, p.C, pool_vector<kBytes>(p), blocks_per_sm);
}

// The part of a window that lies in the image, from its first position on.
struct Window {
  int y0, x0;  // in the image
  int begin_y, end_y, begin_x, end_x;

  PYOPS_DEVICE Window(const PoolParams& p, const GridCursor& at) : y0(at.y * p.stride_h - p.pad_h), x0(at.x * p.stride_w - p.pad_w) {
    begin_y = y0 < 0 ? -y0 : 0, end_y = p.H - y0 < p.KH ? p.H - y0 : p.KH;
    begin_x = x0 < 0 ? -x0 : 0, end_x = p.W - x0 < p.KW ? p.W - x0 : p.KW;
  }
  // Of the image that position (ky, kx) of the window lies in.
  PYOPS_DEVICE int64_t position(const PoolParams& p, int image, int ky, int kx) const {
    return GridCursor{image, y0 + ky, x0 + kx}.position(p.H, p.W);
  }
};

// Places in a window, of V channels.
template <int V>
struct Taps {
  uint8_t tap[V];

  PYOPS_DEVICE void load(const uint8_t* from) {
    const auto raw = *reinterpret_cast<const typename RawOf<V>::type*>(from);
    __builtin_memcpy(tap, &raw, V);
  }
  PYOPS_DEVICE void store(uint8_t* to) const {
    typename RawOf<V>::type raw;
    __builtin_memcpy(&raw, tap, V);
    *reinterpret_cast<typename RawOf<V>::type*>(to) = raw;
  }
};

// u = (input - mean) * scale + bias
template <int V>
PYOPS_DEVICE void normalise(const Affine<V>& affine, const float (&input)[V], float (&u)[V]) {
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) u[v] = (input[v] - affine.mean[v]) * affine.scale[v] + affine.bias[v];
}

}  // namespace pyops::conv
