// The gradient of a dense convolution's filter: a matrix product summed over positions, in parts that a second kernel adds.
//
//   grad [M, O], patches [M, K], M = N*OH*OW positions, K = KH*KW*C/groups  ->  grad_weight [O, K] = grad^T patches      per group
//   stored as [O, C/groups, KH, KW]
//
// A block computes 64 output channels x 128 columns of K over a run of positions, which pass through shared memory in steps of 32 (16 of
// float), four stages by cp.async as they lie in memory: rows are positions. A thread's columns, and so their tap and channels, are the
// same in every step; only its positions move, by additions. The operands of a product over positions are both transposed:
// ldmatrix.trans hands 16-bit fragments over so; float is read along the rows anyhow (FMA: a thread's 4 x 8 sums; tf32: word by word,
// rows 8 banks apart). Where channels do not come in whole pieces of 16 bytes they are gathered element by element, through registers.
// The positions are split over as many blocks as fill the GPU; the partial sums [splits, O, K] are floats, added in order: no atomics, the
// same bits each time.
//
// Floors: grad and input read once (from L2 for each further tile), grad_weight written once; 2*M*O*K flops.
#include "../common/cuda_registry.h"
#include "dense_conv.cuh"
#include "dense_cuda.h"
#include "dense_pack.cuh"

namespace pyops::conv {
namespace {

constexpr int kWgradO = 64, kWgradK = 128, kWgradThreads = 256, kSumThreads = 256;
constexpr int kBlocksPerSm = 2;
constexpr int kLeastRun = 256;  // positions: shorter runs cost more in partial sums than they gain

template <class T>
constexpr int kDeep = is_16bit<T> ? 32 : 16;  // positions of a step
template <class T, int kColumns>
constexpr int kPitch = kColumns * static_cast<int>(sizeof(T)) + (is_16bit<T> ? 16 : 32);  // 8 rows begin in 8 different groups of banks
template <class T>
constexpr int kWgradStageBytes = kDeep<T> * (kPitch<T, kWgradO> + kPitch<T, kWgradK>);

struct WgradParams {
  const void *grad, *input;
  float* partials;  // [splits, groups * O, K]
  int64_t grad_stride, input_stride;
  int M, run;  // positions: all, of a split
  int H, W, OH, OW, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int C, O, K, groups;  // C, O: of a group
  int o_tiles, k_tiles;
};

// An output position as image, row, column, moved on by additions.
struct Place {
  int n, y, x;

  PYOPS_DEVICE static Place at(int m, const WgradParams& p) { return {m / (p.OH * p.OW), m / p.OW % p.OH, m % p.OW}; }
  PYOPS_DEVICE void advance(const Place& step, const WgradParams& p) {
    n += step.n, y += step.y, x += step.x;
    if (x >= p.OW) x -= p.OW, ++y;
    if (y >= p.OH) y -= p.OH, ++n;
  }
};

// A thread's piece of kColumns columns in R rows of a step.
template <class T, int kColumns>
struct Share {
  static constexpr int V = kPiece<T>, kPieces = kColumns / V, kApart = kWgradThreads / kPieces, R = kDeep<T> / kApart;
  static_assert(R * kApart == kDeep<T>, "the block's threads share a step");
  PYOPS_DEVICE static int column() { return static_cast<int>(threadIdx.x) % kPieces * V; }
  PYOPS_DEVICE static int row() { return static_cast<int>(threadIdx.x) / kPieces; }
  PYOPS_DEVICE static unsigned char* place(unsigned char* tile, int r) {
    return tile + (row() + r * kApart) * kPitch<T, kColumns> + column() * static_cast<int>(sizeof(T));
  }
};

// Both operands of a step: load() takes the steps of the run one after another.
template <class T, bool kVectors>
struct WgradOperands {
  using Grad = Share<T, kWgradO>;
  using Input = Share<T, kWgradK>;
  int m, end;  // the position of the thread's next row of input
  int o, channels;
  int k, channel_end;  // of the group's input
  TapCursor tap;       // of column k
  Place place, step;
  uint4 grad_raw[Grad::R], input_raw[Input::R];

  PYOPS_DEVICE WgradOperands(const WgradParams& p, int group, int o0, int k0, int begin, int end_) {
    end = end_, m = begin + Input::row();
    place = Place::at(m, p), step = Place::at(Input::kApart, p);
    o = group * p.O + o0 + Grad::column(), channels = p.O - o0 - Grad::column();
    k = k0 + Input::column(), tap = TapCursor::at(k, p.C, p.KW);
    tap.c += group * p.C, channel_end = (group + 1) * p.C;
  }

  // Where tap `at` of the position at hand is read; null outside the image.
  PYOPS_DEVICE const T* source(const WgradParams& p, const TapCursor& at) const {
    const int y = place.y * p.stride_h - p.pad_h + at.jy * p.dilation_h, x = place.x * p.stride_w - p.pad_w + at.jx * p.dilation_w;
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(p.H) || static_cast<unsigned>(x) >= static_cast<unsigned>(p.W)) return nullptr;
    return static_cast<const T*>(p.input) + static_cast<int64_t>((place.n * p.H + y) * p.W + x) * p.input_stride + at.c;
  }

  PYOPS_DEVICE void load(const WgradParams& p, unsigned char* grad_tile, unsigned char* input_tile) {
    int g = m - Input::row() + Grad::row();
    PYOPS_UNROLL
    for (int r = 0; r < Grad::R; ++r, g += Grad::kApart) {
      const bool exists = g < end && channels > 0;
      const T* const from = static_cast<const T*>(p.grad) + (exists ? g * p.grad_stride + o : 0);
      if constexpr (kVectors) ptx::cp_async_16_or_zero(Grad::place(grad_tile, r), from, exists);
      else {
        Piece<T> value;
        value.raw = uint4{0, 0, 0, 0};
        PYOPS_UNROLL
        for (int v = 0; v < kPiece<T>; ++v)
          if (exists && v < channels) value.element[v] = from[v];
        grad_raw[r] = value.raw;
      }
    }
    PYOPS_UNROLL
    for (int r = 0; r < Input::R; ++r) {
      if constexpr (kVectors) {
        const T* const from = m < end && k < p.K ? source(p, tap) : nullptr;
        ptx::cp_async_16_or_zero(Input::place(input_tile, r), from ? from : p.input, from != nullptr);
      } else {
        Piece<T> value;
        value.raw = uint4{0, 0, 0, 0};
        TapCursor at = tap;
        PYOPS_UNROLL
        for (int v = 0; v < kPiece<T>; ++v) {
          const T* const from = m < end && k + v < p.K ? source(p, at) : nullptr;
          if (from) value.element[v] = *from;
          if (++at.c == channel_end) at.c -= p.C, ++at.jx;
          if (at.jx == p.KW) at.jx = 0, ++at.jy;
        }
        input_raw[r] = value.raw;
      }
      m += Input::kApart, place.advance(step, p);
    }
  }

  PYOPS_DEVICE void store(unsigned char* grad_tile, unsigned char* input_tile) const {
    PYOPS_UNROLL
    for (int r = 0; r < Grad::R; ++r) *reinterpret_cast<uint4*>(Grad::place(grad_tile, r)) = grad_raw[r];
    PYOPS_UNROLL
    for (int r = 0; r < Input::R; ++r) *reinterpret_cast<uint4*>(Input::place(input_tile, r)) = input_raw[r];
  }
};

// The block's sums: a warp has 32 output channels x 32 columns, in tiles of 16 x 8.
template <class T, Product kProduct>
struct WgradSums {
  float sum[2][4][4];

  PYOPS_DEVICE void clear_all() {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
  PYOPS_DEVICE static int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  PYOPS_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  PYOPS_DEVICE void multiply(const unsigned char* grad, const unsigned char* input, bool) {
    constexpr int kGrad = kPitch<T, kWgradO>, kInput = kPitch<T, kWgradK>, kSize = sizeof(T);
    grad += warp() % 2 * 32 * kSize, input += warp() / 2 * 32 * kSize;
    PYOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4], b[4][2];
      if constexpr (kProduct == Product::mma) {
        const int row = half * 16 + lane() % 8, upper = lane() / 16, odd = lane() / 8 % 2;
        PYOPS_UNROLL
        for (int i = 0; i < 2; ++i) {
          uint32_t pair[4];
          ptx::ldmatrix_x4_trans(a[i], grad + (row + upper * 8) * kGrad + (i * 16 + odd * 8) * kSize);
          ptx::ldmatrix_x4_trans(pair, input + (row + odd * 8) * kInput + (i * 16 + upper * 8) * kSize);
          b[2 * i][0] = pair[0], b[2 * i][1] = pair[1], b[2 * i + 1][0] = pair[2], b[2 * i + 1][1] = pair[3];
        }
      } else {
        auto word = [](const unsigned char* at) { return ptx::float_to_tf32(*reinterpret_cast<const float*>(at)); };
        const int row = half * 8 + lane() % 4, column = lane() / 4;
        PYOPS_UNROLL
        for (int i = 0; i < 8; ++i)
          a[i / 4][i % 4] = word(grad + (row + i % 4 / 2 * 4) * kGrad + (i / 4 * 16 + i % 2 * 8 + column) * kSize);
        PYOPS_UNROLL
        for (int i = 0; i < 8; ++i) b[i / 2][i % 2] = word(input + (row + i % 2 * 4) * kInput + (i / 2 * 8 + column) * kSize);
      }
      PYOPS_UNROLL
      for (int i = 0; i < 8; ++i) {
        const uint32_t (&left)[4] = a[i / 4];
        if constexpr (kProduct == Product::tf32)
          ptx::mma_m16n8k8_tf32(sum[i / 4][i % 4], left[0], left[1], left[2], left[3], b[i % 4][0], b[i % 4][1]);
        else ptx::mma_m16n8k16(T{}, sum[i / 4][i % 4], left[0], left[1], left[2], left[3], b[i % 4][0], b[i % 4][1]);
      }
    }
  }

  // f(output channel, column, sum) of each.
  template <class F>
  PYOPS_DEVICE void each(F&& f) const {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i)
      f(warp() % 2 * 32 + i / 16 * 16 + i / 2 % 2 * 8 + lane() / 4, warp() / 2 * 32 + i / 4 % 4 * 8 + lane() % 4 * 2 + i % 2,
        sum[i / 16][i / 4 % 4][i % 4]);
  }
};

// A thread has 4 neighbouring output channels x twice 4 neighbouring columns; slices of kSlice products as in TileSums.
template <>
struct WgradSums<float, Product::fma> {
  float sum[4][8], slice[4][8];

  PYOPS_DEVICE void clear_all() {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) sum[i / 8][i % 8] = 0.f, slice[i / 8][i % 8] = 0.f;
  }
  PYOPS_DEVICE static int x() { return static_cast<int>(threadIdx.x) % 16; }
  PYOPS_DEVICE static int y() { return static_cast<int>(threadIdx.x) / 16; }

  PYOPS_DEVICE void multiply(const unsigned char* grad, const unsigned char* input, bool last_of_slice) {
    PYOPS_UNROLL
    for (int row = 0; row < kDeep<float>; ++row) {
      float g[4], a[8];
      load_channels<float, 4>(reinterpret_cast<const float*>(grad + row * kPitch<float, kWgradO>) + 4 * y(), g);
      const float* const from = reinterpret_cast<const float*>(input + row * kPitch<float, kWgradK>) + 4 * x();
      PYOPS_UNROLL
      for (int j = 0; j < 8; j += 4) {
        const float4 part = *reinterpret_cast<const float4*>(from + j / 4 * 64);
        a[j] = part.x, a[j + 1] = part.y, a[j + 2] = part.z, a[j + 3] = part.w;
      }
      PYOPS_UNROLL
      for (int i = 0; i < 32; ++i) slice[i / 8][i % 8] = fmaf(g[i / 8], a[i % 8], slice[i / 8][i % 8]);
    }
    if (last_of_slice) {
      PYOPS_UNROLL
      for (int i = 0; i < 32; ++i) sum[i / 8][i % 8] += slice[i / 8][i % 8], slice[i / 8][i % 8] = 0.f;
    }
  }

  template <class F>
  PYOPS_DEVICE void each(F&& f) const {
    PYOPS_UNROLL
    for (int i = 0; i < 32; ++i) f(4 * y() + i / 8, i / 4 % 2 * 64 + 4 * x() + i % 4, sum[i / 8][i % 8]);
  }
};

template <class T, Product kProduct, bool kVectors>
PYOPS_KERNEL(kWgradThreads)
dense_wgrad_tile(WgradParams p) {
  unsigned char* const shared = dynamic_shared();
  auto grad_tile = [&](int step) { return shared + step % kDenseStages * kWgradStageBytes<T>; };
  auto input_tile = [&](int step) { return grad_tile(step) + kDeep<T> * kPitch<T, kWgradO>; };
  int block = static_cast<int>(blockIdx.x);
  const int k0 = block % p.k_tiles * kWgradK;
  block /= p.k_tiles;
  const int o0 = block % p.o_tiles * kWgradO;
  block /= p.o_tiles;
  const int group = block % p.groups, split = block / p.groups;
  const int begin = split * p.run, left = p.M - begin, count = left < p.run ? left : p.run, steps = ceil_div(count, kDeep<T>);

  WgradOperands<T, kVectors> operands(p, group, o0, k0, begin, begin + count);
  WgradSums<T, kProduct> sums;
  sums.clear_all();
  auto begin_load = [&](int step) {
    if (step < steps) operands.load(p, grad_tile(step), input_tile(step));
    ptx::cp_async_commit();  // also of nothing: the wait counts steps
  };
  auto finish_load = [&](int step) {
    if (!kVectors && step < steps) operands.store(grad_tile(step), input_tile(step));
  };
  PYOPS_NO_UNROLL
  for (int step = 0; step < kDenseStages - 1; ++step) begin_load(step), finish_load(step);
  PYOPS_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kDenseStages - 2>();
    __syncthreads();  // this step has come, and the one before has been multiplied
    begin_load(step + kDenseStages - 1);
    const bool slice_ends = step + 1 == steps || step % (kSlice / kDeep<T>) == kSlice / kDeep<T> - 1;
    sums.multiply(grad_tile(step), input_tile(step), slice_ends);
    finish_load(step + kDenseStages - 1);
  }
  float* const to = p.partials + (static_cast<int64_t>(split) * p.groups + group) * p.O * p.K;
  sums.each([&](int o, int k, float sum) {
    if (o0 + o < p.O && k0 + k < p.K) to[static_cast<int64_t>(o0 + o) * p.K + k0 + k] = sum;
  });
}

struct SumParams {
  const float* partials;  // [splits, O, taps * C]
  void* grad_weight;      // [O, C, taps]
  int64_t count;          // O * taps * C
  int splits, C, taps;
};

// A thread adds an element's parts in order.
template <class T>
PYOPS_KERNEL(kSumThreads)
dense_wgrad_sum(SumParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= p.count) return;
  Sum sum;
  for (int split = 0; split < p.splits; ++split) sum.add(p.partials[split * p.count + i]);
  const int64_t K = static_cast<int64_t>(p.C) * p.taps, k = i % K;
  static_cast<T*>(p.grad_weight)[i - k + k % p.C * p.taps + k / p.C] = from_float<T>(sum.total);
}

struct WgradPlan {
  int64_t M, K, o_tiles, k_tiles, run, splits;
  size_t bytes;
};

WgradPlan plan_of(const DenseGradient& p) {
  check_counts(p.s);
  check_extent(p.s.H, p.s.KH, p.s.stride_h, p.s.pad_h, p.s.dilation_h);
  check_extent(p.s.W, p.s.KW, p.s.stride_w, p.s.pad_w, p.s.dilation_w);
  WgradPlan plan{};
  plan.M = p.s.N * p.s.OH * p.s.OW, plan.K = p.s.C / p.s.groups * p.s.KH * p.s.KW;
  plan.o_tiles = ceil_div(p.s.O / p.s.groups, int64_t{kWgradO}), plan.k_tiles = ceil_div(plan.K, int64_t{kWgradK});
  const int64_t tiles = plan.o_tiles * plan.k_tiles * p.s.groups,
                wanted = ceil_div(int64_t{kBlocksPerSm} * device_limits().sm_count, tiles);
  const int64_t each = ceil_div(plan.M, wanted);
  plan.run = round_up(each < kLeastRun ? int64_t{kLeastRun} : each, int64_t{kDeep<bf16>}), plan.splits = ceil_div(plan.M, plan.run);
  if (tiles * plan.splits > INT32_MAX) throw std::runtime_error("gradient of a dense convolution's filter: too much for one launch");
  plan.bytes = sizeof(float) * static_cast<size_t>(plan.splits * p.s.O * plan.K);
  return plan;
}

template <class T, Product kProduct>
void launch_tiles(const WgradPlan& plan, bool vectors, const WgradParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.splits * params.groups * plan.o_tiles * plan.k_tiles));
  const LaunchShape shape{grid, kWgradThreads, kDenseStages * kWgradStageBytes<T>};
  if (vectors) launch("dense_wgrad_tile", dense_wgrad_tile<T, kProduct, true>, shape, stream, params);
  else launch("dense_wgrad_tile", dense_wgrad_tile<T, kProduct, false>, shape, stream, params);
}

WgradParams params_of(const DenseGradient& p, const WgradPlan& plan, void* workspace) {
  const DenseShape& s = p.s;
  WgradParams params{};
  params.grad = p.grad, params.input = p.input, params.partials = static_cast<float*>(workspace);
  params.grad_stride = p.grad_stride, params.input_stride = p.input_stride;
  params.M = static_cast<int>(plan.M), params.run = static_cast<int>(plan.run);
  params.H = static_cast<int>(s.H), params.W = static_cast<int>(s.W), params.OH = static_cast<int>(s.OH),
  params.OW = static_cast<int>(s.OW);
  params.KW = s.KW, params.stride_h = s.stride_h, params.stride_w = s.stride_w, params.pad_h = s.pad_h, params.pad_w = s.pad_w;
  params.dilation_h = s.dilation_h, params.dilation_w = s.dilation_w;
  params.C = static_cast<int>(s.C / s.groups), params.O = static_cast<int>(s.O / s.groups), params.K = static_cast<int>(plan.K);
  params.groups = s.groups, params.o_tiles = static_cast<int>(plan.o_tiles), params.k_tiles = static_cast<int>(plan.k_tiles);
  return params;
}

}  // namespace

size_t dense_wgrad_workspace(const DenseGradient& p) { return p.s.N * p.s.OH * p.s.OW * p.s.O == 0 ? 0 : plan_of(p).bytes; }

void dense_wgrad(const DenseGradient& p, void* workspace, cudaStream_t stream) {
  const int64_t count = p.s.O * (p.s.C / p.s.groups) * p.s.KH * p.s.KW;
  if (p.s.N * p.s.OH * p.s.OW == 0 || count == 0) {
    if (count) zero_async(p.grad_weight, static_cast<size_t>(count * element_size(p.dtype)), stream);
    return;
  }
  const WgradPlan plan = plan_of(p);
  const WgradParams params = params_of(p, plan, workspace);
  const int64_t piece = 16 / element_size(p.dtype);
  const bool vectors = params.C % piece == 0 && params.O % piece == 0 && p.input_stride % piece == 0 && p.grad_stride % piece == 0 &&
                       reinterpret_cast<uintptr_t>(p.input) % 16 == 0 && reinterpret_cast<uintptr_t>(p.grad) % 16 == 0;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (is_16bit<T>) launch_tiles<T, Product::mma>(plan, vectors, params, stream);
    else if (p.tf32) launch_tiles<T, Product::tf32>(plan, vectors, params, stream);
    else launch_tiles<T, Product::fma>(plan, vectors, params, stream);
    const SumParams sum{params.partials, p.grad_weight, count, static_cast<int>(plan.splits), params.C, p.s.KH * p.s.KW};
    const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(count, int64_t{kSumThreads}))), kSumThreads, 0};
    launch("dense_wgrad_sum", dense_wgrad_sum<T>, shape, stream, sum);
  });
}

#define PYOPS_WGRAD_KERNELS(T, product) \
  PYOPS_KERNEL_INFO(dense_wgrad_tile, T, product, true), PYOPS_KERNEL_INFO(dense_wgrad_tile, T, product, false)

static const KernelRegistration registration({
    PYOPS_WGRAD_KERNELS(float, Product::tf32),
    PYOPS_WGRAD_KERNELS(float, Product::fma),
    PYOPS_WGRAD_KERNELS(bf16, Product::mma),
    PYOPS_WGRAD_KERNELS(f16, Product::mma),
    PYOPS_KERNEL_INFO(dense_wgrad_sum, float),
    PYOPS_KERNEL_INFO(dense_wgrad_sum, bf16),
    PYOPS_KERNEL_INFO(dense_wgrad_sum, f16),
});

}  // namespace pyops::conv
