// The fused MLP: two linear layers whose hidden rows stay in registers.
//
//   input [M, C] -> x [M, C] (normalised) -> hidden [M, H] = activation(x first^T + first_bias) -> output [M, O] = hidden second^T + ...
//
// A warp has 16 rows (32 where inputs and outputs are at most 96 and 16 bits wide) of input and of the sums of output in registers, and
// walks the hidden units `unit` (32, or 16 of float) at a time: their sums, in the layout of mma's accumulators, become the second
// product's left operand without leaving the lane. A row lies in four lanes, lane t with the columns unit*i + piece*t ..: 16 bytes of
// memory each, and a row's statistics are two shuffles. That the sums of products run over columns in that order, and outputs come out
// in it, is the business of the packed weights (mlp_cuda.h), which a block's warps share: a chunk's parts are one piece of memory,
// copied by cp.async kStages - 1 chunks ahead, read by 16-byte loads without bank conflicts.
//
// Floors: 2*M*H*(C + O) flops; input, residual and output over memory bandwidth; weights from L2 for each block of 128 rows (fewer rows
// a block where M would leave SMs idle).
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "../conv/activation.cuh"
#include "../conv/vectors.cuh"
#include "mlp_cuda.h"

namespace pyops::linear {
namespace {

constexpr int kStages = 3;
constexpr int kMostWarps = 8;
constexpr int kPackThreads = 256;

struct MlpParams {
  const void *input, *residual;
  const uint4* packed;
  const float* second_bias;
  void* output;
  int64_t M;
  int C, O, inputs, outputs, chunks, first, chunk_size;  // units and pieces: MlpCudaLayout
  bool norm, input_vectors, output_vectors;
  float eps, slope, share;
  Activation activation;
};

template <class T>
constexpr int kPiece = 16 / sizeof(T);
template <class T>
constexpr int kTiles = kPiece<T> / 2;  // of eight columns in a unit

template <class T>
union Piece {
  uint4 raw;
  T element[kPiece<T>];
};

// The left operand of two steps, of 16 rows.
struct Left {
  uint32_t step[2][4];
};

template <class T>
PYOPS_DEVICE void multiply(float (&sum)[4], const Left& a, const uint4& b) {
  const auto& s = a.step;
  if constexpr (is_16bit<T>) {
    ptx::mma_m16n8k16(T{}, sum, s[0][0], s[0][1], s[0][2], s[0][3], b.x, b.y);
    ptx::mma_m16n8k16(T{}, sum, s[1][0], s[1][1], s[1][2], s[1][3], b.z, b.w);
  } else {
    ptx::mma_m16n8k8_tf32(sum, s[0][0], s[0][1], s[0][2], s[0][3], b.x, b.y);
    ptx::mma_m16n8k8_tf32(sum, s[1][0], s[1][1], s[1][2], s[1][3], b.z, b.w);
  }
}

// A value as an operand: floats with the digits that tensor cores take.
template <class T>
PYOPS_DEVICE T operand(float value) {
  if constexpr (is_16bit<T>) return from_float<T>(value);
  else return bits_to_float(ptx::float_to_tf32(value));
}

// V elements from `column` on of a row that has `end`, zeros behind.
template <class T>
PYOPS_DEVICE uint4 load_piece(const T* row, int column, int end, bool vectors) {
  Piece<T> value;
  value.raw = uint4{0, 0, 0, 0};
  if (vectors && column < end) return *reinterpret_cast<const uint4*>(row + column);
  PYOPS_UNROLL
  for (int v = 0; v < kPiece<T>; ++v)
    if (column + v < end) value.element[v] = row[column + v];
  return value.raw;
}

// A row's pieces in a lane, normalised over the row's C columns.
template <class T, int kUnits>
PYOPS_DEVICE void normalise(const MlpParams& p, int t, uint4 (&row)[kUnits]) {
  constexpr int V = kPiece<T>;
  const auto over_lanes = [](float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
  };
  // f(the piece's values, how many of them are columns) for each piece
  const auto each = [&](auto&& f) {
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      Piece<T> value;
      value.raw = row[i];
      f(value, p.C - (i * 4 + t) * V);
      row[i] = value.raw;
    }
  };
  float sum = 0.f, squares = 0.f;
  each([&](const Piece<T>& value, int) {
    float part = 0.f;  // zeros behind the last column
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) part += to_float(value.element[v]);
    sum += part;
  });
  const float mean = over_lanes(sum) * p.share;
  each([&](const Piece<T>& value, int count) {
    float part = 0.f;
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) {
      const float apart = v < count ? to_float(value.element[v]) - mean : 0.f;
      part += apart * apart;
    }
    squares += part;
  });
  const float scale = 1.f / sqrtf(over_lanes(squares) * p.share + p.eps);
  each([&](Piece<T>& value, int count) {
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) value.element[v] = from_float<T>(v < count ? (to_float(value.element[v]) - mean) * scale : 0.f);
  });
}

// The warp's rows of input as left operands: rows row + g and row + g + 8 of each 16.
template <class T, int kUnits>
PYOPS_DEVICE void load_rows(const MlpParams& p, int64_t first, Left (&x)[kUnits]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, t = lane % 4;
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t own = first + lane / 4 + half * 8, row = own < p.M ? own : p.M - 1;  // rows past the last are not written
    uint4 pieces[kUnits];
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i)
      pieces[i] = load_piece<T>(static_cast<const T*>(p.input) + row * p.C, (i * 4 + t) * kPiece<T>, p.C, p.input_vectors);
    if (p.norm) normalise<T, kUnits>(p, t, pieces);
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      if constexpr (!is_16bit<T>) {
        Piece<T> value;
        value.raw = pieces[i];
        PYOPS_UNROLL
        for (int v = 0; v < kPiece<T>; ++v) value.element[v] = operand<T>(value.element[v]);
        pieces[i] = value.raw;
      }
      x[i].step[0][half] = pieces[i].x, x[i].step[0][2 + half] = pieces[i].y;
      x[i].step[1][half] = pieces[i].z, x[i].step[1][2 + half] = pieces[i].w;
    }
  }
}

// A chunk's hidden rows, from sums to the second product's left operand.
template <class T>
PYOPS_DEVICE Left hidden_operand(const float (&h)[kTiles<T>][4]) {
  Left a;
  PYOPS_UNROLL
  for (int step = 0; step < 2; ++step) {
    if constexpr (is_16bit<T>) {  // columns 0..7 and 8..15 of the step: a tile each
      PYOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &h[2 * step + i / 2][i % 2 * 2];
        const T low = from_float<T>(pair[0]), high = from_float<T>(pair[1]);
        a.step[step][i] = low.bits | static_cast<uint32_t>(high.bits) << 16;
      }
    } else {  // columns t and t + 4 of the step: 2t and 2t + 1 of the tile
      PYOPS_UNROLL
      for (int i = 0; i < 4; ++i) a.step[step][i] = ptx::float_to_tf32(h[step][i % 2 * 2 + i / 2]);
    }
  }
  return a;
}

// The sums of 16 rows of output, with bias and residual, to memory: a unit's tiles are kPiece neighbouring columns of a lane.
template <class T, int kUnits>
PYOPS_DEVICE void store_rows(const MlpParams& p, int64_t first, const float (&sum)[kUnits * kTiles<T>][4]) {
  constexpr int V = kPiece<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + lane / 4 + half * 8;
    if (row >= p.M) continue;
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      const int column = (i * 4 + lane % 4) * V;
      if (column >= p.O) continue;
      Piece<T> value;
      value.raw = uint4{0, 0, 0, 0};
      if (p.residual) value.raw = load_piece<T>(static_cast<const T*>(p.residual) + row * p.O, column, p.O, p.output_vectors);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) {
        const float own = sum[i * kTiles<T> + v / 2][half * 2 + v % 2] + p.second_bias[column + v];
        value.element[v] = from_float<T>(own + to_float(value.element[v]));
      }
      T* const to = static_cast<T*>(p.output) + row * p.O + column;
      if (p.output_vectors) *reinterpret_cast<uint4*>(to) = value.raw;
      else {
        PYOPS_UNROLL
        for (int v = 0; v < V; ++v)
          if (column + v < p.O) to[v] = value.element[v];
      }
    }
  }
}

// kWide: the most inputs and outputs; kGroups of 16 rows a warp.
template <class T, int kWide, int kGroups>
PYOPS_KERNEL(kMostWarps* kWarpSize)
mlp_rows(MlpParams p) {
  constexpr int kUnits = kWide / (4 * kPiece<T>), J = kTiles<T>;
  uint4* const shared = reinterpret_cast<uint4*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % kWarpSize;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * (threads / kWarpSize) + thread / kWarpSize) * 16 * kGroups;
  const auto stage = [&](int chunk) { return shared + chunk % kStages * p.chunk_size; };
  const auto copy = [&](int chunk) {
    if (chunk < p.chunks) {
      const uint4* const from = p.packed + static_cast<int64_t>(chunk) * p.chunk_size;
      uint4* const to = stage(chunk);
      for (int i = thread; i < p.chunk_size; i += threads) ptx::cp_async_16(to + i, from + i);
    }
    ptx::cp_async_commit();
  };
  PYOPS_UNROLL
  for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk);

  Left x[kGroups][kUnits];
  PYOPS_UNROLL
  for (int r = 0; r < kGroups; ++r) load_rows<T, kUnits>(p, row + 16 * r, x[r]);
  float sum[kGroups][kUnits * J][4];
  PYOPS_UNROLL
  for (int i = 0; i < kGroups * kUnits * J * 4; ++i) sum[i / (kUnits * J * 4)][i / 4 % (kUnits * J)][i % 4] = 0.f;

  PYOPS_NO_UNROLL
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk has come, and the one before has been multiplied
    copy(chunk + kStages - 1);
    const uint4* const weights = stage(chunk) + lane;
    const float* const bias = reinterpret_cast<const float*>(stage(chunk) + p.chunk_size) - 8 * J + lane % 4 * 2;
    float h[kGroups][J][4];
    PYOPS_UNROLL
    for (int i = 0; i < kGroups * J * 4; ++i) h[i / (J * 4)][i / 4 % J][i % 4] = bias[i / 4 % J * 8 + i % 2];
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      if (i >= p.inputs) break;
      PYOPS_UNROLL
      for (int j = 0; j < J; ++j) {
        const uint4 b = weights[(i * J + j) * kWarpSize];
        PYOPS_UNROLL
        for (int r = 0; r < kGroups; ++r) multiply<T>(h[r][j], x[r][i], b);
      }
    }
    PYOPS_UNROLL
    for (int i = 0; i < kGroups * J; ++i) conv::activate<T>(p.activation, p.slope, h[i / J][i % J]);
    Left a[kGroups];
    PYOPS_UNROLL
    for (int r = 0; r < kGroups; ++r) a[r] = hidden_operand<T>(h[r]);
    PYOPS_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      if (i >= p.outputs) break;
      PYOPS_UNROLL
      for (int j = 0; j < J; ++j) {
        const uint4 b = weights[p.first + (i * J + j) * kWarpSize];
        PYOPS_UNROLL
        for (int r = 0; r < kGroups; ++r) multiply<T>(sum[r][i * J + j], a[r], b);
      }
    }
  }
  ptx::cp_async_wait<0>();
  PYOPS_UNROLL
  for (int r = 0; r < kGroups; ++r) store_rows<T, kUnits>(p, row + 16 * r, sum[r]);
}

// ------------------------------------------------------------------------------------------------------------------- packing

struct PackParams {
  const void *first, *second;
  const float *first_bias, *second_bias;
  uint4* packed;
  int64_t pieces;  // of all chunks and second_bias
  int C, H, O, inputs, outputs, chunks, first_size, second_size, chunk_size;
};

PYOPS_DEVICE float bias_at(const float* from, int at, int end) { return at < end ? from[at] : 0.f; }

// A thread a piece.
template <class T>
PYOPS_KERNEL(kPackThreads)
mlp_pack_pieces(PackParams p) {
  constexpr int V = kPiece<T>, kUnit = 4 * V, J = kTiles<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (at >= p.pieces) return;
  const int chunk = static_cast<int>(at / p.chunk_size);
  int i = static_cast<int>(at % p.chunk_size);
  float biases[4];
  const bool is_last = chunk == p.chunks, is_bias = i >= p.first_size + p.second_size;
  if (is_last || is_bias) {
    PYOPS_UNROLL
    for (int v = 0; v < 4; ++v)
      biases[v] = is_last ? bias_at(p.second_bias, 4 * i + v, p.O)
                          : bias_at(p.first_bias, chunk * kUnit + 4 * (i - p.first_size - p.second_size) + v, p.H);
    p.packed[at] = {float_to_bits(biases[0]), float_to_bits(biases[1]), float_to_bits(biases[2]), float_to_bits(biases[3])};
    return;
  }
  const bool is_second = i >= p.first_size;
  if (is_second) i -= p.first_size;
  const int g = i % kWarpSize / 4, t = i % 4, j = i / kWarpSize % J, unit = i / kWarpSize / J;
  Piece<T> value;
  PYOPS_UNROLL
  for (int v = 0; v < V; ++v) {
    float weight = 0.f;
    if (is_second) {
      const int o = unit * kUnit + g / 2 * V + 2 * j + g % 2, h = chunk * kUnit + v / 2 * 8 + 2 * t + v % 2;
      if (o < p.O && h < p.H) weight = to_float(static_cast<const T*>(p.second)[static_cast<int64_t>(o) * p.H + h]);
    } else {
      const int h = chunk * kUnit + 8 * j + g, c = unit * kUnit + t * V + v;
      if (h < p.H && c < p.C) weight = to_float(static_cast<const T*>(p.first)[static_cast<int64_t>(h) * p.C + c]);
    }
    value.element[v] = operand<T>(weight);
  }
  p.packed[at] = value.raw;
}

void check_sizes(const MlpSizes& s) {
  if (s.C > kMlpMost || s.O > kMlpMost || s.H > INT32_MAX / 2)
    throw std::runtime_error("fused MLP on a GPU: up to " + std::to_string(kMlpMost) + " inputs and outputs");
}

template <class T, int kWide, int kGroups>
void launch_rows(const Mlp& p, const MlpParams& params, cudaStream_t stream) {
  // as many rows a block as still give each SM one
  const int64_t all = ceil_div(p.M, int64_t{16 * kGroups}), sms = device_limits().sm_count;
  int warps = kMostWarps / kGroups;
  while (warps > 2 && ceil_div(all, int64_t{warps}) < sms) warps /= 2;
  const int64_t blocks = ceil_div(all, int64_t{warps});
  if (blocks > INT32_MAX) throw std::runtime_error("fused MLP: too much for one launch");
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), warps * kWarpSize, sizeof(uint4) * kStages * params.chunk_size};
  launch("mlp_rows", mlp_rows<T, kWide, kGroups>, shape, stream, params);
}

}  // namespace

void mlp_pack_cuda(const MlpSizes& s, const MlpWeights& w, float* packed, cudaStream_t stream) {
  check_sizes(s);
  const MlpCudaLayout layout(s, w.dtype);
  PackParams params{w.first, w.second, w.first_bias, w.second_bias, reinterpret_cast<uint4*>(packed)};
  params.pieces = int64_t{layout.chunks} * layout.chunk_size + layout.outputs * layout.unit / 4;
  params.C = static_cast<int>(s.C), params.H = static_cast<int>(s.H), params.O = static_cast<int>(s.O);
  params.inputs = layout.inputs, params.outputs = layout.outputs, params.chunks = layout.chunks;
  params.first_size = layout.first, params.second_size = layout.second, params.chunk_size = layout.chunk_size;
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(params.pieces, int64_t{kPackThreads}))), kPackThreads, 0};
  conv::with_type(w.dtype, [&](auto type) { launch("mlp_pack_pieces", mlp_pack_pieces<decltype(type)>, shape, stream, params); });
}

void mlp_cuda(const Mlp& p, cudaStream_t stream) {
  check_sizes(p.sizes);
  if (p.M == 0) return;
  const MlpCudaLayout layout(p.sizes, p.dtype);
  MlpParams params{};
  params.input = p.input, params.residual = p.residual, params.output = p.output, params.M = p.M;
  params.packed = reinterpret_cast<const uint4*>(p.packed);
  params.second_bias = p.packed + int64_t{4} * layout.chunks * layout.chunk_size;
  params.C = static_cast<int>(p.sizes.C), params.O = static_cast<int>(p.sizes.O);
  params.inputs = layout.inputs, params.outputs = layout.outputs, params.chunks = layout.chunks;
  params.first = layout.first, params.chunk_size = layout.chunk_size;
  params.norm = p.norm, params.eps = p.eps, params.share = 1.f / static_cast<float>(p.sizes.C);
  params.activation = p.activation, params.slope = p.slope;
  const int element = p.dtype == DType::f32 ? 4 : 2;
  params.input_vectors = conv::vectors_fit(p.sizes.C, layout.piece, element, {p.input});
  params.output_vectors = conv::vectors_fit(p.sizes.O, layout.piece, element, {p.residual, p.output});
  conv::with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.sizes.C <= 96 && p.sizes.O <= 96) launch_rows<T, 96, is_16bit<T> ? 2 : 1>(p, params, stream);
    else launch_rows<T, kMlpMost, 1>(p, params, stream);
  });
}

#define PYOPS_MLP_CUDA_KERNELS(T, kGroups) \
  PYOPS_KERNEL_INFO(mlp_rows, T, 96, kGroups), PYOPS_KERNEL_INFO(mlp_rows, T, 192, 1), PYOPS_KERNEL_INFO(mlp_pack_pieces, T)

static const KernelRegistration registration({
    PYOPS_MLP_CUDA_KERNELS(float, 1),
    PYOPS_MLP_CUDA_KERNELS(bf16, 2),
    PYOPS_MLP_CUDA_KERNELS(f16, 2),
});

}  // namespace pyops::linear
