// Convolution with full or grouped filters, and its transpose, as one matrix product whose left operand is never in memory.
//
//   sums = patches [N*OH*OW, KH*KW*C/groups] x weight [O, KH*KW*C/groups]^T       per group
//   output = activation(sums + bias + residual), or + residual after it, or the maximum or average of 2x2 windows of that
//   moments = mean and squared deviations of output
//
// Tiling: a block takes kM positions (128, 64 by FMA, 32 where more would leave SMs idle) of one phase x 64 output channels of one group;
// four stages of shared memory, so that three steps of both operands are under way while one is multiplied (dense_conv.cuh tells how
// they are gathered, pointwise.cuh how they are multiplied). With moments a block takes several such tiles below one another; of a
// transposed convolution of several phases they are computed from the output afterwards.
// A convolution of few channels may go to dense_halo.cu's kernel (plan_halo says which).
// A weight that cp.async cannot read as it is (all but channels_last ones of a convolution with whole pieces) is packed first.
//
// Floors: input, residual read once (each of the KH*KW uses but the first from L2 or L1), output written once, weight once;
// 2*N*OH*OW*O*KH*KW*C/groups flops (transposed: H*W in the place of OH*OW).
#include <utility>

#include "channel.cuh"
#include "dense_conv.cuh"
#include "dense_cuda.h"
#include "dense_halo.cuh"

namespace pyops::conv {
namespace {

constexpr int kMomentsSlots = 4;  // an SM: rows of partial moments, where there are as many tiles

template <class T, Product kProduct, int kM, bool kVectors>
PYOPS_KERNEL(kTileThreads<kM>)
dense_tile(DenseParams p) {
  unsigned char* const shared = dynamic_shared();
  auto input_tile = [&](int step) { return shared + step % kDenseStages * kDenseStageBytes<kM>; };
  auto weight_tile = [&](int step) { return input_tile(step) + kM * kRowBytes; };
  float* const sums_tile = reinterpret_cast<float*>(shared);
  const DenseBlock block(p);
  const int steps = ceil_div(block.K, kStep<T>);
  ColumnMoments moments;

  PYOPS_NO_UNROLL
  for (int t = 0; t < p.tiles; ++t) {
    const int m0 = (block.slot * p.tiles + t) * kM;
    if (m0 >= block.positions) break;  // the same for the whole block
    DenseInput<T, kM, kVectors> input(p, block, m0);
    TileSums<T, kProduct, kM> sums;
    sums.clear_all();
    auto begin = [&](int step) {
      if (step < steps) {
        copy_filters<T, kM>(p, block, step, weight_tile(step));
        input.load(p, block, input_tile(step));
      }
      ptx::cp_async_commit();  // also of nothing: the wait counts steps
    };
    auto finish_load = [&](int step) {
      if (!kVectors && step < steps) input.store(input_tile(step));
    };
    PYOPS_NO_UNROLL
    for (int step = 0; step < kDenseStages - 1; ++step) begin(step), finish_load(step);
    PYOPS_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kDenseStages - 2>();
      __syncthreads();  // this step has come, and the one before has been multiplied
      begin(step + kDenseStages - 1);
      const bool slice_ends = step + 1 == steps || step % (kSlice / kStep<T>) == kSlice / kStep<T> - 1;
      sums.template multiply<true>(input_tile(step), weight_tile(step), slice_ends);
      finish_load(step + kDenseStages - 1);
    }
    __syncthreads();
    sums.store(sums_tile);
    __syncthreads();
    finish_dense<T, kM>(p, block, m0, sums_tile);
    __syncthreads();
    if (p.partials) {
      add_moments<kM>(block.positions, m0, sums_tile, sums_tile + kM * kSumsPitch, moments);
      __syncthreads();
    }
    if (p.pool != Pool::none) {
      store_pooled<T, kM>(p, block, m0, sums_tile);
      __syncthreads();
    }
  }
  const int column = static_cast<int>(threadIdx.x);
  if (p.partials && column < kTileO && block.o0 + column < block.end) {
    const int64_t O = static_cast<int64_t>(p.O) * p.groups, row = 2 * static_cast<int64_t>(block.slot);
    p.partials[row * O + block.o0 + column] = moments.mean;
    p.partials[(row + 1) * O + block.o0 + column] = moments.deviation;
  }
}

// How a call is computed; the workspace and the launches follow from it.
struct Plan {
  Axis y, x;
  int depth, rows, tiles;
  int64_t slots, run, pitch;
  bool vectors, packs;
  std::optional<HaloShape> halo;  // by dense_halo.cu's kernel
  bool moments_after;             // from the output, by kernels of their own
  size_t packed_bytes, partial_bytes;
};

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

Axis axis_of(bool transposed, int64_t in, int64_t out, int taps, int stride, int pad, int dilation) {
  check_extent(transposed ? out : in, taps, stride, pad, dilation);
  Axis axis{static_cast<int>(in), static_cast<int>(out), taps, 1, stride, dilation, -pad, 0, 1};
  if (transposed) {
    int common = stride, rest = dilation;
    while (rest) common %= rest, std::swap(common, rest);
    axis.out_step = stride, axis.in_step = 1, axis.tap_step = -dilation / common;
    axis.offset = pad, axis.dilation = dilation, axis.residues = stride / common;
  }
  return axis;
}

// Whether weight's memory is what packing would make of it.
bool is_packed(const Dense& p, int64_t depth) {
  const int64_t sizes[4] = {p.s.O, depth, p.s.KH, p.s.KW}, packed[4] = {depth * p.s.KH * p.s.KW, 1, depth * p.s.KW, depth};
  for (int d = 0; d < 4; ++d)
    if (sizes[d] > 1 && p.weight_strides[d] != packed[d]) return false;
  return true;
}

Channelwise moments_of(const Dense& p) {
  Channelwise all{};
  all.N = p.s.N, all.P = p.s.OH * p.s.OW, all.C = p.s.O, all.dtype = p.dtype, all.input = p.output, all.sums = p.moments;
  return all;
}

Plan plan_of(const Dense& p, std::optional<DensePath> path) {
  check_counts(p.s);
  const DenseShape& s = p.s;
  const int64_t piece = 16 / element_size(p.dtype), C = s.C / s.groups, O = s.O / s.groups;
  Plan plan{};
  plan.y = axis_of(p.transposed, s.H, s.OH, s.KH, s.stride_h, s.pad_h, s.dilation_h);
  plan.x = axis_of(p.transposed, s.W, s.OW, s.KW, s.stride_w, s.pad_w, s.dilation_w);
  const int64_t phases = int64_t{plan.y.out_step} * plan.x.out_step, o_tiles = ceil_div(O, int64_t{kTileO}) * s.groups;
  plan.vectors = C % piece == 0 && p.input_stride % piece == 0 && aligned({p.input});
  plan.depth = static_cast<int>(phases == 1 ? C : round_up(C, piece));
  plan.halo = plan_halo(p, plan.vectors, path);
  if (plan.halo) plan.x.taps = plan.halo->columns, plan.depth = plan.halo->channels;
  plan.pitch = round_up(int64_t{s.KH} * plan.x.taps * plan.depth, piece);
  plan.packs = p.transposed || plan.pitch != int64_t{s.KH} * s.KW * C || !is_packed(p, C) || !aligned({p.weight});
  plan.packed_bytes = plan.packs ? round_up(static_cast<size_t>(s.O * plan.pitch * element_size(p.dtype)), size_t{256}) : 0;

  const int64_t sms = device_limits().sm_count;
  int64_t M = s.N * ceil_div(s.OH, int64_t{plan.y.out_step}) * ceil_div(s.OW, int64_t{plan.x.out_step});  // of the largest phase
  if (p.pool != Pool::none) M = s.N * (s.OH / 2 * 2) * (s.OW / 2 * 2);
  const int64_t large = p.dtype == DType::f32 && !p.tf32 ? kLargeTile<Product::fma> : kLargeTile<Product::mma>;
  const int64_t rows = ceil_div(M, large) * o_tiles * phases < sms ? 32 : large, all = ceil_div(M, rows);
  plan.moments_after = p.moments && phases > 1;
  const bool joins = p.moments && phases == 1;
  const int64_t most = joins ? ceil_div(kMomentsSlots * sms, o_tiles) : all;
  plan.tiles = static_cast<int>(ceil_div(all, all < most ? all : most));
  plan.slots = ceil_div(all, int64_t{plan.tiles}), plan.run = rows * plan.tiles, plan.rows = static_cast<int>(rows);
  if (plan.slots * o_tiles > INT32_MAX / phases) throw std::runtime_error("dense convolution: too much for one launch");
  plan.partial_bytes = joins && plan.slots > 1 ? sizeof(float) * 2 * static_cast<size_t>(plan.slots * s.O) : 0;
  if (plan.moments_after) plan.partial_bytes = channel_moments_workspace(moments_of(p));
  return plan;
}

template <class T, Product kProduct, int kM>
void launch_tile(const Plan& plan, const DenseParams& params, cudaStream_t stream) {
  const int64_t phases = int64_t{plan.y.out_step} * plan.x.out_step;
  const dim3 grid(static_cast<unsigned>(phases * plan.slots * params.groups * params.o_tiles));
  const LaunchShape shape{grid, kTileThreads<kM>, dense_shared_bytes<kM>()};
  if (plan.vectors) launch("dense_tile", dense_tile<T, kProduct, kM, true>, shape, stream, params);
  else launch("dense_tile", dense_tile<T, kProduct, kM, false>, shape, stream, params);
}

template <class T, Product kProduct>
void launch_tiles(const Plan& plan, const DenseParams& params, cudaStream_t stream) {
  if (plan.rows == kLargeTile<kProduct>) launch_tile<T, kProduct, kLargeTile<kProduct>>(plan, params, stream);
  else launch_tile<T, kProduct, 32>(plan, params, stream);
}

DenseParams params_of(const Dense& p, const Plan& plan) {
  const int64_t piece = 16 / element_size(p.dtype);
  DenseParams params{};
  params.input = p.input, params.weight = p.weight, params.residual = p.residual, params.bias = p.bias, params.output = p.output;
  params.input_stride = p.input_stride, params.residual_stride = p.residual_stride, params.output_stride = p.s.O;
  params.weight_pitch = plan.pitch, params.y = plan.y, params.x = plan.x;
  params.N = static_cast<int>(p.s.N), params.groups = p.s.groups;
  params.C = static_cast<int>(p.s.C / p.s.groups), params.O = static_cast<int>(p.s.O / p.s.groups), params.depth = plan.depth;
  params.tiles = plan.tiles, params.o_tiles = ceil_div(params.O, kTileO), params.slots = static_cast<int>(plan.slots);
  params.activation = p.activation, params.slope = p.slope, params.residual_last = p.residual_last, params.pool = p.pool;
  params.output_vectors = params.O % piece == 0 && aligned({p.output, p.residual}) && (!p.residual || p.residual_stride % piece == 0);
  return params;
}

bool nothing(const Dense& p) {
  const int shift = p.pool != Pool::none;
  return p.s.N * (p.s.OH >> shift) * (p.s.OW >> shift) == 0 || p.s.O == 0;
}

}  // namespace

size_t dense_workspace(const Dense& p, std::optional<DensePath> path) {
  if (nothing(p)) return 0;
  const Plan plan = plan_of(p, path);
  return plan.packed_bytes + plan.partial_bytes;
}

void dense_run(const Dense& p, void* workspace, cudaStream_t stream, std::optional<DensePath> path) {
  if (nothing(p)) {
    if (p.moments) zero_async(p.moments, sizeof(float) * 2 * p.s.O, stream);
    return;
  }
  const Plan plan = plan_of(p, path);
  DenseParams params = params_of(p, plan);
  void* const space = static_cast<char*>(workspace) + plan.packed_bytes;
  params.partials = plan.moments_after ? nullptr : plan.partial_bytes ? static_cast<float*>(space) : p.moments;
  if (plan.packs) {
    pack_filters(p, plan.y, plan.x, plan.depth, plan.pitch, workspace, stream);
    params.weight = workspace;
  }
  if (plan.halo) return launch_halo(p, *plan.halo, plan.vectors, params, stream);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (is_16bit<T>) launch_tiles<T, Product::mma>(plan, params, stream);
    else if (p.tf32) launch_tiles<T, Product::tf32>(plan, params, stream);
    else launch_tiles<T, Product::fma>(plan, params, stream);
  });
  if (plan.moments_after) channel_moments(moments_of(p), space, stream);
  else if (plan.partial_bytes) merge_moments(params.partials, p.moments, plan.slots, plan.run, p.s.N * p.s.OH * p.s.OW, p.s.O, stream);
}

#define PYOPS_DENSE_KERNELS(T, product, kM)                                                                  \
  PYOPS_KERNEL_INFO(dense_tile, T, product, 32, true), PYOPS_KERNEL_INFO(dense_tile, T, product, 32, false), \
      PYOPS_KERNEL_INFO(dense_tile, T, product, kM, true), PYOPS_KERNEL_INFO(dense_tile, T, product, kM, false)

static const KernelRegistration registration({
    PYOPS_DENSE_KERNELS(float, Product::tf32, 128),
    PYOPS_DENSE_KERNELS(float, Product::fma, 64),
    PYOPS_DENSE_KERNELS(bf16, Product::mma, 128),
    PYOPS_DENSE_KERNELS(f16, Product::mma, 128),
});

}  // namespace pyops::conv
