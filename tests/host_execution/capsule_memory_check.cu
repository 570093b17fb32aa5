// Runs routing between capsules on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each
// case runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/capsule/routing_cuda.h"
#include "../../csrc/common/launch.cuh"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::capsule;

namespace {

struct Case {
  int64_t N, I, J, D, T;
};

std::vector<unsigned char> run(const Case& c, bool by_input, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  conv::Buffers buffers;
  const int64_t capsules = c.N * c.J * c.D, votes = capsules * c.I;
  const size_t element = conv::element_bytes(dtype), sums = static_cast<size_t>(capsules * c.T) * 4;
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t size) {
    if (size == 0) return;
    result.resize(result.size() + size);
    std::memcpy(result.data() + result.size() - size, data, size);
  };
  Routing p{c.N, c.I, c.J, c.D, c.T, dtype, by_input, 0, buffers.filled(votes, dtype)};
  p.sums = static_cast<float*>(buffers.raw(sums)), p.output = buffers.raw(static_cast<size_t>(capsules) * element);
  routing(p, buffers.raw(routing_workspace(p, false)), nullptr);
  keep(p.output, static_cast<size_t>(capsules) * element), keep(p.sums, sums);
  p.grad = buffers.filled(capsules, dtype), p.output = buffers.raw(static_cast<size_t>(votes) * element);
  for (int stop : {0, 1}) {
    p.stop_gradient = stop;
    routing_gradient(p, buffers.raw(routing_workspace(p, true)), nullptr);
    keep(p.output, static_cast<size_t>(votes) * element);
  }
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{2, 31, 10, 16, 3}, {3, 17, 5, 7, 2}, {1, 3, 200, 8, 2},
                                   {1, 9, 3, 29, 3},   {2, 1, 1, 1, 1},  {0, 4, 2, 8, 3}};
  for (const Case& c : cases)
    for (bool by_input : {true, false})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
          if (run(c, by_input, dtype, 1) != run(c, by_input, dtype, 2)) throw std::runtime_error("two runs gave different results");
        } catch (const std::exception& e) {
          std::printf("N %d I %d J %d D %d T %d by_input %d dtype %d: %s\n", static_cast<int>(c.N), static_cast<int>(c.I),
                      static_cast<int>(c.J), static_cast<int>(c.D), static_cast<int>(c.T), by_input, static_cast<int>(dtype), e.what());
          return 1;
        }
  std::printf("%zu cases clean\n", 6 * cases.size());
}
