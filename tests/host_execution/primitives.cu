// Small kernels that show what each wrapper of csrc/common does; their results are compared with plain numpy.
#include "../../csrc/common/convert.cuh"
#include "../../csrc/common/launch.cuh"

using namespace pyops;

namespace {

struct MatmulParams {
  const uint16_t *a, *b;  // [16, 16] and [16 (k), 8], both row-major
  float* c;               // [16, 8]
  int by_ldmatrix;
};

// One warp: C = A B. Operands by ldmatrix (B through .trans), or element by element as the ISA's figures give them.
template <class T>
PYOPS_KERNEL(32)
matmul_16x8x16(MatmulParams p) {
  auto* const a = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* const b = a + 256;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) a[i] = p.a[i];
  for (int i = lane; i < 128; i += 32) b[i] = p.b[i];
  __syncthreads();
  uint32_t ra[4], rb[4];
  if (p.by_ldmatrix) {
    ptx::ldmatrix_x4(ra, a + (lane % 16) * 16 + lane / 16 * 8);
    ptx::ldmatrix_x4_trans(rb, b + (lane % 16) * 8);
  } else {
    auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
    for (int i = 0; i < 4; ++i) {
      const uint16_t* from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      ra[i] = pair(from[0], from[1]);
    }
    for (int i = 0; i < 2; ++i) rb[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  }
  float c[4] = {};
  ptx::mma_m16n8k16(T{}, c, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

struct MatmulTf32Params {
  const float *a, *b;  // [16, 8] and [8 (k), 8], both row-major
  float* c;            // [16, 8]
};

PYOPS_KERNEL(32) matmul_16x8x8_tf32(MatmulTf32Params p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = ptx::float_to_tf32(p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = ptx::float_to_tf32(p.b[(t + 4 * i) * 8 + g]);
  float c[4] = {};
  ptx::mma_m16n8k8_tf32(c, a[0], a[1], a[2], a[3], b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

struct ReverseParams {
  const float* input;  // [4 * threads]
  float* output;
  int wait;  // 0: a fault, the copies are read before they land
};

// Every thread copies 16 bytes asynchronously, then reads its mirror thread's.
PYOPS_KERNEL(64) reverse_by_async_copy(ReverseParams p) {
  auto* const shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = threadIdx.x, mirror = blockDim.x - 1 - i;
  ptx::cp_async_16(shared + 4 * i, p.input + 4 * i);
  ptx::cp_async_commit();
  if (p.wait) ptx::cp_async_wait<0>();
  __syncthreads();
  for (int e = 0; e < 4; ++e) p.output[4 * i + e] = shared[4 * mirror + 3 - e];
  if (!p.wait) {
    __syncthreads();
    ptx::cp_async_wait<0>();
  }
}

struct CopyParams {
  const float* input;  // [present * 4]
  float* output;       // [64 * 4]: zeros behind what is present
  int present;
};

PYOPS_KERNEL(64) copy_or_zero(CopyParams p) {
  auto* const shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = threadIdx.x;
  ptx::cp_async_16_or_zero(shared + 4 * i, i < p.present ? p.input + 4 * i : p.input, i < p.present);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int e = 0; e < 4; ++e) p.output[4 * i + e] = shared[4 * i + e];
}

struct WarpParams {
  const int* input;  // [32]
  int* output;       // [10][32]: a row per operation
};

// Every warp-wide operation and atomic once; `output` must start as zeros.
PYOPS_KERNEL(32) warp_operations(WarpParams p) {
  const int lane = threadIdx.x, mine = p.input[lane];
  const unsigned all = ~0u;
  p.output[lane] = __shfl_sync(all, mine, (lane + 5) % 32);
  p.output[32 + lane] = __shfl_xor_sync(all, mine, 3);
  p.output[64 + lane] = __shfl_up_sync(all, mine, 2);
  p.output[96 + lane] = __shfl_down_sync(all, mine, 7);
  p.output[128 + lane] = static_cast<int>(__ballot_sync(all, mine % 3 == 0));
  p.output[160 + lane] = 2 * __any_sync(all, mine == 4) + __all_sync(all, mine < 1000);
  p.output[192 + lane] = 2 * __any_sync(all, mine == -1) + __all_sync(all, mine != 4);
  atomicAdd(p.output + 224, mine);
  atomicMax(p.output + 256, mine);
  if (atomicCAS(p.output + 288, 0, mine + 1) == 0) p.output[289] = mine + 1;  // one lane alone gets in
}

struct IndexParams {
  int* output;  // [24][32]: of a grid of 2 x 3 x 4 blocks of 32 threads
};

PYOPS_KERNEL(32) write_indices(IndexParams p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  p.output[block * blockDim.x + threadIdx.x] = threadIdx.x + 1000 * (threadIdx.y + threadIdx.z) + 10000 * block;
}

struct UnwrittenParams {
  float* output;  // [32]
};

PYOPS_KERNEL(32) read_unwritten(UnwrittenParams p) {
  p.output[threadIdx.x] = reinterpret_cast<const float*>(dynamic_shared())[threadIdx.x];
}

struct DivergedParams {
  int kind;
};

// Faults that hang or misbehave on a GPU; here each must become an error.
PYOPS_KERNEL(64) diverged(DivergedParams p) {
  if (p.kind == 0 && threadIdx.x < 40) __syncthreads();  // not reached by all
  if (p.kind == 1 && threadIdx.x == 3) __syncwarp();     // one lane alone
  if (p.kind == 2) {
    if (threadIdx.x < 16) __syncwarp();  // one warp in two different operations
    else (void)__shfl_xor_sync(~0u, 1.f, 1);
  }
  if (p.kind == 3) {
    auto* const flag = reinterpret_cast<unsigned*>(dynamic_shared());
    if (threadIdx.x == 0) *flag = 0;
    __syncthreads();
    ptx::wait_at_least(flag, 1);  // a flag nobody raises
  }
  if (p.kind == 4) (void)__shfl_sync(0xffffu, 1.f, 0);  // half a warp
}

template <class Params>
int run(const char* name, void (*kernel)(Params), int threads, size_t shared_bytes, const Params& params, char* error, int error_bytes,
        dim3 grid = dim3(1)) {
  try {
    launch(name, kernel, LaunchShape{grid, threads, shared_bytes}, nullptr, params);
    return 0;
  } catch (const std::exception& e) {
    const std::string text = e.what();
    text.copy(error, static_cast<size_t>(error_bytes - 1));
    error[text.size() < static_cast<size_t>(error_bytes - 1) ? text.size() : static_cast<size_t>(error_bytes - 1)] = 0;
    return 1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int primitive_matmul(const uint16_t* a, const uint16_t* b, float* c, int is_bf16, int by_ldmatrix, char* error, int bytes) {
  const MatmulParams params{a, b, c, by_ldmatrix};
  return is_bf16 ? run("primitive_matmul", matmul_16x8x16<bf16>, 32, 768, params, error, bytes)
                 : run("primitive_matmul", matmul_16x8x16<f16>, 32, 768, params, error, bytes);
}
int primitive_reverse(const float* input, float* output, int wait, char* error, int bytes) {
  return run("primitive_reverse", reverse_by_async_copy, 64, 64 * 16, ReverseParams{input, output, wait}, error, bytes);
}
int primitive_copy_or_zero(const float* input, float* output, int present, char* error, int bytes) {
  return run("primitive_copy_or_zero", copy_or_zero, 64, 64 * 16, CopyParams{input, output, present}, error, bytes);
}
int primitive_matmul_tf32(const float* a, const float* b, float* c, char* error, int bytes) {
  return run("primitive_matmul_tf32", matmul_16x8x8_tf32, 32, 0, MatmulTf32Params{a, b, c}, error, bytes);
}
int primitive_warp(const int* input, int* output, char* error, int bytes) {
  return run("primitive_warp", warp_operations, 32, 0, WarpParams{input, output}, error, bytes);
}
int primitive_indices(int* output, char* error, int bytes) {
  return run("primitive_indices", write_indices, 32, 0, IndexParams{output}, error, bytes, dim3(2, 3, 4));
}
int primitive_unwritten(float* output, char* error, int bytes) {
  return run("primitive_unwritten", read_unwritten, 32, 128, UnwrittenParams{output}, error, bytes);
}
int primitive_diverged(int kind, char* error, int bytes) {
  return run("primitive_diverged", diverged, 64, 16, DivergedParams{kind}, error, bytes);
}
#if !defined(__CUDACC__)
void primitive_round(const float* input, uint16_t* to_bf16, uint16_t* to_f16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to_bf16[i] = ptx::float_to_bf16(input[i]), to_f16[i] = ptx::float_to_f16(input[i]);
}
void primitive_widen(const uint16_t* input, float* from_bf16, float* from_f16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_bf16[i] = to_float(bf16{input[i]}), from_f16[i] = to_float(f16{input[i]});
}
#endif

}  // extern "C"
#pragma GCC visibility pop
