// The tile of the 1x1 convolution: how operands reach shared memory, how they are multiplied, what is done with the sums.
//
//   input [M, C] (rows input_stride apart), weight [O, C], output [M, O]; M = N*P positions, position m in image m / P
//
// A block computes kM positions x 64 output channels (kM 128, 64 by FMA, 32 where more would leave SMs idle), and with moments several such
// tiles below one another. C passes through shared memory in steps of 64 bytes a row (32 16-bit channels or 16 floats), two buffers:
//   weight  cp.async of 16-byte pieces, in flight while the step before is multiplied
//   input   to registers while the step before is multiplied, then to shared memory and through the prologue (rows, affine,
//           activation, gate), rounded to the operands' type. Each of the O / 64 blocks of the same positions does so anew.
// Rows in shared memory are 80 bytes apart: 8 neighbouring rows lie in 8 different groups of banks.
// A warp multiplies 32 x 32 (mma, 16-bit or tf32: a lane's 16 bytes of a row are the same fragment to ldmatrix), or a thread 8 x 4 by
// FMA, which sums at most kSlice products one after another before they join the sums of earlier slices. Then the tile's sums go
// through shared memory once more, so that residual is read and output written in 16-byte vectors, and moments see whole columns.
//
// Floors: input and residual once (input from L2 for each further block of channels), output once; 2*M*C*O flops.
#pragma once
#include "../common/launch.cuh"
#include "activation.cuh"
#include "vectors.cuh"

namespace pyops::conv {

enum class Product : int { mma = 0, tf32 = 1, fma = 2 };

constexpr int kTileO = 64;
constexpr int kStepPieces = 4;  // 16-byte pieces of a row in a step
constexpr int kRowBytes = 80;
constexpr int kSumsPitch = kTileO + 8;  // floats: a warp's pairs of sums lie in different banks
constexpr int kSlice = 64;              // products

// Positions in a tile, where there are enough: FMA's threads hold twice the sums, so that more, smaller blocks fill an SM better.
template <Product kProduct>
constexpr int kLargeTile = kProduct == Product::fma ? 64 : 128;
template <class T>
constexpr int kPiece = 16 / sizeof(T);
template <class T>
constexpr int kStep = kStepPieces * kPiece<T>;
template <int kM>
constexpr int kTileThreads = kM * kTileO / 32;

template <int kM>
constexpr size_t tile_shared_bytes() {
  constexpr size_t operands = 2 * (kM + kTileO) * kRowBytes, sums = sizeof(float) * kM * kSumsPitch;
  constexpr size_t moments = sizeof(float) * 2 * kTileThreads<kM>;
  return operands > sums + moments ? operands : sums + moments;
}

struct PointwiseParams {
  const void *input, *weight, *residual;  // weight [O, weight_pitch] of the operands' type, whole pieces
  const float *rows, *affine, *gate, *bias, *keep;
  void* output;
  float* partials;  // moments [slots, 2, O], or null
  int64_t input_stride, residual_stride, output_stride;
  int M, P, C, O, weight_pitch;
  int tiles, o_tiles;  // tiles a block takes; blocks side by side
  Activation input_activation, activation;
  float input_slope, slope;
  bool prologue, input_vectors, output_vectors, float_vectors;  // what 16-byte loads can reach; float_vectors: affine and gate
};

// V floats from `at` on, zeros from `end` on.
template <int V>
PYOPS_DEVICE void load_floats(bool vectors, const float* from, int64_t at, int64_t end, float (&to)[V]) {
  if (vectors && at + V <= end) {
    PYOPS_UNROLL
    for (int v = 0; v < V; v += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + at + v);
      to[v] = part.x, to[v + 1] = part.y, to[v + 2] = part.z, to[v + 3] = part.w;
    }
  } else {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) to[v] = at + v < end ? from[at + v] : 0.f;
  }
}

template <class T>
union Piece {
  uint4 raw;
  T element[kPiece<T>];
};

// One piece through the prologue: channels k .. k + V of position m.
template <class T>
PYOPS_DEVICE uint4 prepared(const PointwiseParams& p, int m, int k, uint4 raw) {
  constexpr int V = kPiece<T>;
  Piece<T> value;
  value.raw = raw;
  const float mean = p.rows ? p.rows[m] : 0.f, scale = p.rows ? p.rows[p.M + m] : 1.f;
  float a[V], vector[V];
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) a[v] = (to_float(value.element[v]) - mean) * scale;
  if (p.affine) {
    load_floats<V>(p.float_vectors, p.affine, k, p.C, vector);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) a[v] -= vector[v];
    load_floats<V>(p.float_vectors, p.affine + p.C, k, p.C, vector);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) a[v] *= vector[v];
    load_floats<V>(p.float_vectors, p.affine + 2 * static_cast<int64_t>(p.C), k, p.C, vector);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) a[v] += vector[v];
  }
  activate<T, V>(p.input_activation, p.input_slope, a);
  if (p.gate) {
    load_floats<V>(p.float_vectors, p.gate + static_cast<int64_t>(m / p.P) * p.C, k, p.C, vector);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) a[v] *= vector[v];
  }
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) value.element[v] = from_float<T>(k + v < p.C ? a[v] : 0.f);
  return value.raw;
}

// A thread's share of a step of the input tile: piece threadIdx % 4 of R rows.
template <class T, Product kProduct, int kM>
struct InputTile {
  static constexpr int V = kPiece<T>, R = kM * kStepPieces / kTileThreads<kM>, kApart = kTileThreads<kM> / kStepPieces;
  int m0;
  uint4 raw[R];

  PYOPS_DEVICE static int piece() { return static_cast<int>(threadIdx.x) % kStepPieces; }
  PYOPS_DEVICE static int first_row() { return static_cast<int>(threadIdx.x) / kStepPieces; }

  PYOPS_DEVICE void load(const PointwiseParams& p, int step) {
    const int k = step * kStep<T> + piece() * V;
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) {
      const int m = m0 + first_row() + r * kApart;
      Piece<T> value;
      value.raw = uint4{0, 0, 0, 0};
      if (m < p.M && k < p.C) {
        const T* const from = static_cast<const T*>(p.input) + m * p.input_stride + k;
        if (p.input_vectors) value.raw = *reinterpret_cast<const uint4*>(from);
        else {
          PYOPS_UNROLL
          for (int v = 0; v < V; ++v)
            if (k + v < p.C) value.element[v] = from[v];
        }
      }
      raw[r] = value.raw;
    }
  }

  // The prologue works on what lies in shared memory, a piece at a time: the tile's sums have the registers.
  PYOPS_DEVICE void store(const PointwiseParams& p, int step, unsigned char* tile) const {
    unsigned char* const at = tile + first_row() * kRowBytes + piece() * 16;
    PYOPS_UNROLL
    for (int r = 0; r < R; ++r) *reinterpret_cast<uint4*>(at + r * kApart * kRowBytes) = raw[r];
    const int k = step * kStep<T> + piece() * V;
    if (k >= p.C || (!p.prologue && kProduct != Product::tf32)) return;
    PYOPS_NO_UNROLL
    for (int r = 0; r < R; ++r) {
      const int m = m0 + first_row() + r * kApart;
      uint4* const own = reinterpret_cast<uint4*>(at + r * kApart * kRowBytes);
      uint4 value = *own;
      if (p.prologue && m < p.M) value = prepared<T>(p, m, k, value);
      if constexpr (kProduct == Product::tf32) {
        value.x = ptx::float_to_tf32(bits_to_float(value.x)), value.y = ptx::float_to_tf32(bits_to_float(value.y));
        value.z = ptx::float_to_tf32(bits_to_float(value.z)), value.w = ptx::float_to_tf32(bits_to_float(value.w));
      }
      *own = value;
    }
  }
};

// Starts the copy of a step of the weight's rows o0 .. o0 + 63; zeros where there are none. Params says weight, O and weight_pitch.
template <class T, int kM, class Params>
PYOPS_DEVICE void copy_weight(const Params& p, int o0, int step, unsigned char* tile) {
  constexpr int kApart = kTileThreads<kM> / kStepPieces;
  const int piece = static_cast<int>(threadIdx.x) % kStepPieces, k = step * kStep<T> + piece * kPiece<T>;
  PYOPS_UNROLL
  for (int row = static_cast<int>(threadIdx.x) / kStepPieces, turn = 0; turn < kTileO / kApart; ++turn, row += kApart) {
    unsigned char* const to = tile + row * kRowBytes + piece * 16;
    if (o0 + row < p.O && k < p.weight_pitch)
      ptx::cp_async_16(to, static_cast<const T*>(p.weight) + static_cast<int64_t>(o0 + row) * p.weight_pitch + k);
    else *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  }
  ptx::cp_async_commit();
}

// How the launchers give weight [O, C] to copy_weight: as it is where cp.async can read it, else packed by a kernel of its own.
struct WeightPlan {
  bool packs;
  int pitch;
  size_t packed_bytes;
};
WeightPlan plan_weight(const void* weight, DType weight_dtype, DType dtype, int64_t O, int64_t C);
// [O, C] -> [O, pitch] of dtype, zeros behind C.
void pack_weight(const WeightPlan& plan, const void* weight, DType weight_dtype, DType dtype, void* packed, int64_t O, int64_t C,
                 cudaStream_t stream);

// The tile's sums, in the registers of its threads.
template <class T, Product kProduct, int kM>
struct TileSums {
  float sum[2][4][4];  // mma: 16 x 8 tiles of the warp's 32 x 32

  PYOPS_DEVICE void clear_all() {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.f;
  }

  // kRoundInput: the input's floats are still full floats, where the product is tf32's.
  template <bool kRoundInput = false>
  PYOPS_DEVICE void multiply(const unsigned char* input, const unsigned char* weight, bool) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    input += (warp / 2 * 32 + lane % 16) * kRowBytes + lane / 16 * 16;
    multiply_fragments(weight, [&](int half, int i, uint32_t (&a)[4]) {
      ptx::ldmatrix_x4(a, input + 16 * i * kRowBytes + half * 32);
      if constexpr (kRoundInput && kProduct == Product::tf32) {
        PYOPS_UNROLL
        for (int part = 0; part < 4; ++part) a[part] = ptx::float_to_tf32(bits_to_float(a[part]));
      }
    });
  }

  // load(half, i, a): the fragment of the warp's i-th 16 rows, of half a step.
  template <class Load>
  PYOPS_DEVICE void multiply_fragments(const unsigned char* weight, Load&& load) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    weight += (warp % 2 * 32 + lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
    PYOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4], b[2][4];
      PYOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        load(half, i, a[i]);
        ptx::ldmatrix_x4(b[i], weight + 16 * i * kRowBytes + half * 32);
      }
      PYOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        PYOPS_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
          if constexpr (kProduct == Product::tf32)
            ptx::mma_m16n8k8_tf32(sum[i][j], a[i][0], a[i][1], a[i][2], a[i][3], ptx::float_to_tf32(bits_to_float(b0)),
                                  ptx::float_to_tf32(bits_to_float(b1)));
          else ptx::mma_m16n8k16(T{}, sum[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b0, b1);
        }
      }
    }
  }

  PYOPS_DEVICE void store(float* tile) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    float* const at = tile + (warp / 2 * 32 + lane / 4) * kSumsPitch + warp % 2 * 32 + lane % 4 * 2;
    PYOPS_UNROLL
    for (int i = 0; i < 16; ++i) {  // tile (i / 8, i / 2 % 4), its upper or lower half
      const float* const c = &sum[i / 8][i / 2 % 4][i % 2 * 2];
      *reinterpret_cast<float2*>(at + (i / 8 * 16 + i % 2 * 8) * kSumsPitch + i / 2 % 4 * 8) = float2{c[0], c[1]};
    }
  }
};

// A thread's rows are kM / 8 apart, its columns 16: neighbouring threads read neighbouring rows, or the same.
template <int kM>
struct TileSums<float, Product::fma, kM> {
  static constexpr int kRows = kM / 8;
  float sum[8][4], slice[8][4];

  PYOPS_DEVICE void clear_all() {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) sum[i / 4][i % 4] = 0.f, slice[i / 4][i % 4] = 0.f;
  }

  template <bool kRoundInput = false>
  PYOPS_DEVICE void multiply(const unsigned char* input, const unsigned char* weight, bool last_of_slice) {
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    PYOPS_UNROLL
    for (int piece = 0; piece < kStepPieces; ++piece) {
      float4 w[4];
      PYOPS_UNROLL
      for (int j = 0; j < 4; ++j) w[j] = *reinterpret_cast<const float4*>(weight + (x + 16 * j) * kRowBytes + piece * 16);
      PYOPS_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(input + (y + kRows * i) * kRowBytes + piece * 16);
        PYOPS_UNROLL
        for (int j = 0; j < 4; ++j) {
          slice[i][j] = fmaf(a.x, w[j].x, slice[i][j]);
          slice[i][j] = fmaf(a.y, w[j].y, slice[i][j]);
          slice[i][j] = fmaf(a.z, w[j].z, slice[i][j]);
          slice[i][j] = fmaf(a.w, w[j].w, slice[i][j]);
        }
      }
    }
    if (last_of_slice) {
      PYOPS_UNROLL
      for (int i = 0; i < 32; ++i) sum[i / 4][i % 4] += slice[i / 4][i % 4], slice[i / 4][i % 4] = 0.f;
    }
  }

  PYOPS_DEVICE void store(float* tile) const {
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) tile[(y + kRows * (i / 4)) * kSumsPitch + x + i % 4 * 16] = sum[i / 4][i % 4];
  }
};

}  // namespace pyops::conv
