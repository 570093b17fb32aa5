// The linear layer of a few rows on the CPU (linear.h says what it computes), compiled once per instruction set.
//
// Threads take shares of the outputs. Eight rows of the weight are read side by side, once for all rows of the input: dot products in
// vectors, summed across at the end. Eight streams keep more of memory's latency in flight than one.
#include "../conv/activation_cpu.h"
#include "../conv/depthwise_cpu_pass.h"
#include "linear_cpu.h"

namespace pyops::linear::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::get;

constexpr int kOutputs = 8;

inline float sum_across(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kF];
  store(lanes, v);
  for (int width = kF / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// R outputs from n on, of M rows of the input.
template <int R, int M, class S>
inline void dot(const Linear& p, int64_t n, float (&sums)[M][kOutputs]) {
  const S* const w = static_cast<const S*>(p.weight) + n * p.K;
  const S* const x = static_cast<const S*>(p.input);
  vf acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = vf{};
  int64_t k = 0;
  for (; k + kF <= p.K; k += kF) {
    vf a[M];
    for (int m = 0; m < M; ++m) a[m] = load_as(x + m * p.K + k, float{});
    for (int r = 0; r < R; ++r) {
      const vf b = load_as(w + r * p.K + k, float{});
      for (int m = 0; m < M; ++m) acc[r][m] += a[m] * b;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      if (k < p.K) acc[r][m] += get(x + m * p.K + k, p.K - k) * get(w + r * p.K + k, p.K - k);
      sums[m][r] = sum_across(acc[r][m]);
    }
}

template <int M, class S>
void rows(const Linear& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kOutputs) {
    const int64_t count = end - n < kOutputs ? end - n : kOutputs;
    float sums[M][kOutputs] = {};
    if (count == kOutputs) {
      constexpr int R = M == 1 ? 8 : M == 2 ? 8 : 4;  // 16 sums at most stay in registers
      for (int r = 0; r < kOutputs; r += R) {
        float some[M][kOutputs];
        dot<R, M, S>(p, n + r, some);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < R; ++i) sums[m][r + i] = some[m][i];
      }
    } else {
      for (int64_t r = 0; r < count; ++r) {
        float one[M][kOutputs];
        dot<1, M, S>(p, n + r, one);
        for (int m = 0; m < M; ++m) sums[m][r] = one[m][0];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int64_t r = 0; r < count; r += kF) {
        float buffer[kOutputs + kF] = {};
        __builtin_memcpy(buffer, sums[m], sizeof sums[m]);
        const int64_t left = count - r;
        vf y = load(buffer + r);
        if (p.bias) y += get(p.bias + n + r, left);
        if (p.residual) y += get(static_cast<const S*>(p.residual) + m * p.N + n + r, left);
        conv::PYOPS_ISA::with_activation(p.activation, [&](auto a) { y = conv::PYOPS_ISA::activate<decltype(a)::value>(y, p.slope); });
        conv::PYOPS_ISA::put(static_cast<S*>(p.output) + m * p.N + n + r, y, left);
      }
  }
}

void share(const Linear& p, int64_t begin, int64_t end) {
  conv::PYOPS_ISA::with_storage(p.dtype, [&](auto s) {
    using S = decltype(s);
    switch (p.M) {
      case 1: return rows<1, S>(p, begin, end);
      case 2: return rows<2, S>(p, begin, end);
      case 3: return rows<3, S>(p, begin, end);
      default: return rows<4, S>(p, begin, end);
    }
  });
}

}  // namespace

void linear(const Linear& p, int threads) {
  cpu::run_team(
      threads,
      [](const cpu::Team& team, void* context) {
        const Linear& p = *static_cast<const Linear*>(context);
        const int64_t groups = (p.N + kOutputs - 1) / kOutputs;
        const int64_t end = groups * (team.rank + 1) / team.size * kOutputs;
        share(p, groups * team.rank / team.size * kOutputs, end < p.N ? end : p.N);
      },
      const_cast<Linear*>(&p));
}

}  // namespace pyops::linear::PYOPS_ISA
