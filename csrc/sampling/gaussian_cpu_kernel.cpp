// Sampling on the CPU (gaussian.h says what it computes), compiled once per instruction set. A vector of Philox blocks makes four vectors
// of neighbouring normal numbers; divergences are summed by lanes within a segment of a row, and over segments in double, in their order.
#include "../common/log.h"
#include "../common/philox.h"
#include "../conv/depthwise_cpu_pass.h"
#include "gaussian_cpu.h"

namespace pyops::sampling::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::put;
using conv::PYOPS_ISA::with_storage;
using cpu::Layout;
using cpu::Team;

// Two vectors of normal numbers of two of words. The angle is taken from the nearest quarter turn; sine and cosine are Cephes'.
inline void polar(vu first, vu second, vf& x, vf& y) {
  const vf radius = sqrt(-2.f * log(__builtin_convertvector(first, vf) * 0x1p-32f + 0x1p-33f));
  const vu quarter = (second + 0x20000000u) >> 30;
  const vf angle = __builtin_convertvector(bits<vi>(second - (quarter << 30)), vf) * 1.46291807926715968e-9f, square = angle * angle;
  vf s = square * -1.9515295891e-4f + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  const vf sin = s * square * angle + angle;
  vf c = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  const vf cos = c * (square * square) + (1.f - 0.5f * square);
  const vi odd = bits<vi>(quarter << 31) >> 31;  // all ones
  const vi a = bits<vi>(cos), b = bits<vi>(sin), exchanged = (a ^ b) & odd;
  x = radius * bits<vf>((a ^ exchanged) ^ bits<vi>((quarter + 1) << 30 & 0x80000000u));  // quarters 1 and 2
  y = radius * bits<vf>((b ^ exchanged) ^ bits<vi>(quarter << 30 & 0x80000000u));        // quarters 2 and 3
}

// e^x and e^x - 1; the second in two ways, since a large power of two swallows what a small one keeps.
inline void exponentials(vf x, vf& exp, vf& less_one) {
  vf n;
  const vf q = expm1_reduced(at_most(-at_most(-x, 104.f), 89.f), n);
  const vf low = n * 0.5f - 0.25f + 12582912.f - 12582912.f;  // two factors: 128 and subnormal powers have no float
  exp = (1.f + q) * power_of_two(low) * power_of_two(n - low);
  const vf small = power_of_two(at_most(-at_most(-n, 126.f), 3.f));
  less_one = n >= 3.f ? exp - 1.f : q * small + (small - 1.f);
}

template <class S>
struct GaussianPass {
  const Gaussian& p;
  const GaussianPlan plan;
  const Philox numbers;

  explicit GaussianPass(const Gaussian& params)
      : p(params), plan(plan_gaussian(p.N, p.D)), numbers(Philox::of(static_cast<uint64_t>(*p.seed))) {}

  // eps of columns column .. column + 4 * kF, a multiple of four.
  void normals(int64_t row, int64_t column, vf (&to)[4]) const {
    const vu zero{};
    vu w[4];
    numbers.words(counted(static_cast<uint32_t>(column / 4)), zero + static_cast<uint32_t>(row), zero, zero + kNormals, w);
    polar(w[0], w[1], to[0], to[1]), polar(w[2], w[3], to[2], to[3]);
    in_order(to);
  }

  // body(row, column, the place in results, how many columns are left) for every 4 * kF columns of a segment.
  template <class Body>
  void walk(int64_t unit, const Body& body) const {
    const int64_t row = unit / plan.segments, first = unit % plan.segments * plan.columns;
    const int64_t end = p.D - first < plan.columns ? p.D : first + plan.columns;
    for (int64_t i = first; i < end; i += 4 * kF) body(row, i, row * p.D + i, end - i);
  }

  double sample(int64_t unit) const {
    vf sums[4] = {};
    walk(unit, [&](int64_t row, int64_t column, int64_t at, int64_t left) {
      const S* mean = static_cast<const S*>(p.mean) + row * p.mean_row + column;
      const S* log_var = static_cast<const S*>(p.log_var) + row * p.log_var_row + column;
      vf eps[4];
      normals(row, column, eps);
      for (int v = 0; v < 4; ++v) {
        const int64_t lanes = left - v * kF;
        const vf m = get(mean + v * kF, lanes), l = get(log_var + v * kF, lanes);
        vf deviation, e;
        exponentials(l * 0.5f, deviation, e);
        put(static_cast<S*>(p.z) + at + v * kF, m + deviation * eps[v], lanes);
        sums[v] += m * m + (e * (e + 2.f) - l);  // zero in lanes that do not exist
      }
    });
    double total = 0.0;
    for (const vf& sum : sums)
      for (int i = 0; i < kF; ++i) total += sum[i];
    return 0.5 * total;
  }

  void gradient(int64_t unit) const {
    walk(unit, [&](int64_t row, int64_t column, int64_t at, int64_t left) {
      const S* mean = static_cast<const S*>(p.mean) + row * p.mean_row + column;
      const S* log_var = static_cast<const S*>(p.log_var) + row * p.log_var_row + column;
      const S* grad = p.grad ? static_cast<const S*>(p.grad) + row * p.grad_row + column : nullptr;
      const float share = p.grad_kl ? p.grad_kl[row] : 0.f;
      vf eps[4];
      if (grad) normals(row, column, eps);
      for (int v = 0; v < 4; ++v) {
        const int64_t lanes = left - v * kF;
        vf deviation, e, of_mean{}, of_log_var{};
        exponentials(get(log_var + v * kF, lanes) * 0.5f, deviation, e);
        if (grad) of_mean = get(grad + v * kF, lanes), of_log_var = of_mean * deviation * eps[v];
        if (p.grad_kl) of_mean += share * get(mean + v * kF, lanes), of_log_var += share * (e * (e + 2.f));
        put(static_cast<S*>(p.grad_mean) + at + v * kF, of_mean, lanes);
        put(static_cast<S*>(p.grad_log_var) + at + v * kF, 0.5f * of_log_var, lanes);
      }
    });
  }
};

template <class S>
struct Run {
  GaussianPass<S> pass;
  double* parts;  // [rows * segments]
};

// f(unit) for the member's run of `count` units.
template <class F>
inline void share(const Team& team, int64_t count, const F& f) {
  for (int64_t unit = count * team.rank / team.size; unit < count * (team.rank + 1) / team.size; ++unit) f(unit);
}

}  // namespace

void gaussian(const Gaussian& p) {
  if (p.N == 0) return;
  with_storage(p.dtype, [&](auto s) {
    using R = Run<decltype(s)>;
    R run{GaussianPass<decltype(s)>(p), nullptr};
    Layout size{nullptr};
    size.take<double>(p.N * run.pass.plan.segments);
    run.parts = static_cast<double*>(cpu::scratch(size.bytes));
    cpu::run_team(
        run.pass.plan.threads,
        [](const Team& team, void* at) {
          const R& r = *static_cast<const R*>(at);
          const int64_t segments = r.pass.plan.segments;
          share(team, r.pass.p.N * segments, [&](int64_t unit) { r.parts[unit] = r.pass.sample(unit); });
          team.sync();
          share(team, r.pass.p.N, [&](int64_t row) {
            double total = 0.0;
            for (int64_t i = 0; i < segments; ++i) total += r.parts[row * segments + i];
            r.pass.p.kl[row] = static_cast<float>(total);
          });
        },
        &run);
  });
}

void gaussian_gradient(const Gaussian& p) {
  if (p.N * p.D == 0) return;
  with_storage(p.dtype, [&](auto s) {
    using Pass = GaussianPass<decltype(s)>;
    Pass pass(p);
    cpu::run_team(
        pass.plan.threads,
        [](const Team& team, void* at) {
          const Pass& r = *static_cast<const Pass*>(at);
          share(team, r.p.N * r.plan.segments, [&](int64_t unit) { r.gradient(unit); });
        },
        &pass);
  });
}

}  // namespace pyops::sampling::PYOPS_ISA
