// 1x1 convolution: one matrix product, with what comes before and after it done on the way.
//
//   a = activation_in(((input - rows[0]) * rows[1] - mean) * scale + shift) * gate          [M, C], never in memory
//   output = activation((a weight^T + bias) * keep + residual)                              [M, O]
//   moments = mean and squared deviations of output over positions                          [2, O]
//
// Tiling and floors: pointwise.cuh. A weight that cp.async cannot read as it is (float beside 16-bit images, C not a multiple of 16
// bytes, not aligned) is packed first: [O, C] -> [O, C rounded up to whole 16-byte pieces] of the operands' type.
#include "channel.cuh"
#include "pointwise_cuda.h"
#include "pointwise_epilogue.cuh"

namespace pyops::conv {
namespace {

constexpr int kPackThreads = 256;
constexpr int kMomentsSlots = 4;  // an SM: rows of partial moments, where there are as many tiles

template <class T, Product kProduct, int kM>
PYOPS_KERNEL(kTileThreads<kM>)
pointwise_tile(PointwiseParams p) {
  unsigned char* const shared = dynamic_shared();
  constexpr int kInput = kM * kRowBytes, kWeight = kTileO * kRowBytes;
  auto input_tile = [&](int step) { return shared + step % 2 * kInput; };
  auto weight_tile = [&](int step) { return shared + 2 * kInput + step % 2 * kWeight; };
  float* const sums_tile = reinterpret_cast<float*>(shared);
  const int o0 = static_cast<int>(blockIdx.x) % p.o_tiles * kTileO, slot = static_cast<int>(blockIdx.x) / p.o_tiles;
  const int steps = ceil_div(p.C, kStep<T>);
  ColumnMoments moments;

  PYOPS_NO_UNROLL
  for (int t = 0; t < p.tiles; ++t) {
    const int m0 = (slot * p.tiles + t) * kM;
    if (m0 >= p.M) break;  // the same for the whole block
    InputTile<T, kProduct, kM> input;
    TileSums<T, kProduct, kM> sums;
    sums.clear_all();
    input.m0 = m0;
    copy_weight<T, kM>(p, o0, 0, weight_tile(0));
    input.load(p, 0);
    input.store(p, 0, input_tile(0));
    PYOPS_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step has come, and the one before has been multiplied
      const bool more = step + 1 < steps;
      if (more) {
        copy_weight<T, kM>(p, o0, step + 1, weight_tile(step + 1));
        input.load(p, step + 1);
      }
      sums.multiply(input_tile(step), weight_tile(step), !more || step % (kSlice / kStep<T>) == kSlice / kStep<T> - 1);
      if (more) input.store(p, step + 1, input_tile(step + 1));
    }
    __syncthreads();
    sums.store(sums_tile);
    __syncthreads();
    finish_tile<T, kM>(p, m0, o0, sums_tile);
    __syncthreads();
    if (p.partials) {
      add_moments<kM>(p.M, m0, sums_tile, sums_tile + kM * kSumsPitch, moments);
      __syncthreads();
    }
  }
  const int column = static_cast<int>(threadIdx.x);
  if (p.partials && column < kTileO && o0 + column < p.O) {
    p.partials[2 * static_cast<int64_t>(slot) * p.O + o0 + column] = moments.mean;
    p.partials[(2 * static_cast<int64_t>(slot) + 1) * p.O + o0 + column] = moments.deviation;
  }
}

struct PackParams {
  const void* weight;  // [O, C]
  void* packed;        // [O, pitch]
  int64_t count;       // O * pitch
  int C, pitch;
};

template <class T, class Weight>
PYOPS_KERNEL(kPackThreads)
pointwise_pack(PackParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.count) return;
  const int64_t o = i / p.pitch, c = i % p.pitch;
  static_cast<T*>(p.packed)[i] = from_float<T>(c < p.C ? to_float(static_cast<const Weight*>(p.weight)[o * p.C + c]) : 0.f);
}

template <class T, class Weight>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(params.count, int64_t{kPackThreads}))), kPackThreads, 0};
  launch("pointwise_pack", pointwise_pack<T, Weight>, shape, stream, params);
}

}  // namespace

WeightPlan plan_weight(const void* weight, DType weight_dtype, DType dtype, int64_t O, int64_t C) {
  const int64_t element = dtype == DType::f32 ? 4 : 2, piece = 16 / element;
  WeightPlan plan{};
  plan.packs = weight_dtype != dtype || C % piece != 0 || reinterpret_cast<uintptr_t>(weight) % 16 != 0;
  plan.pitch = static_cast<int>(round_up(C, piece));
  plan.packed_bytes = plan.packs ? round_up(static_cast<size_t>(O * plan.pitch * element), size_t{256}) : 0;
  return plan;
}

void pack_weight(const WeightPlan& plan, const void* weight, DType weight_dtype, DType dtype, void* packed, int64_t O, int64_t C,
                 cudaStream_t stream) {
  const PackParams params{weight, packed, O * plan.pitch, static_cast<int>(C), plan.pitch};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    weight_dtype == DType::f32 ? launch_pack<T, float>(params, stream) : launch_pack<T, T>(params, stream);
  });
}

namespace {

// How a call is computed; the workspace and the launches follow from it.
struct Plan {
  int rows;   // of a tile
  int tiles;  // of a block
  int64_t slots, run;
  WeightPlan weight;
  size_t partial_bytes;
};

Plan plan_of(const Pointwise& p) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t M = p.N * p.P, o_tiles = ceil_div(p.O, int64_t{kTileO});
  if (M > kMost || p.C > kMost || p.O > kMost) throw std::runtime_error("1x1 convolution on a GPU: up to 2^30 positions or channels");
  const int64_t sms = device_limits().sm_count;
  Plan plan{};
  const int64_t large = p.dtype == DType::f32 && !p.tf32 ? kLargeTile<Product::fma> : kLargeTile<Product::mma>;
  const int64_t rows = ceil_div(M, large) * o_tiles < sms ? 32 : large, all = ceil_div(M, rows);
  const int64_t most = p.moments ? ceil_div(kMomentsSlots * sms, o_tiles) : all;
  plan.tiles = static_cast<int>(ceil_div(all, all < most ? all : most));
  plan.slots = ceil_div(all, int64_t{plan.tiles}), plan.run = rows * plan.tiles, plan.rows = static_cast<int>(rows);
  if (plan.slots * o_tiles > INT32_MAX) throw std::runtime_error("1x1 convolution: too much for one launch");
  plan.weight = plan_weight(p.weight, p.weight_dtype, p.dtype, p.O, p.C);
  plan.partial_bytes = p.moments && plan.slots > 1 ? sizeof(float) * 2 * static_cast<size_t>(plan.slots * p.O) : 0;
  return plan;
}

template <class T, Product kProduct>
void launch_tiles(const Plan& plan, const PointwiseParams& params, cudaStream_t stream) {
  constexpr int kLarge = kLargeTile<kProduct>;
  const dim3 grid(static_cast<unsigned>(plan.slots * params.o_tiles));
  if (plan.rows == kLarge)
    launch("pointwise_tile", pointwise_tile<T, kProduct, kLarge>, LaunchShape{grid, kTileThreads<kLarge>, tile_shared_bytes<kLarge>()},
           stream, params);
  else
    launch("pointwise_tile", pointwise_tile<T, kProduct, 32>, LaunchShape{grid, kTileThreads<32>, tile_shared_bytes<32>()}, stream, params);
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

PointwiseParams params_of(const Pointwise& p, const Plan& plan) {
  const int64_t piece = p.dtype == DType::f32 ? 4 : 8;
  PointwiseParams params{};
  params.input = p.input, params.weight = p.weight, params.residual = p.residual, params.output = p.output;
  params.rows = p.rows, params.affine = p.affine, params.gate = p.gate, params.bias = p.bias, params.keep = p.keep;
  params.M = static_cast<int>(p.N * p.P), params.P = static_cast<int>(p.P);
  params.input_stride = p.input_stride, params.residual_stride = p.residual_stride, params.output_stride = p.output_stride;
  params.C = static_cast<int>(p.C), params.O = static_cast<int>(p.O), params.weight_pitch = plan.weight.pitch;
  params.tiles = plan.tiles, params.o_tiles = ceil_div(params.O, kTileO);
  params.input_activation = p.input_activation, params.activation = p.activation;
  params.input_slope = p.input_slope, params.slope = p.slope;
  params.prologue = p.rows || p.affine || p.gate || p.input_activation != Activation::none;
  params.input_vectors = p.C % piece == 0 && p.input_stride % piece == 0 && aligned({p.input});
  params.output_vectors = p.O % piece == 0 && p.output_stride % piece == 0 && aligned({p.output, p.residual}) &&
                          (!p.residual || p.residual_stride % piece == 0);
  params.float_vectors = p.C % 4 == 0 && aligned({p.affine, p.gate});
  return params;
}

}  // namespace

size_t pointwise_workspace(const Pointwise& p) {
  if (p.N * p.P == 0 || p.O == 0) return 0;
  const Plan plan = plan_of(p);
  return plan.weight.packed_bytes + plan.partial_bytes;
}

void pointwise_run(const Pointwise& p, void* workspace, cudaStream_t stream) {
  if (p.N * p.P == 0 || p.O == 0) {
    if (p.moments) zero_async(p.moments, sizeof(float) * 2 * p.O, stream);
    return;
  }
  const Plan plan = plan_of(p);
  PointwiseParams params = params_of(p, plan);
  params.partials = plan.partial_bytes ? reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.weight.packed_bytes) : p.moments;
  if (plan.weight.packs) {
    pack_weight(plan.weight, p.weight, p.weight_dtype, p.dtype, workspace, p.O, p.C, stream);
    params.weight = workspace;
  }
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (is_16bit<T>) launch_tiles<T, Product::mma>(plan, params, stream);
    else if (p.tf32) launch_tiles<T, Product::tf32>(plan, params, stream);
    else launch_tiles<T, Product::fma>(plan, params, stream);
  });
  if (plan.partial_bytes) merge_moments(params.partials, p.moments, plan.slots, plan.run, params.M, p.O, stream);
}

#define PYOPS_TILE_KERNELS(T, product, kM) \
  PYOPS_KERNEL_INFO(pointwise_tile, T, product, 32), PYOPS_KERNEL_INFO(pointwise_tile, T, product, kM)

static const KernelRegistration registration({
    PYOPS_TILE_KERNELS(float, Product::tf32, 128),
    PYOPS_TILE_KERNELS(float, Product::fma, 64),
    PYOPS_TILE_KERNELS(bf16, Product::mma, 128),
    PYOPS_TILE_KERNELS(f16, Product::mma, 128),
    PYOPS_KERNEL_INFO(pointwise_pack, float, float),
    PYOPS_KERNEL_INFO(pointwise_pack, bf16, float),
    PYOPS_KERNEL_INFO(pointwise_pack, bf16, bf16),
    PYOPS_KERNEL_INFO(pointwise_pack, f16, float),
    PYOPS_KERNEL_INFO(pointwise_pack, f16, f16),
});

}  // namespace pyops::conv
