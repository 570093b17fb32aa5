// Runs gaussian_sample on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each case runs
// twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/sampling/gaussian_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::sampling;

namespace {

struct Case {
  int64_t N, D;
};

std::vector<unsigned char> run(const Case& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  conv::Buffers buffers;
  const int64_t count = c.N * c.D;
  const size_t bytes = static_cast<size_t>(count) * conv::element_bytes(dtype), rows = static_cast<size_t>(c.N) * 4;
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t size) {
    if (size == 0) return;
    result.resize(result.size() + size);
    std::memcpy(result.data() + result.size() - size, data, size);
  };
  int64_t* const number = static_cast<int64_t*>(buffers.raw(sizeof(int64_t)));
  *number = 7;
  Gaussian p{c.N, c.D, c.D, c.D, c.D, dtype, number, buffers.filled(count, dtype), buffers.filled(count, dtype)};
  p.z = buffers.raw(bytes), p.kl = static_cast<float*>(buffers.raw(rows));
  gaussian(p, buffers.raw(gaussian_workspace(p)), nullptr);
  keep(p.z, bytes), keep(p.kl, rows);
  p.grad = buffers.filled(count, dtype), p.grad_kl = static_cast<const float*>(buffers.filled(c.N, DType::f32));
  p.grad_mean = buffers.raw(bytes), p.grad_log_var = buffers.raw(bytes);
  gaussian_gradient(p, nullptr);
  keep(p.grad_mean, bytes), keep(p.grad_log_var, bytes);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{3, 37}, {2, 128}, {9, 1}, {1, 4101}, {2, 2052}, {0, 8}};
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        if (run(c, dtype, 1) != run(c, dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("N %d D %d dtype %d: %s\n", static_cast<int>(c.N), static_cast<int>(c.D), static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
