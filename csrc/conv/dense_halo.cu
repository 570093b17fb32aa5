// Convolution of few channels whose tile of the input, halo included, is read once for all taps; dense_conv.cu fetches anew for each.
//
//   output [N, OH, OW, O] = activation(conv(input [N, H, W, C]) + bias + residual), or + residual after it, or 2x2 windows of that pooled
//
// Tiling: a block takes a rectangle of 128 positions x 64 output channels; dense_halo.cuh tells how its input lies in shared memory. The
// filters [O, K] come through four stages of 64 bytes a row, as in dense_tile, whose product, epilogue and pooling are these too.
//
// Floors: input once but for the halo (3x3: 180 positions for 8 x 16), filters from L2 for each tile of positions, output once;
// 2*N*OH*OW*O*KH*KW*C flops.
#include "dense_halo.cuh"

#include <cmath>

#include "../common/cuda_registry.h"

namespace pyops::conv {
namespace {

template <class T, Product kProduct, bool kVectors>
PYOPS_KERNEL(kTileThreads<kHaloM>)
dense_halo(HaloParams p) {
  constexpr int kThreads = kTileThreads<kHaloM>, kStageBytes = kTileO * kRowBytes;
  const HaloShape& h = p.halo;
  unsigned char* const shared = dynamic_shared();
  unsigned char* const tile = shared + kDenseStages * kStageBytes;
  uint4* const zeros = reinterpret_cast<uint4*>(tile + h.rows * h.row_records * h.pitch);
  int* const offsets = reinterpret_cast<int*>(zeros + 1);  // of K's pieces; bit 0: the last of a filter row; negative: none
  const HaloBlock block(p);
  const int steps = ceil_div(block.K, kStep<T>);
  auto weight_tile = [&](int step) { return shared + step % kDenseStages * kStageBytes; };
  auto begin = [&](int step) {
    if (step < steps) copy_filters<T, kHaloM>(p, block, step, weight_tile(step));
    ptx::cp_async_commit();  // also of nothing: the wait counts steps
  };

  for_each_piece(p, block, tile, [&](int y, int x, int piece, uint4* to) {
    if constexpr (kVectors) {
      const bool exists = is_inside(p.y, y) && is_inside(p.x, x);
      const int64_t from = exists ? static_cast<int64_t>((block.n * p.y.in + y) * p.x.in + x) * p.input_stride + piece * kPiece<T> : 0;
      ptx::cp_async_16_or_zero(to, static_cast<const T*>(p.input) + from, exists);
    } else {
      const uint4 value = gathered<T>(p, block.n, y, x, piece);
      *to = kProduct == Product::tf32 ? rounded_to_tf32(value) : value;
    }
  });
  ptx::cp_async_commit();
  PYOPS_NO_UNROLL
  for (int step = 0; step < kDenseStages - 1; ++step) begin(step);
  PYOPS_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < steps * kStepPieces; i += kThreads) {
    const int group = i / h.pieces, row = group / h.groups, column = group % h.groups * h.folded;
    const int record = row * h.row_records + (h.residues > 1 ? column % p.x.in_step * h.run : 0) + column / p.x.in_step;
    const bool is_last = h.folded > 1 && group % h.groups == h.groups - 1;
    offsets[i] = row < p.y.taps ? record * h.pitch + i % h.pieces * 16 + is_last : -1;
  }
  if (threadIdx.x == 0) *zeros = uint4{0, 0, 0, 0};
  if constexpr (kVectors && kProduct == Product::tf32) {
    ptx::cp_async_wait<kDenseStages - 1>();  // a thread's own pieces have come
    for_each_piece(p, block, tile, [&](int, int, int, uint4* own) { *own = rounded_to_tf32(*own); });
  }

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const unsigned char* rows[2];  // records of tap (0, 0) of the positions whose addresses the lane gives
  PYOPS_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int m = warp / 2 * 32 + i * 16 + lane % 16;
    rows[i] = tile + (block.row_of(m) * p.y.in_step * h.row_records + block.column_of(m)) * h.pitch;
  }
  TileSums<T, kProduct, kHaloM> sums;
  sums.clear_all();
  PYOPS_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kDenseStages - 2>();
    __syncthreads();  // this step has come, and the one before has been multiplied
    begin(step + kDenseStages - 1);
    sums.multiply_fragments(weight_tile(step), [&](int half, int i, uint32_t (&a)[4]) {
      const int* const pair = offsets + step * kStepPieces + half * 2;
      const int own = pair[lane / 16];
      ptx::ldmatrix_x4(a, own < 0 ? reinterpret_cast<const unsigned char*>(zeros) : rows[i] + (own & ~1));
      if constexpr (!kVectors) {
        const bool cut = lane % 4 >= h.last_words;
        if (cut && pair[0] & 1) a[0] = a[1] = 0;
        if (cut && pair[1] & 1) a[2] = a[3] = 0;
      }
    });
  }
  __syncthreads();
  float* const sums_tile = reinterpret_cast<float*>(shared);
  sums.store(sums_tile);
  __syncthreads();
  finish_dense<T, kHaloM>(p, block, 0, sums_tile);
  if (p.pool == Pool::none) return;
  __syncthreads();
  store_pooled<T, kHaloM>(p, block, 0, sums_tile);
}

template <class T, Product kProduct>
void launch_either(bool vectors, const HaloParams& params, cudaStream_t stream) {
  const HaloShape& h = params.halo;
  const dim3 grid(static_cast<unsigned>(params.N) * params.y_tiles * params.x_tiles * params.o_tiles);
  const LaunchShape shape{grid, kTileThreads<kHaloM>, halo_shared_bytes(h, params.y.taps * h.groups * h.pieces)};
  if (vectors) launch("dense_halo", dense_halo<T, kProduct, true>, shape, stream, params);
  else launch("dense_halo", dense_halo<T, kProduct, false>, shape, stream, params);
}

// Clocks that an SM is expected to need for tiles of 128 positions x 64 channels: for what comes from L2 at 64 bytes a clock, then for
// products at 1024 a clock (tf32: 512). To gather an element costs some ten instructions of a warp for 32 of them, four a clock: as much
// as 5 bytes more.
double expected_clocks(const Dense& p, int64_t tiles, int64_t input_elements, int64_t K, bool vectors) {
  const double element = static_cast<double>(element_size(p.dtype)), products = p.dtype == DType::f32 ? 512 : 1024;
  const double input = static_cast<double>(input_elements) * (vectors ? element : element + 5), filters = kTileO * element * K;
  return static_cast<double>(tiles) * ((input + filters) / 64 + kHaloM * kTileO * K / products);
}

}  // namespace

// Prediction before measurement: nothing has been timed on a GPU. dense_tile brings 128 x K input elements for 128 positions where this
// kernel brings a tile with its halo (3x3: 1152 x C and 180 x C); both bring 64 x K of filters. Against it: tiles that reach over the
// image's edge, and zeros in K up to whole records. Two blocks must fit an SM, and each SM must have one.
std::optional<HaloShape> plan_halo(const Dense& p, bool vectors, std::optional<DensePath> path) {
  if (path == DensePath::tile) return std::nullopt;
  constexpr int64_t kMost = 1 << 10;  // of channels, taps, strides: far beyond what shared memory holds
  constexpr size_t kReserved = 1024;  // bytes of shared memory that the system takes for a block
  const DenseShape& s = p.s;
  const DeviceLimits device = device_limits();
  const int64_t OH = p.pool == Pool::none ? s.OH : s.OH / 2 * 2, OW = p.pool == Pool::none ? s.OW : s.OW / 2 * 2;
  const int64_t step = kStepPieces * 16 / element_size(p.dtype), taps = int64_t{s.KH} * s.KW;  // both multiply whole steps
  const bool rounded = p.dtype != DType::f32 || p.tf32;
  bool possible = rounded && !p.transposed && !p.moments && s.groups == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  for (int64_t size : {s.C, int64_t{s.KH}, int64_t{s.KW}, int64_t{s.stride_h}, int64_t{s.stride_w}}) possible &= size <= kMost;
  const size_t room = static_cast<size_t>(device.shared_bytes);

  std::optional<HaloShape> best;
  double clocks =
      path ? INFINITY
           : expected_clocks(p, ceil_div(s.N * OH * OW, int64_t{kHaloM}), kHaloM * taps * s.C, round_up(taps * s.C, step), vectors);
  for (int log_windows = 2; possible && log_windows <= 4; ++log_windows) {
    const HaloShape h = halo_shape(p, log_windows);
    const int64_t tiles = s.N * ceil_div(OH, int64_t{tile_rows(h)}) * ceil_div(OW, int64_t{tile_columns(h)});
    const int64_t blocks = tiles * ceil_div(s.O, int64_t{kTileO});
    const size_t shared = halo_shared_bytes(h, s.KH * h.groups * h.pieces);
    if (blocks > INT32_MAX || shared > room || (!path && (blocks < device.sm_count || shared > (room - kReserved) / 2))) continue;
    const int64_t input = int64_t{h.rows} * h.residues * h.run * h.folded * h.channels, K = int64_t{s.KH} * h.columns * h.channels;
    const double own = expected_clocks(p, tiles, input, round_up(K, step), vectors);
    if (own < clocks) best = h, clocks = own;
  }
  if (path && !best) throw std::runtime_error("dense convolution: not a call for the kernel that keeps the halo");
  return best;
}

void launch_halo(const Dense& p, const HaloShape& shape, bool vectors, const DenseParams& dense, cudaStream_t stream) {
  HaloParams params{};
  static_cast<DenseParams&>(params) = dense;
  params.halo = shape;
  const int unused = p.pool == Pool::none ? 0 : 1;  // what is left of an odd number
  params.y_tiles = ceil_div(dense.y.out & ~unused, tile_rows(shape));
  params.x_tiles = ceil_div(dense.x.out & ~unused, tile_columns(shape));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (is_16bit<T>) launch_either<T, Product::mma>(vectors, params, stream);
    else launch_either<T, Product::tf32>(vectors, params, stream);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(dense_halo, float, Product::tf32, true),
    PYOPS_KERNEL_INFO(dense_halo, float, Product::tf32, false),
    PYOPS_KERNEL_INFO(dense_halo, bf16, Product::mma, true),
    PYOPS_KERNEL_INFO(dense_halo, bf16, Product::mma, false),
    PYOPS_KERNEL_INFO(dense_halo, f16, Product::mma, true),
    PYOPS_KERNEL_INFO(dense_halo, f16, Product::mma, false),
});

}  // namespace pyops::conv
