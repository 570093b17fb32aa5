// The first two convolutions of an inverted-residual block in one kernel: the expanded image, six times the input, stays on the chip.
//
//   e = activation(input expand_weight^T + expand_bias)     [N, H, W, E], a tile at a time in shared memory
//   output = activation(depthwise(e) + depthwise_bias)      [N, OH, OW, E], and its means over positions [N, E]
//
// Tiling: expand_depthwise.cuh. Floors: input read once, output written once; 2*N*H*W*C*E + 2*K*K*N*OH*OW*E flops. Of memory this moves
// the floor and the weights (the input comes from L2 again for every further 64 channels and for halos), where two kernels move
// 2*N*H*W*E elements more: EfficientNet-B0's 24 -> 144 channels at 56 x 56 in bf16 take 1.05 MB an image instead of 2.86, its first
// stride-2 block (16 -> 96 at 112 x 112) 1.0 instead of 5.8. The price is the halo: positions in two tiles are expanded twice.
//
// The tile is chosen by a count of cycles (`cycles_of`), among those whose shared memory is at most 100 KiB, so that two blocks share
// an SM of an H100; 16-bit planes of 14 x 14 and less fit one tile, and nothing is computed twice. Means: a block's sums go to memory,
// `depthwise_means` adds an image's tiles in order; an image of one tile needs no second kernel.
#include "expand_depthwise.cuh"

#include <algorithm>
#include <cmath>

#include "expand_depthwise_cuda.h"

namespace pyops::conv {
namespace {

template <class T, Product kProduct, int K, int S>
PYOPS_KERNEL(kExpandThreads)
expand_depthwise(ExpandDepthwiseParams p) {
  unsigned char* const shared = dynamic_shared();
  const ExpandShared room(p.halo_h, p.halo_w, p.tile_w, K, S, sizeof(T));
  uint32_t* const places = reinterpret_cast<uint32_t*>(shared + room.places());
  float* const filter = reinterpret_cast<float*>(shared + room.filter());
  float* const bias = filter + K * K * kTileO;
  float* const expand_bias = bias + kTileO;
  unsigned char* const expanded = shared + room.expanded();
  const Window w(p, K, S);
  const int steps = ceil_div(p.C, kStep<T>), turns = ceil_div(w.rows, kHaloRows) * steps;

  lay_out<T>(p, w, places, expanded);
  stage_filter<T, kLaneChannels>(p.depthwise_weight, p.depthwise_is_float, K * K, 0, K * K, kLaneGroups, w.e0, p.E, filter);
  stage_filter<T, kLaneChannels>(p.depthwise_bias, true, 1, 0, 1, kLaneGroups, w.e0, p.E, bias);
  stage_filter<T, kLaneChannels>(p.expand_bias, true, 1, 0, 1, kLaneGroups, w.e0, p.E, expand_bias);
  __syncthreads();

  HaloInput<T, kProduct> input;
  auto stage = [&](int turn) { return shared + turn % 2 * kStageBytes; };
  auto copy = [&](int turn, int step) {
    if (step == 0) input.find(p, w, places, turn / steps * kHaloRows);
    input.copy(p, step, stage(turn));
    copy_weight<T, kHaloRows>(p.expand, w.e0, step, stage(turn) + kHaloRows * kRowBytes);
  };
  TileSums<T, kProduct, kHaloRows> sums;
  sums.clear_all();
  copy(0, 0);
  int step = 0, first = 0;
  PYOPS_NO_UNROLL
  for (int turn = 0; turn < turns; ++turn) {
    ptx::cp_async_wait<0>();
    input.round(stage(turn));
    __syncthreads();  // this turn's operands have come, and the turn's before have been multiplied
    const bool last = step + 1 == steps;
    if (turn + 1 < turns) copy(turn + 1, last ? 0 : step + 1);
    const bool mine = first + static_cast<int>(threadIdx.x) / (2 * kWarpSize) * 32 < w.rows;  // the same for the whole warp
    if (mine) sums.multiply(stage(turn), stage(turn) + kHaloRows * kRowBytes, last);
    if (++step < steps) continue;
    if (mine) {
      store_expanded<T, kProduct>(p, w, first, places, expand_bias, sums, expanded);
      sums.clear_all();
    }
    step = 0, first += kHaloRows;
  }
  __syncthreads();

  Place me{};
  me.group = static_cast<int>(threadIdx.x) % kLaneGroups, me.lane = static_cast<int>(threadIdx.x) / kLaneGroups;
  me.channel = w.e0 + me.group * kLaneChannels, me.active = me.channel < p.E;
  Sum sum[kLaneChannels];
  convolve_tile<T, K, S>(p, w, me, expanded, filter, bias, sum);
  if (!p.sums) return;
  Cut cut{};
  cut.groups = kLaneGroups, cut.lanes = kExpandLanes;
  float total[1][kLaneChannels];
  PYOPS_UNROLL
  for (int v = 0; v < kLaneChannels; ++v) total[0][v] = sum[v].total;
  float* const out = p.sums + (static_cast<int64_t>(w.n) * p.tiles + w.tile) * p.E;
  sum_lanes<kLaneChannels, 1>(total, me, cut, p.E, 1, reinterpret_cast<float*>(shared), out, 0, p.divisor);
}

// ------------------------------------------------------------------------------------------------------------- the tile

constexpr int kMostShared = 100 * 1024;
constexpr int kResident = 2;  // blocks an SM holds: of registers and, on an H100, of shared memory

struct Plan {
  int tile_h, tile_w, halo_h, halo_w, tiles_x, tiles, slices;
  WeightPlan weight;
  size_t sum_bytes;
};

// What a tile costs in cycles of the machine, up to a factor: the busiest SM's work, and what blocks wait for that come one after another.
double cycles_of(const ExpandDepthwise& p, int tile_h, int tile_w, int halo_h, int halo_w, int sms) {
  constexpr double kStart = 3000;  // of a block: launch, table, filters, the first operands' way from memory
  constexpr double kTurn = 300;    // of a step: a barrier, and what of the operands' way the step before does not hide
  const double element = p.dtype == DType::f32 ? 4 : 2, step = 64 / element;
  const double rows = round_up(std::min<int64_t>(halo_h, p.H) * std::min<int64_t>(halo_w, p.W), int64_t{32});
  const double steps = std::ceil(static_cast<double>(p.C) / step), turns = steps * std::ceil(rows / kHaloRows);
  const double product = rows * steps * step * kTileO / (element == 4 ? 256 : 512);  // half of the tensor cores' rate
  const double strips = round_up(tile_h * ceil_div(tile_w, kStrip), kExpandLanes);   // threads without one wait for those with
  const double depthwise = strips * kStrip * (0.7 * p.K * p.K + 8) * element / 2, activations = rows * 8;
  const double blocks =
      static_cast<double>(p.N) * ceil_div(p.OH, int64_t{tile_h}) * ceil_div(p.OW, int64_t{tile_w}) * ceil_div(p.E, int64_t{kTileO});
  return std::ceil(blocks / sms) * (product + activations + depthwise) + std::ceil(blocks / (sms * kResident)) * (kStart + kTurn * turns);
}

Plan plan_of(const ExpandDepthwise& p) {
  constexpr int64_t kMost = 1 << 30;
  if ((p.K != 3 && p.K != 5 && p.K != 7) || (p.stride != 1 && p.stride != 2))
    throw std::runtime_error("expand_depthwise on a GPU: kernels of 3, 5 or 7, strides of 1 or 2");
  if (p.N > kMost || p.C > kMost || p.E > kMost || p.H > kMost || p.W > kMost || p.H * p.W > kMost)
    throw std::runtime_error("expand_depthwise on a GPU: up to 2^30 positions of an image, channels or images");
  const DeviceLimits limits = device_limits();
  const int element = p.dtype == DType::f32 ? 4 : 2, most = std::min(kMostShared, limits.shared_bytes);
  Plan plan{};
  double least = 0;
  for (int64_t height : {p.OH, int64_t{28}, int64_t{16}, int64_t{14}, int64_t{8}, int64_t{7}, int64_t{4}, int64_t{2}, int64_t{1}}) {
    for (int64_t width : {p.OW, int64_t{28}, int64_t{16}, int64_t{14}, int64_t{8}, int64_t{4}}) {
      if (height > p.OH || width > p.OW || height * width > 1024) continue;
      const int h = static_cast<int>(height), w = static_cast<int>(width);
      const int halo_h = (h - 1) * p.stride + p.K, halo_w = (w - 1) * p.stride + p.K;
      const int shared = ExpandShared(halo_h, halo_w, w, p.K, p.stride, element).bytes();
      if (shared > most) continue;
      const double cycles = cycles_of(p, h, w, halo_h, halo_w, limits.sm_count);
      if (plan.tile_h && cycles >= least) continue;
      least = cycles;
      plan.tile_h = h, plan.tile_w = w, plan.halo_h = halo_h, plan.halo_w = halo_w;
    }
  }
  const int64_t tiles_x = ceil_div(p.OW, int64_t{plan.tile_w}), tiles = tiles_x * ceil_div(p.OH, int64_t{plan.tile_h});
  const int64_t slices = ceil_div(p.E, int64_t{kTileO});
  if (p.N * tiles > INT32_MAX / slices) throw std::runtime_error("expand_depthwise: too much for one launch");
  plan.tiles_x = static_cast<int>(tiles_x), plan.tiles = static_cast<int>(tiles), plan.slices = static_cast<int>(slices);
  plan.weight = plan_weight(p.expand_weight, p.expand_weight_dtype, p.dtype, p.E, p.C);
  plan.sum_bytes = p.means && tiles > 1 ? sizeof(float) * static_cast<size_t>(p.N * tiles * p.E) : 0;
  return plan;
}

ExpandDepthwiseParams params_of(const ExpandDepthwise& p, const Plan& plan) {
  const int element = p.dtype == DType::f32 ? 4 : 2;
  ExpandDepthwiseParams params{};
  params.input = p.input, params.depthwise_weight = p.depthwise_weight;
  params.expand_bias = p.expand_bias, params.depthwise_bias = p.depthwise_bias, params.output = p.output;
  params.H = static_cast<int>(p.H), params.W = static_cast<int>(p.W), params.OH = static_cast<int>(p.OH),
  params.OW = static_cast<int>(p.OW);
  params.C = static_cast<int>(p.C), params.E = static_cast<int>(p.E);
  params.expand = {p.expand_weight, params.E, plan.weight.pitch};
  params.tile_h = plan.tile_h, params.tile_w = plan.tile_w, params.halo_h = plan.halo_h, params.halo_w = plan.halo_w;
  params.tiles_x = plan.tiles_x, params.tiles = plan.tiles, params.slices = plan.slices;
  params.activation = p.activation, params.slope = p.slope;
  params.depthwise_is_float = p.depthwise_weight_dtype == DType::f32;
  params.input_stride = p.input_stride;
  params.input_vectors = p.input_stride % (16 / element) == 0 && vectors_fit(p.C, 16 / element, element, {p.input});
  params.output_vectors = vectors_fit(p.E, kLaneChannels, element, {p.output});
  return params;
}

bool nothing(const ExpandDepthwise& p) { return p.N == 0 || p.E == 0; }

template <class T, Product kProduct, int K>
void launch_stride(const ExpandDepthwise& p, const LaunchShape& shape, const ExpandDepthwiseParams& params, cudaStream_t stream) {
  if (p.stride == 1) launch("expand_depthwise", expand_depthwise<T, kProduct, K, 1>, shape, stream, params);
  else launch("expand_depthwise", expand_depthwise<T, kProduct, K, 2>, shape, stream, params);
}

}  // namespace

size_t expand_depthwise_workspace(const ExpandDepthwise& p) {
  if (nothing(p)) return 0;
  const Plan plan = plan_of(p);
  return plan.weight.packed_bytes + plan.sum_bytes;
}

void expand_depthwise_run(const ExpandDepthwise& p, void* workspace, cudaStream_t stream) {
  if (nothing(p)) return;
  const Plan plan = plan_of(p);
  ExpandDepthwiseParams params = params_of(p, plan);
  if (plan.weight.packs) {
    pack_weight(plan.weight, p.expand_weight, p.expand_weight_dtype, p.dtype, workspace, p.E, p.C, stream);
    params.expand.weight = workspace;
  }
  const float positions = static_cast<float>(p.OH * p.OW);
  params.sums = plan.sum_bytes ? reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.weight.packed_bytes) : p.means;
  params.divisor = plan.sum_bytes ? 1.f : positions;
  const int shared = ExpandShared(plan.halo_h, plan.halo_w, plan.tile_w, p.K, p.stride, p.dtype == DType::f32 ? 4 : 2).bytes();
  const LaunchShape shape{dim3(static_cast<unsigned>(p.N * plan.tiles * plan.slices)), kExpandThreads, static_cast<size_t>(shared)};
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr Product kProduct = is_16bit<T> ? Product::mma : Product::tf32;
    if (p.K == 3) launch_stride<T, kProduct, 3>(p, shape, params, stream);
    else if (p.K == 5) launch_stride<T, kProduct, 5>(p, shape, params, stream);
    else launch_stride<T, kProduct, 7>(p, shape, params, stream);
  });
  if (plan.sum_bytes) merge_means(params.sums, p.means, p.N, p.E, plan.tiles, positions, stream);
}

ExpandDepthwiseTile expand_depthwise_tile(const ExpandDepthwise& p) {
  const Plan plan = plan_of(p);
  int64_t rows = 0;
  for (int64_t y0 = 0; y0 < p.OH; y0 += plan.tile_h)
    for (int64_t x0 = 0; x0 < p.OW; x0 += plan.tile_w) {
      const int64_t y = y0 * p.stride - p.K / 2, x = x0 * p.stride - p.K / 2;
      rows += (std::min(y + plan.halo_h, p.H) - std::max<int64_t>(y, 0)) * (std::min(x + plan.halo_w, p.W) - std::max<int64_t>(x, 0));
    }
  return {plan.tile_h, plan.tile_w, static_cast<double>(rows) / static_cast<double>(p.H * p.W)};
}

#define PYOPS_EXPAND_KERNELS(T, product)                                                                            \
  PYOPS_KERNEL_INFO(expand_depthwise, T, product, 3, 1), PYOPS_KERNEL_INFO(expand_depthwise, T, product, 3, 2),     \
      PYOPS_KERNEL_INFO(expand_depthwise, T, product, 5, 1), PYOPS_KERNEL_INFO(expand_depthwise, T, product, 5, 2), \
      PYOPS_KERNEL_INFO(expand_depthwise, T, product, 7, 1), PYOPS_KERNEL_INFO(expand_depthwise, T, product, 7, 2)

static const KernelRegistration registration({
    PYOPS_EXPAND_KERNELS(float, Product::tf32),
    PYOPS_EXPAND_KERNELS(bf16, Product::mma),
    PYOPS_EXPAND_KERNELS(f16, Product::mma),
});

}  // namespace pyops::conv
