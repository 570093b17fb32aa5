// Runs the 1x1 convolution's kernels on odd shapes with buffers of exactly the right size, for a build with
// -fsanitize=address,undefined. Each case runs twice, under two schedules; the results must be the same to the bit. Prints one line and
// returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/pointwise_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  int64_t N, P, C, O;
  int between;    // elements between positions
  bool optional;  // the tensors that may be null are given
  int sms;
};

std::vector<unsigned char> run(const Case& c, DType dtype, DType weight_dtype, bool tf32, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = c.sms;
  Buffers buffers;
  const int64_t M = c.N * c.P;
  auto span = [&](int64_t channels) { return M == 0 ? 0 : M * (channels + c.between) - c.between; };  // nothing after the last position
  auto floats = [&](int64_t size) { return static_cast<const float*>(buffers.filled(size, DType::f32)); };
  Pointwise p{};
  p.N = c.N, p.P = c.P, p.C = c.C, p.O = c.O, p.dtype = dtype, p.weight_dtype = weight_dtype, p.tf32 = tf32;
  p.input_stride = c.C + c.between, p.residual_stride = p.output_stride = c.O + c.between;
  p.input = buffers.filled(span(c.C), dtype), p.weight = buffers.filled(c.O * c.C, weight_dtype);
  if (c.optional) {
    p.input_activation = Activation::silu, p.activation = Activation::silu;
    p.residual = buffers.filled(span(c.O), dtype), p.rows = floats(2 * M), p.affine = floats(3 * c.C), p.gate = floats(c.N * c.C);
    p.bias = floats(c.O), p.keep = floats(c.N);
    p.moments = static_cast<float*>(buffers.raw(static_cast<size_t>(c.O) * 8));
  }
  const size_t bytes = static_cast<size_t>(span(c.O)) * element_bytes(dtype);
  p.output = buffers.raw(bytes);
  pointwise_run(p, buffers.raw(pointwise_workspace(p)), nullptr);
  std::vector<unsigned char> result(bytes + (p.moments ? static_cast<size_t>(c.O) * 8 : 0));
  if (bytes) std::memcpy(result.data(), p.output, bytes);
  if (p.moments) std::memcpy(result.data() + bytes, p.moments, result.size() - bytes);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{1, 150, 40, 72, 0, false, 1},
                                   {2, 75, 19, 9, 3, true, 1},
                                   {2, 17, 40, 72, 8, true, 9},
                                   {1, 1, 1, 1, 0, true, 9},
                                   {0, 3, 8, 8, 0, true, 2}};
  for (const Case& c : cases)
    for (int kind = 0; kind < 4; ++kind) try {
        const DType dtype = kind < 2 ? DType::f32 : kind == 2 ? DType::bf16 : DType::f16;
        const DType weight_dtype = c.optional ? DType::f32 : dtype;
        if (run(c, dtype, weight_dtype, kind == 1, 1) != run(c, dtype, weight_dtype, kind == 1, 2))
          throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("P %d C %d O %d kind %d: %s\n", static_cast<int>(c.P), static_cast<int>(c.C), static_cast<int>(c.O), kind, e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 4 * cases.size());
}
