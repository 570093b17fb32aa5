// LayerNorm over channels on the CPU, statistics in two passes: the mean, then deviations from it, whose own sum says what rounding took
// from the mean. z = (input - mean) / deviation - shift, with that share as shift.
//
// Rows: four positions at a time, whose lanes are added up together. Planes: 1 to 4 vectors of positions in registers walk through the
// channels once for the mean, once for the variance and once for the result; from the second on the block comes from L1 or L2.
// Floats are added in runs: 4 positions or 16 channels, then 32 positions or a block, then doubles.
#pragma once
#include "channel_norms_cpu_pass.h"

namespace pyops::norm::PYOPS_ISA {
namespace {

template <class V>
struct Statistics {  // of one position, or of a vector of them
  V mean, rstd, shift;
  // from the sums of deviations from `mean` and of their squares
  void settle(V sum, V squares, float inverse, float eps) {
    const V off = sum * inverse, variance = squares * inverse - off * off;
    if constexpr (sizeof(V) == sizeof(float)) rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + eps);
    else rstd = 1.f / cpu::PYOPS_ISA::sqrt((variance < 0.f ? V{} : variance) + eps);
    shift = off * rstd;
  }
  vf z(vf x) const { return (x - mean) * rstd - shift; }
};

template <class S>
struct LayerNormPass {
  const LayerNorm& p;
  const bool gradient;
  const int64_t wide;  // padded C
  const float inverse;

  LayerNormPass(const LayerNorm& params, bool backward)
      : p(params), gradient(backward), wide(padded(p.C)), inverse(1.f / static_cast<float>(p.C)) {}

  const S* input(int64_t at) const { return static_cast<const S*>(p.input) + at; }
  const S* grad(int64_t at) const { return static_cast<const S*>(p.grad) + at; }
  S* output(int64_t at) const { return static_cast<S*>(p.output) + at; }

  // A member's floats: weight, bias, then sums of grad * z and of grad, a row each with zeros behind C.
  struct Member {
    float *weight, *bias, *sums;
    Member(float* scratch, int64_t wide) : weight(scratch), bias(scratch + wide), sums(scratch + 2 * wide) {}
  };
  void prepare(float* scratch) const {
    const Member me(scratch, wide);
    for (int64_t c = 0; c < wide; ++c) {
      me.weight[c] = c >= p.C ? 0.f : p.weight ? p.weight[c] : 1.f;
      me.bias[c] = c < p.C && p.bias ? p.bias[c] : 0.f;
      me.sums[c] = me.sums[wide + c] = 0.f;
    }
  }

  void run() const {
    const int64_t sums = gradient ? 2 * p.C : 0;
    const NormPlan plan = plan_norm(p.N, p.P, p.C, p.rows, 4 * kF, kF, sums);
    run_chunks(
        plan, 4 * wide, sums, p.sums, [&](float* scratch) { prepare(scratch); },
        [&](float* scratch, double* sums, int64_t begin, int64_t end) {
          const Member me(scratch, wide);
          if (p.rows) return run_rows(me, sums, begin, end);
          for (int64_t unit = begin; unit < end; ++unit) {
            const Block block(plan, unit, p.P, p.C);
            switch ((block.count + kF - 1) / kF) {
              case 1: plane<1>(me, block, sums); break;
              case 2: plane<2>(me, block, sums); break;
              case 3: plane<3>(me, block, sums); break;
              default: plane<4>(me, block, sums);
            }
          }
        });
  }

  // --------------------------------------------------------------------------------------------------------------- rows

  void run_rows(const Member& me, double* sums, int64_t begin, int64_t end) const {
    int64_t r = begin, run = 0;
    for (; r < end; run += 4) {
      if (gradient && run == 32) flush(me, sums), run = 0;
      if (end - r >= 4) rows<4>(me, r), r += 4;
      else rows<1>(me, r), r += 1;
    }
    if (gradient) flush(me, sums);
  }
  void flush(const Member& me, double* to) const {
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t c = 0; c < p.C; ++c) to[i * p.C + c] += me.sums[i * wide + c], me.sums[i * wide + c] = 0.f;
  }
  // f(channel, lanes that exist) for the vectors of a row
  template <class F>
  void vectors(const F& f) const {
    for (int64_t i = 0; i < p.C; i += kF) f(i, p.C - i);
  }
  template <int R>
  void rows(const Member& me, int64_t r) const {
    const int64_t at = r * p.C;
    Statistics<float> s[4];
    float totals[4], squared[4];
    vf sums[4] = {}, squares[4] = {};
    vectors([&](int64_t i, int64_t lanes) {
      for (int k = 0; k < R; ++k) sums[k] += get(input(at + k * p.C + i), lanes);
    });
    sum_lanes(sums, totals);
    for (int k = 0; k < R; ++k) s[k].mean = totals[k] * inverse, sums[k] = vf{};
    const int64_t whole = p.C / kF * kF;
    for (int64_t i = 0; i < whole; i += kF)
      for (int k = 0; k < R; ++k) {
        const vf d = load_as(input(at + k * p.C + i), float{}) - s[k].mean;
        sums[k] += d, squares[k] += d * d;
      }
    if (whole < p.C)
      for (int k = 0; k < R; ++k) {
        alignas(64) float edge[kF];
        store(edge, get(input(at + k * p.C + whole), p.C - whole) - s[k].mean);
        const vf d = load_part(edge, static_cast<int>(p.C - whole));  // no deviation where there is no channel
        sums[k] += d, squares[k] += d * d;
      }
    sum_lanes(sums, totals), sum_lanes(squares, squared);
    for (int k = 0; k < R; ++k) s[k].settle(totals[k], squared[k], inverse, p.eps);
    if (gradient) return rows_gradient<R>(me, at, s);
    vectors([&](int64_t i, int64_t lanes) {
      const vf weight = load(me.weight + i), bias = load(me.bias + i);
      for (int k = 0; k < R; ++k) {
        const int64_t from = at + k * p.C + i;
        put(output(from), s[k].z(get(input(from), lanes)) * weight + bias, lanes);
      }
    });
  }
  template <int R>
  void rows_gradient(const Member& me, int64_t at, const Statistics<float> (&s)[4]) const {
    vf h_sums[4] = {}, hz_sums[4] = {};
    vectors([&](int64_t i, int64_t lanes) {
      const vf weight = load(me.weight + i);
      vf g_sum{}, gz_sum{};
      for (int k = 0; k < R; ++k) {
        const int64_t from = at + k * p.C + i;
        const vf g = get(grad(from), lanes), gz = g * s[k].z(get(input(from), lanes));
        g_sum += g, gz_sum += gz;
        h_sums[k] += g * weight, hz_sums[k] += gz * weight;
      }
      store(me.sums + i, load(me.sums + i) + gz_sum);
      store(me.sums + wide + i, load(me.sums + wide + i) + g_sum);
    });
    if (!p.output) return;
    float h[4], hz[4];
    sum_lanes(h_sums, h), sum_lanes(hz_sums, hz);
    vectors([&](int64_t i, int64_t lanes) {
      const vf weight = load(me.weight + i);
      for (int k = 0; k < R; ++k) {
        const int64_t from = at + k * p.C + i;
        const vf z = s[k].z(get(input(from), lanes));
        put(output(from), (get(grad(from), lanes) * weight - h[k] * inverse - z * (hz[k] * inverse)) * s[k].rstd, lanes);
      }
    });
  }

  // ------------------------------------------------------------------------------------------------------------- planes

  // f(channel, v, a, b) adds to two sums over channels, for each of V vectors of positions.
  template <int V, class F>
  void over_channels(vf (&a)[V], vf (&b)[V], const F& f) const {
    constexpr int64_t kRun = 16;
    for (int v = 0; v < V; ++v) a[v] = b[v] = vf{};
    for (int64_t first = 0; first < p.C; first += kRun) {
      const int64_t end = first + kRun < p.C ? first + kRun : p.C;
      vf run_a[V] = {}, run_b[V] = {};
      for (int64_t c = first; c < end; ++c)
        for (int v = 0; v < V; ++v) f(c, v, run_a[v], run_b[v]);
      for (int v = 0; v < V; ++v) a[v] += run_a[v], b[v] += run_b[v];
    }
  }
  template <int V>
  void plane(const Member& me, const Block& block, double* sums) const {
    const int64_t last = block.count - (V - 1) * kF;  // lanes of the last vector
    // vector v of channel c; all but the last are whole
    const auto x = [&](int64_t c, int v) {
      const S* from = input(block.at + c * p.P + v * kF);
      return v < V - 1 ? load_as(from, float{}) : get(from, last);
    };
    const auto write = [&](int64_t c, int v, vf value) {
      S* to = output(block.at + c * p.P + v * kF);
      if (v < V - 1) store_as(to, value);
      else put(to, value, last);
    };
    Statistics<vf> s[V];
    vf a[V], b[V];
    over_channels<V>(a, b, [&](int64_t c, int v, vf& sum, vf&) { sum += x(c, v); });
    for (int v = 0; v < V; ++v) s[v].mean = a[v] * inverse;
    over_channels<V>(a, b, [&](int64_t c, int v, vf& sum, vf& squares) {
      const vf d = x(c, v) - s[v].mean;
      sum += d, squares += d * d;
    });
    for (int v = 0; v < V; ++v) s[v].settle(a[v], b[v], inverse, p.eps);
    if (gradient) return plane_gradient<V>(me, block, x, write, s, sums);
    for (int64_t c = 0; c < p.C; ++c)
      for (int v = 0; v < V; ++v) write(c, v, s[v].z(x(c, v)) * me.weight[c] + me.bias[c]);
  }
  template <int V, class X, class Write>
  void plane_gradient(const Member& me, const Block& block, const X& x, const Write& write, Statistics<vf> (&s)[V], double* sums) const {
    const int64_t last = block.count - (V - 1) * kF;
    for (int64_t i = last; i < kF; ++i) s[V - 1].rstd[i] = s[V - 1].shift[i] = 0.f;  // no position: z is zero, not zero by zero
    const auto g = [&](int64_t c, int v) {
      const S* from = grad(block.at + c * p.P + v * kF);
      return v < V - 1 ? load_as(from, float{}) : get(from, last);
    };
    const auto z = [&](int64_t c, int v) { return s[v].z(x(c, v)); };
    for (int64_t c = 0; c < p.C; c += 2) {
      vf part[4] = {};
      for (int64_t k = 0; k < 2 && c + k < p.C; ++k)
        for (int v = 0; v < V; ++v) part[2 * k] += g(c + k, v) * z(c + k, v), part[2 * k + 1] += g(c + k, v);
      float totals[4];
      sum_lanes(part, totals);
      for (int64_t k = 0; k < 2 && c + k < p.C; ++k) sums[c + k] += totals[2 * k], sums[p.C + c + k] += totals[2 * k + 1];
    }
    if (!p.output) return;
    vf h[V], hz[V];
    over_channels<V>(h, hz, [&](int64_t c, int v, vf& sum, vf& products) {
      const vf value = g(c, v) * me.weight[c];
      sum += value, products += value * z(c, v);
    });
    for (int v = 0; v < V; ++v) h[v] *= inverse, hz[v] *= inverse;
    for (int64_t c = 0; c < p.C; ++c)
      for (int v = 0; v < V; ++v) write(c, v, (g(c, v) * me.weight[c] - h[v] - z(c, v) * hz[v]) * s[v].rstd);
  }
};

}  // namespace
}  // namespace pyops::norm::PYOPS_ISA
