// The pieces of the fused expansion and depthwise convolution: a block's window of the image, its operands' way into shared memory,
// the expanded tile, the depthwise convolution of it.
//
//   input [N, H, W, C], expand_weight [E, C]  ->  expanded tile [halo_h * halo_w, 64] in shared memory  ->  output [N, OH, OW, E]
//
// A block computes tile_h x tile_w outputs of 64 expanded channels of one image, from halo_h x halo_w expanded positions,
// halo = (tile - 1) * S + K. Those inside the image are rows of a matrix product, kHaloRows at a time, whose C passes through shared
// memory in steps of 64 bytes a row, two buffers, by cp.async (rows that are no whole 16-byte pieces: by elements). The steps of all rows
// are one sequence: while a row block's sums become activations, the next one's operands are in flight. What a position is, is kept in
// a table: places[m] = y << 16 | x of row m within the halo.
// In the expanded tile positions are 64 channels and 16 bytes apart: a fragment's 8 rows lie in different banks, and so do the 16 threads
// that read a position's channels, four each. A thread of the depthwise part computes strips of kStrip outputs of four channels.
#pragma once
#include "depthwise_conv.cuh"
#include "pointwise.cuh"

namespace pyops::conv {

constexpr int kHaloRows = 128;
constexpr int kExpandThreads = kTileThreads<kHaloRows>;  // 8 warps of 32 x 32 sums
constexpr int kLaneChannels = 4;                         // eight would hold twice the registers, and a block an SM less
constexpr int kLaneGroups = kTileO / kLaneChannels, kExpandLanes = kExpandThreads / kLaneGroups;
constexpr int kStageBytes = (kHaloRows + kTileO) * kRowBytes;

template <class T>
constexpr int kExpandedPitch = kTileO * static_cast<int>(sizeof(T)) + 16;  // bytes

struct ExpandWeight {  // what copy_weight reads
  const void* weight;  // [E, weight_pitch] of input's type, whole pieces
  int O, weight_pitch;
};

struct ExpandDepthwiseParams {
  const void *input, *depthwise_weight;
  ExpandWeight expand;
  const float *expand_bias, *depthwise_bias;
  void* output;
  float* sums;  // [N, tiles, E], or null
  float divisor;
  int64_t input_stride;
  int H, W, OH, OW, C, E;
  int tile_h, tile_w, halo_h, halo_w, tiles_x, tiles, slices;  // tiles: of an image; slices of 64 channels
  Activation activation;
  float slope;
  bool depthwise_is_float, input_vectors, output_vectors;
};

// Bytes of shared memory: two stages, places, filter, biases, the expanded tile and what a last strip reads past its end.
struct ExpandShared {
  int positions, taps, pitch, overhang;
  PYOPS_HOST_DEVICE ExpandShared(int halo_h, int halo_w, int tile_w, int K, int S, int element)
      : positions(halo_h * halo_w), taps(K * K), pitch(kTileO * element + 16), overhang((round_up(tile_w, kStrip) - tile_w) * S) {}
  PYOPS_HOST_DEVICE int places() const { return 2 * kStageBytes; }
  PYOPS_HOST_DEVICE int filter() const { return places() + round_up(positions, 4) * 4; }
  PYOPS_HOST_DEVICE int expanded() const { return filter() + (taps + 2) * kTileO * 4; }
  PYOPS_HOST_DEVICE int bytes() const { return expanded() + (positions + overhang) * pitch; }
};

// Where a block stands.
struct Window {
  int n, tile, e0;       // image, tile of the image, first channel
  int oy, ox;            // first output
  int y, x;              // first position of the halo, perhaps outside the image
  int first_y, first_x;  // first position inside, counted from the halo's first
  int rows, width;       // positions inside; of a row

  PYOPS_DEVICE Window(const ExpandDepthwiseParams& p, int K, int S) {
    const int block = static_cast<int>(blockIdx.x);
    e0 = block % p.slices * kTileO;
    tile = block / p.slices % p.tiles, n = block / p.slices / p.tiles;
    oy = tile / p.tiles_x * p.tile_h, ox = tile % p.tiles_x * p.tile_w;
    y = oy * S - K / 2, x = ox * S - K / 2;
    first_y = y < 0 ? -y : 0, first_x = x < 0 ? -x : 0;
    const int height = (p.H - y < p.halo_h ? p.H - y : p.halo_h) - first_y;
    width = (p.W - x < p.halo_w ? p.W - x : p.halo_w) - first_x;
    rows = height * width;
  }
};

// Writes places, and zeros where the expanded tile lies outside the image.
template <class T>
PYOPS_DEVICE void lay_out(const ExpandDepthwiseParams& p, const Window& w, uint32_t* places, unsigned char* expanded) {
  for (int i = static_cast<int>(threadIdx.x); i < p.halo_h * p.halo_w; i += kExpandThreads) {
    const int y = i / p.halo_w, x = i % p.halo_w;
    if (y >= w.first_y && x >= w.first_x && w.y + y < p.H && w.x + x < p.W)
      places[(y - w.first_y) * w.width + x - w.first_x] = static_cast<uint32_t>(y) << 16 | static_cast<uint32_t>(x);
    else
      for (int at = 0; at < kTileO * static_cast<int>(sizeof(T)); at += 16)
        *reinterpret_cast<uint4*>(expanded + i * kExpandedPitch<T> + at) = uint4{0, 0, 0, 0};
  }
}

// A thread's share of the operands: piece threadIdx % 4 of two rows of input and one of weight.
template <class T, Product kProduct>
struct HaloInput {
  static constexpr int kApart = kExpandThreads / kStepPieces, R = kHaloRows / kApart;
  const T* from[R];  // null: no such row

  PYOPS_DEVICE static int piece() { return static_cast<int>(threadIdx.x) % kStepPieces; }
  PYOPS_DEVICE static int row(int r) { return static_cast<int>(threadIdx.x) / kStepPieces + r * kApart; }

  PYOPS_DEVICE void find(const ExpandDepthwiseParams& p, const Window& w, const uint32_t* places, int first) {
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      from[r] = nullptr;
      if (first + row(r) >= w.rows) continue;
      const uint32_t place = places[first + row(r)];
      const int64_t line = static_cast<int64_t>(w.n) * p.H + w.y + static_cast<int>(place >> 16);
      from[r] = static_cast<const T*>(p.input) + (line * p.W + w.x + static_cast<int>(place & 0xFFFF)) * p.input_stride;
    }
  }

  PYOPS_DEVICE void copy(const ExpandDepthwiseParams& p, int step, unsigned char* tile) const {
    const int k = step * kStep<T> + piece() * kPiece<T>;
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      if (!from[r]) continue;  // sums of what lay here before go nowhere
      unsigned char* const to = tile + row(r) * kRowBytes + piece() * 16;
      if (k < p.C && p.input_vectors) ptx::cp_async_16(to, from[r] + k);
      else {
        Piece<T> value;
        value.raw = uint4{0, 0, 0, 0};
        PYOPS_UNROLL
        for (int v = 0; v < kPiece<T>; ++v)
          if (k + v < p.C) value.element[v] = from[r][k + v];
        *reinterpret_cast<uint4*>(to) = value.raw;
      }
    }
  }

  // Of what this thread copied, once it has come: tensor cores would cut the digits off that tf32 has not.
  PYOPS_DEVICE static void round(unsigned char* tile) {
    if constexpr (kProduct == Product::tf32) {
      PYOPS_UNROLL
      for (int r = 0; r < R; ++r) {
        uint4* const own = reinterpret_cast<uint4*>(tile + row(r) * kRowBytes + piece() * 16);
        uint4 value = *own;
        value.x = ptx::float_to_tf32(bits_to_float(value.x)), value.y = ptx::float_to_tf32(bits_to_float(value.y));
        value.z = ptx::float_to_tf32(bits_to_float(value.z)), value.w = ptx::float_to_tf32(bits_to_float(value.w));
        *own = value;
      }
    }
  }
};

// Sums of rows first .. first + kHaloRows -> the expanded tile; eight a time, for ten activations of 32 would be most of the kernel.
template <class T, Product kProduct>
PYOPS_DEVICE void store_expanded(const ExpandDepthwiseParams& p, const Window& w, int first, const uint32_t* places, const float* bias,
                                 TileSums<T, kProduct, kHaloRows>& sums, unsigned char* expanded) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  PYOPS_NO_UNROLL
  for (int part = 0; part < 4; ++part) {  // 16 rows x 16 columns of the warp's 32 x 32
    const int row = first + warp / 2 * 32 + part / 2 * 16 + lane / 4, column = warp % 2 * 32 + part % 2 * 16 + lane % 4 * 2;
    float z[8];
    PYOPS_UNROLL
    for (int i = 0; i < 8; ++i) z[i] = sums.sum[0][i / 4][i % 4] + bias[column + i / 4 * 8 + i % 2];
    activate<T>(p.activation, p.slope, z);
    PYOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= w.rows) continue;
      const uint32_t place = places[row + half * 8];
      const int position = static_cast<int>(place >> 16) * p.halo_w + static_cast<int>(place & 0xFFFF);
      T* const to = reinterpret_cast<T*>(expanded + position * kExpandedPitch<T>) + column;
      PYOPS_UNROLL
      for (int j = 0; j < 2; ++j) store_channels<T, 2>(to + j * 8, {z[j * 4 + half * 2], z[j * 4 + half * 2 + 1]});
    }
    PYOPS_UNROLL
    for (int i = 0; i < 24; ++i)  // the next part moves up: registers have no index
      sums.sum[i / 16][i / 4 % 4][i % 4] = sums.sum[(i + 8) / 16][(i + 8) / 4 % 4][(i + 8) % 4];
  }
}

// The depthwise convolution of the expanded tile; adds the outputs that this thread computes to `sum`.
template <class T, int K, int S>
PYOPS_DEVICE void convolve_tile(const ExpandDepthwiseParams& p, const Window& w, const Place& me, const unsigned char* expanded,
                                const float* filter, const float* bias, Sum (&sum)[kLaneChannels]) {
  constexpr int V = kLaneChannels, kReach = (kStrip - 1) * S + K;
  const int strips_per_row = ceil_div(p.tile_w, kStrip), strips = strips_per_row * p.tile_h;
  const int count = p.E - me.channel < V ? p.E - me.channel : V;
  float b[V];
  load_filter<V>(bias, 0, me.group, kLaneGroups, b);
  PYOPS_NO_UNROLL
  for (int strip = me.lane; strip < strips; strip += kExpandLanes) {
    const int ty = strip / strips_per_row, tx = strip % strips_per_row * kStrip, oy = w.oy + ty, ox = w.ox + tx;
    if (oy >= p.OH || ox >= p.OW || count <= 0) continue;
    const unsigned char* const from = expanded + (ty * S * p.halo_w + tx * S) * kExpandedPitch<T> + me.group * V * sizeof(T);
    float acc[kStrip][V], over[V];
    PYOPS_UNROLL
    for (int t = 0; t < kStrip; ++t) clear(acc[t]);
    clear(over);
#pragma unroll(K == 3 ? 3 : 1)
    for (int ky = 0; ky < K; ++ky) {
      float in[kReach][V];
      PYOPS_UNROLL
      for (int j = 0; j < kReach; ++j)
        load_channels<T, V>(reinterpret_cast<const T*>(from + (ky * p.halo_w + j) * kExpandedPitch<T>), in[j]);
      add_row<V, K, S>(in, filter, ky, me.group, kLaneGroups, acc);
    }
    T* output = static_cast<T*>(p.output) + ((static_cast<int64_t>(w.n) * p.OH + oy) * p.OW + ox) * p.E + me.channel;
    PYOPS_NO_UNROLL
    for (int t = 0; t < kStrip && ox + t < p.OW && tx + t < p.tile_w; ++t, output += p.E) {
      float z[V];
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) z[v] = acc[0][v] + b[v];
      activate<T>(p.activation, p.slope, z);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) over[v] += z[v];
      if (p.output_vectors) store_channels<T, V>(output, z);
      else {
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v)
          if (v < count) output[v] = from_float<T>(z[v]);
      }
      PYOPS_UNROLL
      for (int i = 0; i + 1 < kStrip; ++i) {
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v) acc[i][v] = acc[i + 1][v];
      }
    }
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) sum[v].add(over[v]);
  }
}

}  // namespace pyops::conv
