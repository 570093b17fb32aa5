// Runs cross entropy over rows of odd lengths with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each
// case runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/common/launch.cuh"
#include "../../csrc/linear/cross_entropy_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::linear;

namespace {

std::vector<unsigned char> run(int64_t V, DType dtype, uint64_t seed) {
  constexpr int64_t kRows = 4;
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  conv::Buffers buffers;
  const size_t bytes = static_cast<size_t>(kRows * V) * conv::element_bytes(dtype);
  auto* target = static_cast<int64_t*>(buffers.raw(kRows * sizeof(int64_t)));
  target[0] = 0, target[1] = V - 1, target[2] = -100, target[3] = V;
  CrossEntropy p{kRows, V, -100, dtype, 0.1f, 2.f, buffers.filled(kRows * V, dtype), target};
  p.scale = static_cast<const float*>(buffers.filled(kRows, DType::f32));
  p.losses = static_cast<float*>(buffers.raw(kRows * sizeof(float)));
  cross_entropy_cuda(p, nullptr);
  std::vector<unsigned char> result(bytes + kRows * sizeof(float));
  std::memcpy(result.data(), p.logits, bytes);
  std::memcpy(result.data() + bytes, p.losses, kRows * sizeof(float));
  return result;
}

}  // namespace

int main() {
  int count = 0;
  for (const int64_t V : {1, 8, 131, 2048, 2077})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        if (run(V, dtype, 1) != run(V, dtype, 2)) throw std::runtime_error("two runs gave different results");
        ++count;
      } catch (const std::exception& e) {
        std::printf("V %d dtype %d: %s\n", static_cast<int>(V), static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%d cases clean\n", count);
}
