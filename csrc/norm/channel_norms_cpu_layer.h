// LayerNorm over channels on the CPU, statistics in two passes.
//
// Rows: four positions at a time, whose lanes are added up together. Planes: 1 to 4 vectors of positions in registers walk through the
// channels once for the mean, once for the variance and once for the result; from the second on the block comes from L1 or L2.
// Floats are added in runs: 4 positions or 32 channels, then 32 positions or a block, then doubles.
#pragma once
#include "channel_norms_cpu_pass.h"

namespace pyops::norm::PYOPS_ISA {
namespace {

inline float inverse_root(float x) { return 1.f / __builtin_sqrtf(x); }

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
    const NormPlan plan = plan_norm(p.N, p.P, p.C, p.rows, 4 * kF, kF);
    run_chunks(
        plan, 4 * wide, gradient ? 2 * p.C : 0, p.sums, [&](float* scratch) { prepare(scratch); },
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
      if (run == 32) flush(me, sums), run = 0;
      if (end - r >= 4) rows<4>(me, r), r += 4;
      else rows<1>(me, r), r += 1;
    }
    if (gradient) flush(me, sums);
  }
  void flush(const Member& me, double* to) const {
    if (!gradient) return;
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
    float mean[4], rstd[4];
    vf sums[4] = {};
    vectors([&](int64_t i, int64_t lanes) {
      for (int k = 0; k < R; ++k) sums[k] += get(input(at + k * p.C + i), lanes);
    });
    sum_lanes(sums, mean);
    for (int k = 0; k < R; ++k) mean[k] *= inverse, sums[k] = vf{};
    const int64_t whole = p.C / kF * kF;
    for (int64_t i = 0; i < whole; i += kF)
      for (int k = 0; k < R; ++k) {
        const vf d = load_as(input(at + k * p.C + i), float{}) - mean[k];
        sums[k] += d * d;
      }
    if (whole < p.C) {
      const vf ones = vf{} + 1.f;
      alignas(64) float one[kF];
      store(one, ones);
      const vf edge = load_part(one, static_cast<int>(p.C - whole));  // no deviation where there is no channel
      for (int k = 0; k < R; ++k) {
        const vf d = (get(input(at + k * p.C + whole), p.C - whole) - mean[k]) * edge;
        sums[k] += d * d;
      }
    }
    sum_lanes(sums, rstd);
    for (int k = 0; k < R; ++k) rstd[k] = inverse_root(rstd[k] * inverse + p.eps);
    if (gradient) return rows_gradient<R>(me, at, mean, rstd);
    vectors([&](int64_t i, int64_t lanes) {
      const vf weight = load(me.weight + i), bias = load(me.bias + i);
      for (int k = 0; k < R; ++k) {
        const int64_t from = at + k * p.C + i;
        put(output(from), (get(input(from), lanes) - mean[k]) * rstd[k] * weight + bias, lanes);
      }
    });
  }
  template <int R>
  void rows_gradient(const Member& me, int64_t at, const float (&mean)[4], const float (&rstd)[4]) const {
    vf h_sums[4] = {}, hz_sums[4] = {};
    vectors([&](int64_t i, int64_t lanes) {
      const vf weight = load(me.weight + i);
      vf g_sum{}, gz_sum{};
      for (int k = 0; k < R; ++k) {
        const int64_t from = at + k * p.C + i;
        const vf g = get(grad(from), lanes), gz = g * ((get(input(from), lanes) - mean[k]) * rstd[k]);
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
        const vf z = (get(input(from), lanes) - mean[k]) * rstd[k];
        put(output(from), (get(grad(from), lanes) * weight - h[k] * inverse - z * (hz[k] * inverse)) * rstd[k], lanes);
      }
    });
  }

  // ------------------------------------------------------------------------------------------------------------- planes

  // sums of f(channel, v) over channels, for V vectors of positions
  template <int V, class F>
  void over_channels(vf (&sums)[V], const F& f) const {
    constexpr int64_t kRun = 32;
    for (int v = 0; v < V; ++v) sums[v] = vf{};
    for (int64_t first = 0; first < p.C; first += kRun) {
      const int64_t end = first + kRun < p.C ? first + kRun : p.C;
      vf run[V] = {};
      for (int64_t c = first; c < end; ++c)
        for (int v = 0; v < V; ++v) run[v] += f(c, v);
      for (int v = 0; v < V; ++v) sums[v] += run[v];
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
    vf mean[V], rstd[V];
    over_channels<V>(mean, x);
    for (int v = 0; v < V; ++v) mean[v] *= inverse;
    over_channels<V>(rstd, [&](int64_t c, int v) {
      const vf d = x(c, v) - mean[v];
      return d * d;
    });
    for (int v = 0; v < V; ++v) rstd[v] = 1.f / cpu::PYOPS_ISA::sqrt(rstd[v] * inverse + p.eps);
    if (gradient) return plane_gradient<V>(me, block, x, write, mean, rstd, sums);
    for (int64_t c = 0; c < p.C; ++c)
      for (int v = 0; v < V; ++v) write(c, v, (x(c, v) - mean[v]) * rstd[v] * me.weight[c] + me.bias[c]);
  }
  template <int V, class X, class Write>
  void plane_gradient(const Member& me, const Block& block, const X& x, const Write& write, const vf (&mean)[V], vf (&rstd)[V],
                      double* sums) const {
    const int64_t last = block.count - (V - 1) * kF;
    for (int64_t i = last; i < kF; ++i) rstd[V - 1][i] = 0.f;  // where there is no position z is zero, not zero by zero
    const auto g = [&](int64_t c, int v) {
      const S* from = grad(block.at + c * p.P + v * kF);
      return v < V - 1 ? load_as(from, float{}) : get(from, last);
    };
    const auto z = [&](int64_t c, int v) { return (x(c, v) - mean[v]) * rstd[v]; };
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
    over_channels<V>(h, [&](int64_t c, int v) { return g(c, v) * me.weight[c]; });
    over_channels<V>(hz, [&](int64_t c, int v) { return g(c, v) * me.weight[c] * z(c, v); });
    for (int v = 0; v < V; ++v) h[v] *= inverse, hz[v] *= inverse;
    for (int64_t c = 0; c < p.C; ++c)
      for (int v = 0; v < V; ++v) write(c, v, (g(c, v) * me.weight[c] - h[v] - z(c, v) * hz[v]) * rstd[v]);
  }
};

}  // namespace
}  // namespace pyops::norm::PYOPS_ISA
