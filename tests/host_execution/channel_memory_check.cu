// Runs the channelwise kernels on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each
// case runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/channel.cuh"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  int64_t N, P, C;
  bool optional;  // the tensors that may be null are given
};

std::vector<unsigned char> run(const Case& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  Buffers buffers;
  const int64_t count = c.N * c.P * c.C;
  const size_t bytes = static_cast<size_t>(count) * element_bytes(dtype);
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t size) {
    result.resize(result.size() + size);
    std::memcpy(result.data() + result.size() - size, data, size);
  };
  auto floats = [&](int64_t size) { return static_cast<const float*>(buffers.filled(size, DType::f32)); };
  Channelwise p{};
  p.N = c.N, p.P = c.P, p.C = c.C, p.dtype = dtype, p.activation = c.optional ? Activation::silu : Activation::none;
  p.input = buffers.filled(count, dtype), p.affine = floats(3 * c.C);
  if (c.optional) {
    p.residual = buffers.filled(count, dtype), p.keep = floats(c.N);
    p.gate = floats(c.N * c.C), p.offset = floats(c.N * c.C), p.terms = floats(2 * c.C);
    p.grad_residual = buffers.raw(bytes);
  }
  auto sums = [&](int64_t size) { p.sums = static_cast<float*>(buffers.raw(static_cast<size_t>(size) * 4)); };

  sums(2 * c.C);
  channel_moments(p, buffers.raw(channel_moments_workspace(p)), nullptr);
  keep(p.sums, static_cast<size_t>(2 * c.C) * 4);
  p.output = buffers.raw(bytes);
  channel_apply(p, nullptr);
  keep(p.output, bytes);
  p.grad = c.optional ? buffers.filled(count, dtype) : nullptr;
  sums(c.N * c.C);
  channel_totals(p, buffers.raw(channel_totals_workspace(p)), nullptr);
  keep(p.sums, static_cast<size_t>(c.N * c.C) * 4);
  void* const grad = buffers.filled(count, dtype);
  p.grad = grad;
  sums(2 * c.C);
  channel_reduce(p, buffers.raw(channel_reduce_workspace(p)), nullptr);
  keep(p.sums, static_cast<size_t>(2 * c.C) * 4);
  if (c.optional) p.output = grad;  // in place
  channel_gradient(p, nullptr);
  keep(p.output, bytes);
  if (p.grad_residual) keep(p.grad_residual, bytes);
  return result;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{2, 37, 19, true}, {3, 1, 72, true},   {1, 300, 8, false},
                                   {5, 7, 1, false},  {2, 49, 136, true}, {0, 4, 8, true}};
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        if (run(c, dtype, 1) != run(c, dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("N %d P %d C %d dtype %d: %s\n", static_cast<int>(c.N), static_cast<int>(c.P), static_cast<int>(c.C),
                    static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
