// Runs the fused MLP on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each case runs
// twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/common/launch.cuh"
#include "../../csrc/linear/mlp_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::linear;

namespace {

struct Case {
  int64_t M, C, H, O;
  bool norm, residual;
};

std::vector<unsigned char> run(const Case& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  conv::Buffers buffers;
  const auto floats = [&](int64_t count) { return static_cast<const float*>(buffers.filled(count, DType::f32)); };
  const MlpSizes sizes{c.C, c.H, c.O};
  const MlpWeights weights{dtype, buffers.filled(c.H * c.C, dtype), buffers.filled(c.O * c.H, dtype), floats(c.H), floats(c.O)};
  float* const packed = static_cast<float*>(buffers.raw(static_cast<size_t>(MlpCudaLayout(sizes, dtype).floats) * 4));
  mlp_pack_cuda(sizes, weights, packed, nullptr);

  const size_t bytes = static_cast<size_t>(c.M * c.O) * conv::element_bytes(dtype);
  Mlp p{};
  p.sizes = sizes, p.M = c.M, p.dtype = dtype, p.norm = c.norm, p.eps = 1e-6f, p.activation = Activation::gelu;
  p.input = buffers.filled(c.M * c.C, dtype), p.packed = packed, p.output = buffers.raw(bytes);
  if (c.residual) p.residual = buffers.filled(c.M * c.O, dtype);
  mlp_cuda(p, nullptr);
  const auto* const output = static_cast<const unsigned char*>(p.output);
  return {output, output + bytes};
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{1, 1, 1, 1, true, true},       {37, 33, 70, 41, true, false}, {40, 96, 64, 96, false, true},
                                   {130, 24, 33, 192, true, true}, {20, 192, 40, 7, true, false}, {0, 8, 8, 8, true, true}};
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        if (run(c, dtype, 1) != run(c, dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("M %d C %d H %d O %d dtype %d: %s\n", static_cast<int>(c.M), static_cast<int>(c.C), static_cast<int>(c.H),
                    static_cast<int>(c.O), static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
