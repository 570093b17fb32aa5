// Runs the dense convolution's kernels on odd shapes with buffers of exactly the right size, for a build with
// -fsanitize=address,undefined. Each case runs twice, under two schedules; the results must be the same to the bit. Prints one line and
// returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/dense_cuda.h"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  DenseShape s;   // N, H, W, C, OH, OW, O, KH, KW, strides, padding, dilation, groups: of the convolution
  int between;    // elements between positions
  bool optional;  // the tensors that may be null are given
  int sms;
  Pool pool = Pool::none;                        // of the convolution
  std::optional<DensePath> path = std::nullopt;  // of the convolution, where it can be taken; then without moments
};

using Bytes = std::vector<unsigned char>;

void append(Bytes& all, const void* from, size_t bytes) {
  const auto* const begin = static_cast<const unsigned char*>(from);
  all.insert(all.end(), begin, begin + bytes);
}

// The convolution, then the gradient of its input and of its filter.
Bytes run(const Case& c, DType dtype, bool tf32, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = c.sms;
  Buffers buffers;
  const DenseShape& s = c.s;
  const int64_t M = s.N * s.H * s.W, OM = s.N * s.OH * s.OW, filter = s.O * (s.C / s.groups) * s.KH * s.KW;
  auto image = [&](int64_t positions, int64_t channels) {  // nothing after the last position
    return static_cast<const void*>(buffers.filled(positions == 0 ? 0 : positions * (channels + c.between) - c.between, dtype));
  };
  const void* const weight = buffers.filled(filter, dtype);
  Bytes results;
  for (bool transposed : {false, true}) {
    Dense p{};
    p.s = s, p.pool = transposed ? Pool::none : c.pool;
    if (transposed) p.s.H = s.OH, p.s.W = s.OW, p.s.C = s.O, p.s.OH = s.H, p.s.OW = s.W, p.s.O = s.C;
    const int64_t from = transposed ? OM : M, to = transposed ? M : OM, stored = p.pool == Pool::none ? to : s.N * (s.OH / 2) * (s.OW / 2);
    p.dtype = dtype, p.transposed = transposed, p.tf32 = tf32, p.activation = c.optional ? Activation::silu : Activation::none;
    const bool rounds = dtype != DType::f32 || tf32;
    const std::optional<DensePath> path = transposed || !rounds ? std::nullopt : c.path;
    p.input_stride = p.s.C + c.between, p.residual_stride = p.s.O + c.between;
    const int64_t taps = int64_t{s.KH} * s.KW, strides[4] = {s.C / s.groups * taps, taps, s.KW, 1};
    for (int d = 0; d < 4; ++d) p.weight_strides[d] = strides[d];
    p.input = image(from, p.s.C), p.weight = weight;
    if (c.optional) {
      p.residual = image(to, p.s.O), p.bias = static_cast<const float*>(buffers.filled(p.s.O, DType::f32));
      if (p.pool == Pool::none && !path) p.moments = static_cast<float*>(buffers.raw(static_cast<size_t>(p.s.O) * 8));
    }
    const size_t bytes = static_cast<size_t>(stored * p.s.O) * element_bytes(dtype);
    p.output = buffers.raw(bytes);
    dense_run(p, buffers.raw(dense_workspace(p, path)), nullptr, path);
    append(results, p.output, bytes);
    if (p.moments) append(results, p.moments, static_cast<size_t>(p.s.O) * 8);
  }
  DenseGradient g{};
  g.s = s, g.dtype = dtype, g.tf32 = tf32, g.grad_stride = s.O + c.between, g.input_stride = s.C + c.between;
  g.grad = image(OM, s.O), g.input = image(M, s.C), g.grad_weight = buffers.raw(static_cast<size_t>(filter) * element_bytes(dtype));
  dense_wgrad(g, buffers.raw(dense_wgrad_workspace(g)), nullptr);
  append(results, g.grad_weight, static_cast<size_t>(filter) * element_bytes(dtype));
  return results;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {{1, 12, 13, 8, 12, 13, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1}, 0, false, 1},
      {{2, 9, 7, 16, 5, 3, 8, 3, 2, 2, 3, 1, 1, 1, 1, 1}, 8, true, 9},
      {{2, 11, 10, 3, 6, 5, 9, 5, 4, 2, 2, 2, 1, 1, 1, 1}, 0, true, 1},
      {{1, 7, 6, 5, 5, 8, 7, 3, 1, 1, 1, 1, 1, 2, 2, 1}, 3, false, 9},
      {{1, 6, 5, 18, 6, 3, 14, 1, 3, 1, 2, 0, 1, 1, 1, 2}, 0, true, 9},
      {{1, 8, 6, 32, 3, 2, 16, 3, 3, 3, 4, 2, 2, 3, 2, 2}, 0, true, 2},
      {{2, 2, 3, 8, 6, 7, 8, 1, 1, 1, 1, 2, 2, 1, 1, 1}, 0, false, 2},
      {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1}, 0, true, 9},
      {{1, 5, 5, 8, 1, 1, 4, 1, 1, 5, 6, 0, 0, 1, 1, 1}, 0, true, 1},
      {{0, 3, 3, 8, 3, 3, 8, 1, 1, 1, 1, 0, 0, 1, 1, 1}, 0, true, 2},
      {{2, 11, 10, 3, 11, 10, 9, 3, 3, 1, 1, 1, 1, 1, 1, 1}, 3, true, 1, Pool::maximum},
      {{2, 9, 7, 16, 5, 3, 8, 3, 2, 2, 3, 1, 1, 1, 1, 1}, 8, true, 9, Pool::average},
      {{1, 12, 13, 64, 12, 13, 70, 3, 3, 1, 1, 1, 1, 1, 1, 1}, 0, true, 1, Pool::none, DensePath::halo},
      {{2, 9, 7, 17, 5, 4, 9, 3, 2, 2, 2, 1, 1, 1, 1, 1}, 3, true, 1, Pool::none, DensePath::halo},
      {{1, 19, 21, 3, 10, 11, 16, 7, 7, 2, 2, 3, 3, 1, 1, 1}, 0, true, 1, Pool::maximum, DensePath::halo},
      {{1, 3, 2, 1, 5, 10, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1}, 0, true, 1, Pool::average, DensePath::halo},
      {{1, 1, 37, 8, 5, 33, 8, 1, 7, 1, 1, 2, 1, 1, 1, 1}, 8, true, 1, Pool::none, DensePath::halo},
  };
  for (const Case& c : cases)
    for (int kind = 0; kind < 4; ++kind) try {
        const DType dtype = kind < 2 ? DType::f32 : kind == 2 ? DType::bf16 : DType::f16;
        if (run(c, dtype, kind == 1, 1) != run(c, dtype, kind == 1, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("case %d kind %d: %s\n", static_cast<int>(&c - cases.data()), kind, e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 4 * cases.size());
}
