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

struct SumParams {
  const float* input;  // [32]
  float* output;       // [2]: the sum by xor shuffles, and lane 5's value by a plain shuffle
};

PYOPS_KERNEL(32) warp_sum(SumParams p) {
  const float mine = p.input[threadIdx.x];
  float sum = mine;
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  const float fifth = __shfl_sync(~0u, mine, 5);
  if (threadIdx.x == 7) p.output[0] = sum, p.output[1] = fifth;
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
}

template <class Params>
int run(const char* name, void (*kernel)(Params), int threads, size_t shared_bytes, const Params& params, char* error, int error_bytes) {
  try {
    launch(name, kernel, LaunchShape{dim3(1), threads, shared_bytes}, nullptr, params);
    return 0;
  } catch (const std::exception& e) {
    const std::string text = e.what();
    text.copy(error, static_cast<size_t>(error_bytes - 1));
    error[text.size() < static_cast<size_t>(error_bytes - 1) ? text.size() : static_cast<size_t>(error_bytes - 1)] = 0;
    return 1;
  }
}

}  // namespace

extern "C" {

int primitive_matmul(const uint16_t* a, const uint16_t* b, float* c, int is_bf16, int by_ldmatrix, char* error, int bytes) {
  const MatmulParams params{a, b, c, by_ldmatrix};
  return is_bf16 ? run("matmul", matmul_16x8x16<bf16>, 32, 768, params, error, bytes)
                 : run("matmul", matmul_16x8x16<f16>, 32, 768, params, error, bytes);
}
int primitive_reverse(const float* input, float* output, int wait, char* error, int bytes) {
  return run("reverse", reverse_by_async_copy, 64, 64 * 16, ReverseParams{input, output, wait}, error, bytes);
}
int primitive_warp_sum(const float* input, float* output, char* error, int bytes) {
  return run("warp_sum", warp_sum, 32, 0, SumParams{input, output}, error, bytes);
}
int primitive_diverged(int kind, char* error, int bytes) { return run("diverged", diverged, 64, 16, DivergedParams{kind}, error, bytes); }
void primitive_round(const float* input, uint16_t* to_bf16, uint16_t* to_f16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to_bf16[i] = ptx::float_to_bf16(input[i]), to_f16[i] = ptx::float_to_f16(input[i]);
}
void primitive_widen(const uint16_t* input, float* from_bf16, float* from_f16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_bf16[i] = to_float(bf16{input[i]}), from_f16[i] = to_float(f16{input[i]});
}

}  // extern "C"
