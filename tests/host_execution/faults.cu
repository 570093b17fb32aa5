// One small kernel with a fault at choice, for a build with -fsanitize=address,undefined: each fault must be reported with this
// file's name and the line marked with its number.
//   faults KIND     0: none
#include <cstdio>
#include <cstdlib>

#include "../../csrc/common/launch.cuh"

using namespace pyops;

namespace {

struct FaultParams {
  const float* input;  // [64]
  float* output;       // [64]
  int kind, beyond;    // beyond: 1, which the compiler must not know
};

PYOPS_KERNEL(64) faulty(FaultParams p) {
  float* const shared = reinterpret_cast<float*>(dynamic_shared());  // [64]
  const int i = threadIdx.x;
  float local[4] = {1.f, 2.f, 3.f, 4.f};
  shared[p.kind == 1 ? i + p.beyond : i] = p.input[i];  // fault 1: shared memory
  __syncthreads();
  float sum = shared[63 - i];
  for (int k = 0; k < (p.kind == 2 ? 4 + p.beyond : 4); ++k) sum += local[k];        // fault 2: a local array
  if (p.kind == 3) sum += reinterpret_cast<const float4*>(p.input + p.beyond)[0].x;  // fault 3: a vector load off its alignment
  if (p.kind == 4) sum += p.input[i + p.beyond];                                     // fault 4: global memory, read
  if (p.kind == 5) sum += static_cast<float>(p.beyond << (31 + p.beyond));           // fault 5: undefined arithmetic
  if (p.kind == 6 && i < 40) __syncthreads();                                        // fault 6: a deadlock
  p.output[i] = sum;
}

}  // namespace

int main(int, char** argv) {
  auto* input = static_cast<float*>(std::calloc(64, sizeof(float)));
  auto* output = static_cast<float*>(std::calloc(64, sizeof(float)));
  launch("faulty", faulty, LaunchShape{dim3(1), 64, 64 * sizeof(float)}, nullptr, FaultParams{input, output, std::atoi(argv[1]), 1});
  std::printf("clean: %g\n", static_cast<double>(output[0]));
  std::free(input);
  std::free(output);
}
