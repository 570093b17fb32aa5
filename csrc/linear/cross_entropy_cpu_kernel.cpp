// Cross entropy over rows on the CPU (cross_entropy.h says what it computes), compiled once per instruction set.
//
// Threads take shares of the rows. A row is read for its highest logit, for the sum of exponentials below it and, with scale, for its
// gradient; after the first pass it comes from L1 or L2.
#include "../conv/activation_cpu.h"
#include "../conv/depthwise_cpu_pass.h"
#include "cross_entropy_cpu.h"

namespace pyops::linear::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::put;

constexpr int kStreams = 4;  // accumulators side by side: an addition's latency

// The lanes below `count`, `other` in those from there on.
inline vf first_lanes(vf v, int64_t count, float other) {
  for (int64_t i = count; i < kF; ++i) v[i] = other;
  return v;
}

template <class S, bool kCapped>
struct Row {
  const CrossEntropy& p;
  S* const at;
  const float per_cap;

  Row(const CrossEntropy& params, int64_t m)
      : p(params), at(static_cast<S*>(p.logits) + m * p.V), per_cap(kCapped ? 1.f / params.softcap : 0.f) {}

  // bend: y / softcap
  vf capped(vf x, vf& bend) const {
    if constexpr (!kCapped) return x;
    bend = cpu::PYOPS_ISA::tanh(x * per_cap);
    return bend * p.softcap;
  }
  vf capped(vf x) const {
    vf bend;
    return capped(x, bend);
  }
  // f(stream, first, lanes) for the vectors of the row
  template <class F>
  void vectors(const F& f) const {
    int64_t v = 0;
    for (; v + kStreams * kF <= p.V; v += kStreams * kF)
      for (int i = 0; i < kStreams; ++i) f(i, v + i * kF, kF);
    for (; v < p.V; v += kF) f(0, v, p.V - v < kF ? p.V - v : kF);
  }

  float highest() const {
    vf most[kStreams];
    for (vf& each : most) each = vf{} - __builtin_inff();
    vectors([&](int i, int64_t v, int64_t lanes) {
      const vf x = first_lanes(get(at + v, lanes), lanes, -__builtin_inff());
      most[i] = x > most[i] ? x : most[i];
    });
    float top = most[0][0];
    for (const vf& each : most)
      for (int i = 0; i < kF; ++i) top = each[i] > top ? each[i] : top;
    return capped(vf{} + top)[0];  // which keeps the order
  }

  // The row's loss; its gradient in place, times *scale.
  float run(int64_t target, const float* scale) const {
    const float top = highest(), chosen = capped(vf{} + widen(at[target]))[0];
    vf sums[4] = {}, depths[4] = {};  // of exponentials, of how far below the highest
    vectors([&](int i, int64_t v, int64_t lanes) {
      const vf depth = top - capped(get(at + v, lanes));
      sums[i] += first_lanes(exp_neg(depth), lanes, 0.f);
      if (p.smoothing != 0.f) depths[i] += first_lanes(depth, lanes, 0.f);
    });
    float totals[4], below[4];
    sum_lanes(sums, totals), sum_lanes(depths, below);
    const float sum = (totals[0] + totals[1]) + (totals[2] + totals[3]), depth = (below[0] + below[1]) + (below[2] + below[3]);
    if (scale) gradient(target, *scale, top, 1.f / sum);
    return __builtin_logf(sum) + (1.f - p.smoothing) * (top - chosen) + p.smoothing * (depth / static_cast<float>(p.V));
  }

  void gradient(int64_t target, float scale, float top, float per_sum) const {
    const float even = p.smoothing / static_cast<float>(p.V);
    const auto of = [&](vf x, float share) {
      vf bend;
      const vf g = (exp_neg(top - capped(x, bend)) * per_sum - share) * scale;
      if constexpr (kCapped) return g * (1.f - bend * bend);
      else return g;
    };
    const float own = of(vf{} + widen(at[target]), even + (1.f - p.smoothing))[0];
    vectors([&](int, int64_t v, int64_t lanes) { put(at + v, of(get(at + v, lanes), even), lanes); });
    at[target] = narrow<S>(own);
  }

  void fill(float value) const {
    vectors([&](int, int64_t v, int64_t lanes) { put(at + v, vf{} + value, lanes); });
  }
};

template <class S, bool kCapped>
void rows(const CrossEntropy& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const Row<S, kCapped> row(p, m);
    const int64_t target = p.target[m];
    if (target != p.ignore_index && target >= 0 && target < p.V) {
      p.losses[m] = row.run(target, p.scale ? p.scale + m : nullptr);
    } else {
      p.losses[m] = target == p.ignore_index ? 0.f : __builtin_nanf("");
      if (p.scale) row.fill(p.losses[m]);
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& p, int threads) {
  cpu::run_team(
      threads,
      [](const cpu::Team& team, void* context) {
        const CrossEntropy& p = *static_cast<const CrossEntropy*>(context);
        const int64_t begin = p.M * team.rank / team.size, end = p.M * (team.rank + 1) / team.size;
        conv::PYOPS_ISA::with_storage(
            p.dtype, [&](auto s) { p.softcap != 0.f ? rows<decltype(s), true>(p, begin, end) : rows<decltype(s), false>(p, begin, end); });
      },
      const_cast<CrossEntropy*>(&p));
}

}  // namespace pyops::linear::PYOPS_ISA
