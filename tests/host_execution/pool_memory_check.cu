// Runs the pooling kernels on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each case
// runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/pool_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  int64_t N, C, H, W;
  int32_t kernel[2], stride[2], padding[2];
  bool optional;  // the tensors that may be null are given
};

std::vector<unsigned char> run(const Case& c, DType dtype, bool maximum, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  Buffers buffers;
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t size) {
    const auto* const begin = static_cast<const unsigned char*>(data);
    result.insert(result.end(), begin, begin + size);
  };
  auto floats = [&](int64_t size) { return static_cast<const float*>(buffers.filled(size, DType::f32)); };
  Pooling p{};
  p.N = c.N, p.C = c.C, p.H = c.H, p.W = c.W, p.dtype = dtype, p.maximum = maximum;
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = c.kernel[d], p.stride[d] = c.stride[d], p.padding[d] = c.padding[d];
    out[d] = ((d ? c.W : c.H) + 2 * c.padding[d] - c.kernel[d]) / c.stride[d] + 1;
  }
  p.OH = out[0], p.OW = out[1], p.activation = c.optional ? Activation::silu : Activation::none;
  const int64_t from = c.N * c.H * c.W * c.C, to = c.N * p.OH * p.OW * c.C;
  const size_t from_bytes = static_cast<size_t>(from) * element_bytes(dtype), to_bytes = static_cast<size_t>(to) * element_bytes(dtype);
  p.input = buffers.filled(from, dtype), p.affine = c.optional ? floats(3 * c.C) : nullptr;
  p.output = buffers.raw(to_bytes);
  if (maximum) p.index_out = static_cast<uint8_t*>(buffers.raw(static_cast<size_t>(to)));
  pool_run(p, nullptr);
  keep(p.output, to_bytes);
  if (maximum) keep(p.index_out, static_cast<size_t>(to));

  p.index = p.index_out, p.index_out = nullptr, p.output = nullptr;
  p.grad = buffers.filled(to, dtype), p.affine = floats(3 * c.C);
  p.sums = static_cast<float*>(buffers.raw(static_cast<size_t>(c.C) * 8));
  pool_reduce(p, buffers.raw(pool_reduce_workspace(p)), nullptr);
  keep(p.sums, static_cast<size_t>(c.C) * 8);
  p.terms = c.optional ? floats(2 * c.C) : nullptr;
  p.output = buffers.raw(from_bytes);
  pool_gradient(p, nullptr);
  keep(p.output, from_bytes);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {2, 19, 9, 7, {3, 3}, {2, 2}, {1, 1}, true},    {3, 72, 4, 6, {2, 2}, {2, 2}, {0, 0}, false},
      {1, 8, 13, 11, {4, 3}, {1, 3}, {2, 1}, true},   {2, 8, 2, 3, {5, 6}, {1, 2}, {2, 3}, true},
      {1, 1, 15, 17, {15, 17}, {1, 1}, {0, 0}, true}, {2, 16, 5, 7, {2, 2}, {2147483647, 9}, {1, 0}, false},
      {0, 8, 3, 3, {2, 2}, {1, 1}, {0, 0}, true},
  };
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        for (bool maximum : {true, false})
          if (run(c, dtype, maximum, 1) != run(c, dtype, maximum, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("case %d dtype %d: %s\n", static_cast<int>(&c - cases.data()), static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
