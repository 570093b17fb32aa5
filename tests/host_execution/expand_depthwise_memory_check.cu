// Runs the fused expansion and depthwise convolution on odd shapes with buffers of exactly the right size, for a build with
// -fsanitize=address,undefined. Each case runs twice, under two schedules; the results must be the same to the bit. Prints one line and
// returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/expand_depthwise_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  int64_t N, C, E, H, W;
  int K, stride;
  int between;    // elements between positions
  bool optional;  // biases and means are given, and weights are float
  int sms;
};

std::vector<unsigned char> run(const Case& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = c.sms;
  Buffers buffers;
  ExpandDepthwise p{};
  p.N = c.N, p.H = c.H, p.W = c.W, p.C = c.C, p.E = c.E, p.K = c.K, p.stride = c.stride;
  p.OH = (c.H - 1) / c.stride + 1, p.OW = (c.W - 1) / c.stride + 1;
  p.input_stride = c.C + c.between;
  p.dtype = dtype, p.expand_weight_dtype = p.depthwise_weight_dtype = c.optional ? DType::f32 : dtype, p.activation = Activation::silu;
  const int64_t positions = c.N * c.H * c.W;
  p.input = buffers.filled(positions ? positions * p.input_stride - c.between : 0, dtype);  // nothing after the last position
  p.expand_weight = buffers.filled(c.E * c.C, p.expand_weight_dtype);
  p.depthwise_weight = buffers.filled(c.E * c.K * c.K, p.depthwise_weight_dtype);
  if (c.optional) {
    p.expand_bias = static_cast<const float*>(buffers.filled(c.E, DType::f32));
    p.depthwise_bias = static_cast<const float*>(buffers.filled(c.E, DType::f32));
    p.means = static_cast<float*>(buffers.raw(static_cast<size_t>(c.N * c.E) * 4));
  }
  const size_t bytes = static_cast<size_t>(c.N * p.OH * p.OW * c.E) * element_bytes(dtype);
  p.output = buffers.raw(bytes);
  expand_depthwise_run(p, buffers.raw(expand_depthwise_workspace(p)), nullptr);
  std::vector<unsigned char> result(bytes + (p.means ? static_cast<size_t>(c.N * c.E) * 4 : 0));
  if (bytes) std::memcpy(result.data(), p.output, bytes);
  if (result.size() > bytes) std::memcpy(result.data() + bytes, p.means, result.size() - bytes);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 40, 72, 9, 10, 3, 1, 0, true, 200}, {2, 13, 9, 7, 5, 3, 2, 8, true, 1},   {1, 16, 68, 14, 14, 5, 1, 0, false, 1},
      {1, 19, 65, 11, 3, 5, 2, 3, true, 200}, {1, 8, 4, 20, 18, 7, 1, 0, false, 1}, {2, 8, 12, 1, 17, 7, 2, 0, true, 200},
      {1, 1, 1, 1, 1, 3, 1, 1, true, 1},      {0, 8, 8, 5, 5, 3, 1, 0, true, 1},    {1, 64, 64, 30, 33, 3, 2, 0, false, 1},
      {1, 24, 6, 13, 29, 5, 1, 8, true, 4},   {1, 7, 3, 6, 6, 5, 2, 0, false, 200}, {1, 5, 66, 16, 16, 3, 1, 5, true, 2}};
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        if (run(c, dtype, 1) != run(c, dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("C %d E %d H %d W %d K %d: %s\n", static_cast<int>(c.C), static_cast<int>(c.E), static_cast<int>(c.H),
                    static_cast<int>(c.W), c.K, e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
