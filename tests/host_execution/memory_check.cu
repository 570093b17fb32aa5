// Runs every kernel on odd shapes with buffers of exactly the right size: on the host for a build with
// -fsanitize=address,undefined, on a GPU for compute-sanitizer. Each case runs twice, on the host under two schedules; the
// results must be the same to the bit. Prints one line and returns 0, or fails.
//   memory_check [path cell dtype]     all, or one
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/common/launch.cuh"
#include "../../csrc/rnn/cell.cuh"
#include "../../csrc/rnn/scan.cuh"

using namespace pyops;
using namespace pyops::rnn;

namespace {

struct Shape {
  int T, B, H;
  bool reverse, lengths, optional;  // optional: the tensors that may be null are given
};

uint32_t random_state = 1;
float uniform() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / 8388608.f - 1.f;
}

#if defined(__CUDACC__)
void* allocate(size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMalloc(&p, bytes), "cudaMalloc");
  check_cuda(cudaMemset(p, 0xFF, bytes), "cudaMemset");
  return p;
}
void release(void* p) { (void)cudaFree(p); }
void copy(void* to, const void* from, size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "a kernel, or cudaMemcpy");
}
void prepare(uint64_t) {}
#else
void* allocate(size_t bytes) { return std::memset(std::malloc(bytes), 0xFF, bytes); }
void release(void* p) { std::free(p); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void prepare(uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 6;  // two batch slices of the first shape, one of two tiles of the second
}
#endif

// A value near `value` that T can hold; from_float is the kernels' and, under nvcc, not for host code.
template <class T>
T rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return T{static_cast<uint16_t>(bits >> 16)};
  } else {
    const uint32_t magnitude = bits & 0x7fffffffu;  // float16: below 2^-14 becomes zero
    const uint32_t half = magnitude < 0x38800000u ? 0 : (magnitude - 0x38000000u) >> 13;
    return T{static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
  }
}

class Buffers {  // an allocation each: the sanitizer guards both ends
 public:
  ~Buffers() {
    for (void* p : all_) release(p);
  }
  unsigned char* raw(size_t bytes) {  // poisoned with NaN
    all_.push_back(allocate(bytes ? bytes : 1));
    return static_cast<unsigned char*>(all_.back());
  }
  template <class T>
  T* given(const std::vector<T>& values) {
    auto* p = reinterpret_cast<T*>(raw(values.size() * sizeof(T)));
    copy(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  template <class T>
  T* filled(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) value = rounded<T>(0.3f * uniform());
    return given(values);
  }

 private:
  std::vector<void*> all_;
};

template <class T>
std::vector<unsigned char> run(Cell cell, DType dtype, Path path, const Shape& shape, uint64_t seed) {
  random_state = 7;
  prepare(seed);
  Buffers buffers;
  const int T_ = shape.T, B = shape.B, H = shape.H, G = gates(cell), S = saved(cell);
  const int64_t rows = static_cast<int64_t>(T_) * B, states = static_cast<int64_t>(B) * H;
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t bytes) {
    result.resize(result.size() + bytes);
    copy(result.data() + result.size() - bytes, data, bytes);
  };
  std::vector<int64_t> row_lengths(static_cast<size_t>(B));
  for (int b = 0; b < B; ++b) row_lengths[static_cast<size_t>(b)] = b % (T_ + 2);  // 0 .. T+1: the last is clamped
  const int64_t* lengths = shape.lengths ? buffers.given(row_lengths) : nullptr;
  auto workspace = [&](bool backward) { return buffers.raw(scan_workspace(cell, dtype, T_, B, H, backward, path)); };
  auto batch_first = [&](void* data, int64_t width) { return Rows{data, width, T_ * width}; };

  ScanForward f{};
  f.cell = cell, f.dtype = dtype, f.T = T_, f.B = B, f.H = H, f.reverse = shape.reverse, f.lengths = lengths;
  f.gates_x = batch_first(buffers.filled<T>(rows * G * H), G * H);
  f.h0 = shape.optional ? buffers.filled<T>(states) : nullptr;
  f.c0 = shape.optional && cell == Cell::lstm ? buffers.filled<T>(states) : nullptr;
  f.weight_hh = buffers.filled<T>(static_cast<int64_t>(G) * H * H);
  f.bias_hh = shape.optional ? buffers.filled<T>(static_cast<int64_t>(G) * H) : nullptr;
  f.output = Rows{buffers.raw(static_cast<size_t>(rows * H) * sizeof(T)), static_cast<int64_t>(B) * H, H};
  f.h_n = buffers.raw(static_cast<size_t>(states) * sizeof(T));
  f.c_n = cell == Cell::lstm ? buffers.raw(static_cast<size_t>(states) * sizeof(T)) : nullptr;
  f.reserve = S ? reinterpret_cast<float*>(buffers.raw(static_cast<size_t>(rows * S * H) * sizeof(float))) : nullptr;
  f.workspace = workspace(false);
  scan_forward(f, nullptr, path);
  keep(f.output.data, static_cast<size_t>(rows * H) * sizeof(T));
  keep(f.h_n, static_cast<size_t>(states) * sizeof(T));

  ScanBackward g{};
  g.cell = cell, g.dtype = dtype, g.T = T_, g.B = B, g.H = H, g.reverse = shape.reverse, g.lengths = lengths;
  g.grad_output = shape.optional ? batch_first(buffers.filled<T>(rows * H), H) : Rows{};
  g.grad_h_n = buffers.filled<T>(states);
  g.grad_c_n = shape.optional && cell == Cell::lstm ? buffers.filled<T>(states) : nullptr;
  g.output = f.output, g.h0 = f.h0, g.c0 = f.c0, g.weight_hh = f.weight_hh, g.reserve = f.reserve;
  g.grad_gates_x = batch_first(buffers.raw(static_cast<size_t>(rows * G * H) * sizeof(T)), G * H);
  g.grad_gates_h = cell == Cell::gru ? buffers.raw(static_cast<size_t>(rows * H) * sizeof(T)) : nullptr;
  g.grad_h0 = shape.optional ? buffers.raw(static_cast<size_t>(states) * sizeof(T)) : nullptr;
  g.grad_c0 = shape.optional && cell == Cell::lstm ? buffers.raw(static_cast<size_t>(states) * sizeof(T)) : nullptr;
  g.workspace = workspace(true);
  scan_backward(g, nullptr, path);
  keep(g.grad_gates_x.data, static_cast<size_t>(rows * G * H) * sizeof(T));
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  const Shape shapes[] = {{3, 5, 19, false, true, true}, {2, 9, 33, true, false, false}};
  int cases = 0;
  for (int path = 0; path < 3; ++path)
    for (int cell = 0; cell < 4; ++cell)  // the other activations of rnn are the same kernel
      for (int dtype : {0, 2, 3}) {
        if (argc == 4 && (std::atoi(argv[1]) != path || std::atoi(argv[2]) != cell || std::atoi(argv[3]) != dtype)) continue;
        for (const Shape& shape : shapes) {
          auto once = [&](uint64_t seed) {
            const auto c = static_cast<Cell>(cell);
            const auto d = static_cast<DType>(dtype);
            const auto p = static_cast<Path>(path);
            return dtype == 0   ? run<float>(c, d, p, shape, seed)
                   : dtype == 2 ? run<bf16>(c, d, p, shape, seed)
                                : run<f16>(c, d, p, shape, seed);
          };
          try {
            if (once(1) != once(2)) {
              std::printf("path %d cell %d dtype %d H %d: two runs gave different results\n", path, cell, dtype, shape.H);
              return 1;
            }
          } catch (const std::exception& e) {
            std::printf("path %d cell %d dtype %d H %d: %s\n", path, cell, dtype, shape.H, e.what());
            return 1;
          }
          ++cases;
        }
      }
  std::printf("%d cases clean\n", cases);
}
