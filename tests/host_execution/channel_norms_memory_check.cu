// Runs the norms over channels on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each
// case runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/norm/norms.cuh"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::norm;

namespace {

struct Case {
  int64_t N, P, C, size;  // size: LRN's
};

std::vector<unsigned char> run(const Case& c, bool rows, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  conv::Buffers buffers;
  const int64_t count = c.N * c.P * c.C;
  const size_t bytes = static_cast<size_t>(count) * conv::element_bytes(dtype);
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t size) {
    if (size == 0) return;
    result.resize(result.size() + size);
    std::memcpy(result.data() + result.size() - size, data, size);
  };
  const void *const input = buffers.filled(count, dtype), *const grad = buffers.filled(count, dtype);
  LocalResponse r{c.N, c.P, c.C, c.size, dtype, rows, 1, 1.f, 0.75f, 1.f, input, nullptr, buffers.raw(bytes)};
  lrn(r, nullptr);
  keep(r.output, bytes);
  r.grad = grad;
  lrn_gradient(r, buffers.raw(lrn_gradient_workspace(r)), nullptr);
  keep(r.output, bytes);

  LayerNorm n{c.N, c.P, c.C, dtype, rows, 1e-6f, input};
  n.weight = static_cast<const float*>(buffers.filled(c.C, DType::f32)),
  n.bias = static_cast<const float*>(buffers.filled(c.C, DType::f32));
  n.output = buffers.raw(bytes);
  layer_norm(n, nullptr);
  keep(n.output, bytes);
  const size_t sums = static_cast<size_t>(2 * c.C) * 4;
  n.grad = grad, n.sums = static_cast<float*>(buffers.raw(sums));
  layer_norm_gradient(n, buffers.raw(layer_norm_gradient_workspace(n)), nullptr);
  keep(n.output, bytes), keep(n.sums, sums);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{2, 37, 19, 5},  {3, 1, 72, 5},   {1, 300, 8, 5},  {5, 7, 1, 5},
                                   {2, 49, 136, 4}, {1, 3, 2072, 5}, {1, 2, 270, 99}, {0, 4, 8, 5}};
  for (const Case& c : cases)
    for (bool rows : {true, false})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
          if (run(c, rows, dtype, 1) != run(c, rows, dtype, 2)) throw std::runtime_error("two runs gave different results");
        } catch (const std::exception& e) {
          std::printf("N %d P %d C %d rows %d dtype %d: %s\n", static_cast<int>(c.N), static_cast<int>(c.P), static_cast<int>(c.C), rows,
                      static_cast<int>(dtype), e.what());
          return 1;
        }
  std::printf("%zu cases clean\n", 6 * cases.size());
}
