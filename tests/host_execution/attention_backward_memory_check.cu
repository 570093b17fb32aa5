// Runs attention's gradients on odd shapes with buffers of exactly the right size, for a build with -fsanitize=address,undefined. Each case
// runs twice, under two schedules; the results must be the same to the bit. Prints one line and returns 0, or fails.
#include <cstdio>

#include "../../csrc/attention/attention_backward_cuda.h"
#include "../../csrc/common/launch.cuh"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::attention;

namespace {

struct Case {
  int64_t B, H, G, N, M, D;
  int64_t left, right;
  bool bias, spans, dropout;
};

struct WindowCase {
  int64_t B, H, W, heads, D, wh, ww, shift;
  bool cosines, vectors, dropout;
};

struct Results {
  std::vector<std::pair<void*, size_t>> parts;
  void* add(conv::Buffers& buffers, int64_t bytes) {
    parts.push_back({buffers.raw(static_cast<size_t>(bytes)), static_cast<size_t>(bytes)});
    return parts.back().first;
  }
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const auto& [data, size] : parts)
      all.insert(all.end(), static_cast<unsigned char*>(data), static_cast<unsigned char*>(data) + size);
    return all;
  }
};

std::vector<unsigned char> run(const Case& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 1;
  conv::Buffers buffers;
  Results results;
  const auto heads = [&](void* data, int64_t count, int64_t rows) { return Heads{data, count * rows * c.D, rows * c.D, c.D}; };
  AttentionGradient g{};
  Attention& p = g.forward;
  p.B = c.B, p.H = c.H, p.G = c.G, p.N = c.N, p.M = c.M, p.D = c.D, p.S = c.B, p.left = c.left, p.right = c.right;
  p.dtype = dtype, p.scale = 0.25f, p.dropout_factor = 1.25f, p.threshold = 0x33333333u;
  const int64_t size = c.B * c.H * c.N * c.D, keys = c.B * c.G * c.M * c.D;
  p.query = heads(buffers.filled(size, dtype), c.H, c.N), p.output = heads(buffers.filled(size, dtype), c.H, c.N);
  p.key = heads(buffers.filled(keys, dtype), c.G, c.M), p.value = heads(buffers.filled(keys, dtype), c.G, c.M);
  p.lse = static_cast<float*>(buffers.filled(c.B * c.H * c.N, DType::f32));
  g.grad = heads(buffers.filled(size, dtype), c.H, c.N);
  g.grad_lse = static_cast<float*>(buffers.filled(c.B * c.H * c.N, DType::f32));
  g.grad_query = heads(results.add(buffers, size * 2), c.H, c.N);
  g.grad_key = heads(results.add(buffers, keys * 2), c.G, c.M), g.grad_value = heads(results.add(buffers, keys * 2), c.G, c.M);
  if (c.bias) {
    p.bias = {buffers.filled(c.H * c.N * c.M, DType::f32), BiasType::f32, {1, c.H, c.N, c.M}, {0, c.N * c.M, c.M, 1}};
    g.grad_bias = static_cast<float*>(results.add(buffers, c.H * c.N * c.M * 4));
  }
  if (c.spans) {
    auto* const spans = static_cast<int32_t*>(buffers.raw(static_cast<size_t>(c.B) * 16));
    for (int64_t b = 0; b < c.B; ++b) {
      const int32_t n = static_cast<int32_t>(c.N - b), m = static_cast<int32_t>(c.M / (b + 1));
      spans[4 * b] = 0, spans[4 * b + 1] = n, spans[4 * b + 2] = 0, spans[4 * b + 3] = m;
    }
    p.spans = spans;
  }
  if (c.dropout) {
    auto* const drawn = static_cast<int64_t*>(buffers.raw(8));
    *drawn = 12345678901, p.seed = drawn;
  }
  attention_gradient_cuda(g, buffers.raw(attention_gradient_workspace(g)), nullptr);
  return results.bytes();
}

std::vector<unsigned char> run(const WindowCase& c, DType dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 1;
  conv::Buffers buffers;
  Results results;
  WindowAttention p{};
  p.B = c.B, p.H = c.H, p.W = c.W, p.heads = c.heads, p.D = c.D, p.wh = c.wh, p.ww = c.ww, p.shift_h = p.shift_w = c.shift;
  p.rows = (c.H + c.wh - 1) / c.wh, p.columns = (c.W + c.ww - 1) / c.ww;
  p.dtype = dtype, p.scale = 0.25f, p.keep_scale = 1.25f;
  const auto floats = [&](int64_t count) { return static_cast<float*>(buffers.filled(count, DType::f32)); };
  const auto sums = [&](int64_t count) { return static_cast<float*>(results.add(buffers, count * 4)); };
  const int64_t C = c.heads * c.D, size = c.B * c.H * c.W * C;
  p.qkv = buffers.filled(3 * size, dtype), p.grad = buffers.filled(size, dtype), p.lse = floats(p.windows() * c.heads * p.tokens());
  p.grad_qkv = results.add(buffers, 6 * size);
  if (c.vectors) p.qkv_bias = floats(3 * C), p.grad_qkv_bias = sums(3 * C);
  if (c.vectors) p.table = floats(p.entries() * c.heads), p.grad_table = sums(p.entries() * c.heads);
  if (c.cosines) p.logit_scale = floats(c.heads), p.grad_logit_scale = sums(c.heads);
  if (c.dropout) {
    auto* const drawn = static_cast<int64_t*>(buffers.raw(8));
    *drawn = -7, p.seed = drawn, p.threshold = 0x33333333u;
  }
  window_attention_gradient_cuda(p, buffers.raw(window_attention_gradient_workspace(p)), nullptr);
  return results.bytes();
}

template <class C>
bool clean(const std::vector<C>& cases) {
  for (const C& c : cases)
    for (DType dtype : {DType::bf16, DType::f16}) try {
        if (run(c, dtype, 1) != run(c, dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("case %d dtype %d: %s\n", static_cast<int>(&c - cases.data()), static_cast<int>(dtype), e.what());
        return false;
      }
  return true;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {{1, 1, 1, 1, 1, 1, -1, -1, true, false, false},
                                   {3, 4, 2, 17, 33, 40, -1, 0, true, true, true},
                                   {2, 1, 1, 49, 49, 32, -1, -1, true, false, false},
                                   {1, 1, 1, 20, 140, 128, 9, 3, true, true, false},
                                   {3, 1, 1, 5, 0, 8, -1, -1, false, false, false}};
  const std::vector<WindowCase> windows = {{2, 9, 10, 2, 16, 4, 4, 2, false, true, true},
                                           {1, 7, 7, 1, 40, 7, 7, 0, true, true, false},
                                           {1, 11, 13, 2, 9, 3, 5, 1, true, false, false},
                                           {1, 8, 8, 1, 72, 8, 4, 3, false, false, true},
                                           {1, 9, 9, 1, 8, 9, 9, 0, false, true, false}};
  if (!clean(cases) || !clean(windows)) return 1;
  std::printf("%zu cases clean\n", 2 * (cases.size() + windows.size()));
}
