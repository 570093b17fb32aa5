// Batch norm, activation and pooling on the CPU (pool.h says what they compute), compiled once per instruction set.
//
// A row of the output (or of the input, for its gradient) at a time, in stages over an L1 buffer: pooled values, then the activation, then
// stores. A maximum of a rising activation is the activation of the maximum, so that each output is activated once.
// Sums: a channel's lane adds at most kRun windows in float, then goes on in double; chunks of rows are added in order.
// Floors: the image read once for 2x2/2 (its rows meet twice in L1 for 3x3/2), outputs written once, over memory bandwidth.
#include "depthwise_cpu_pass.h"
#include "pool_cpu.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int64_t kRun = 32;  // windows

// NaN where either is, as torch's pooling has it; of equal values the first.
inline auto beats(vf a, vf b) { return (a > b) | (a != a); }

bool rises(Activation activation, float slope) {
  switch (activation) {
    case Activation::silu:
    case Activation::hardswish:
    case Activation::gelu: return false;
    case Activation::leaky_relu: return slope >= 0.f;
    default: return true;
  }
}

template <class S>
struct PoolPass {
  const Pooling& p;
  const PoolPlan plan;
  const int64_t vectors, row_values;  // padded vectors of channels; values of a row of them
  double* chunk_sums = nullptr;       // [chunks][2][C]
  float* rows = nullptr;              // a row for each member
  void (*work)(const PoolPass&, const Team&);

  PoolPass(const Pooling& params, int64_t row_count, int64_t width, void (*w)(const PoolPass&, const Team&))
      : p(params),
        plan(plan_pool(row_count, width * params.C)),
        vectors((params.C + kF - 1) / kF),
        row_values(width * vectors * kF),
        work(w) {}

  struct Affine {
    vf mean, scale, bias;
    vf operator()(vf x) const { return (x - mean) * scale + bias; }
  };
  Affine affine(int64_t c) const {
    if (!p.affine) return {vf{}, vf{} + 1.f, vf{}};
    const int64_t left = p.C - c;
    return {get(p.affine + c, left), get(p.affine + p.C + c, left), get(p.affine + 2 * p.C + c, left)};
  }
  static vi places(const uint8_t* from, int64_t count) {
    typedef uint8_t Bytes __attribute__((vector_size(kF)));
    Bytes bytes{};
    __builtin_memcpy(&bytes, from, count < kF ? count : kF);
    return __builtin_convertvector(bytes, vi);
  }
  static void put_places(uint8_t* to, vi v, int64_t count) {
    typedef uint8_t Bytes __attribute__((vector_size(kF)));
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    __builtin_memcpy(to, &bytes, count < kF ? count : kF);
  }

  // A window's taps inside the image.
  struct Window {
    int64_t y, x;  // of the first tap, perhaps outside
    int ky0, ky1, kx0, kx1;
  };
  Window window(int64_t oy, int64_t ox) const {
    const auto cut = [](int64_t at, int64_t size, int kernel, int& first, int& last) {
      first = at < 0 ? static_cast<int>(-at) : 0;
      last = at + kernel > size ? static_cast<int>(size - at) : kernel;
    };
    Window w{oy * p.stride[0] - p.padding[0], ox * p.stride[1] - p.padding[1], 0, 0, 0, 0};
    cut(w.y, p.H, p.kernel[0], w.ky0, w.ky1), cut(w.x, p.W, p.kernel[1], w.kx0, w.kx1);
    return w;
  }
  // f(tap, the stored vector) for a window's taps.
  template <class F>
  void taps(const Window& w, int64_t n, int64_t c, const F& f) const {
    const S* from = static_cast<const S*>(p.input) + ((n * p.H + w.y + w.ky0) * p.W + w.x + w.kx0) * p.C + c;
    const int64_t left = p.C - c;
    for (int ky = w.ky0; ky < w.ky1; ++ky, from += p.W * p.C) {
      const S* at = from;
      const int first = ky * p.kernel[1];
      if (left >= kF) {
        for (int kx = w.kx0; kx < w.kx1; ++kx, at += p.C) f(first + kx, load_as(at, float{}));
      } else {
        for (int kx = w.kx0; kx < w.kx1; ++kx, at += p.C) f(first + kx, load_part(at, static_cast<int>(left)));
      }
    }
  }
  float share() const { return 1.f / static_cast<float>(p.kernel[0] * p.kernel[1]); }

  // -------------------------------------------------------------------------------------------------------------- the ops

  // A row of windows, position by position: what a window holds lies in L1 for all its channels.
  template <Activation kWithin, bool kAffine, bool kIndex>
  void pool_row(int64_t n, int64_t oy, float* row) const {
    const float each = share();
    for (int64_t ox = 0; ox < p.OW; ++ox) {
      const Window w = window(oy, ox);
      const int64_t out = ((n * p.OH + oy) * p.OW + ox) * p.C;
      for (int64_t c = 0; c < p.C; c += kF) {
        [[maybe_unused]] const Affine z = kAffine ? affine(c) : Affine{};
        const auto value = [&](vf x) {
          if constexpr (kAffine) x = z(x);
          return activate<kWithin>(x, p.slope);
        };
        float* const to = row + ox * vectors * kF + c;
        if (!p.maximum) {
          vf sum{};
          taps(w, n, c, [&](int, vf x) { sum += value(x); });
          store(to, sum * each);
          continue;
        }
        vf best = vf{} - __builtin_inff();
        [[maybe_unused]] vi place = vi{} + w.ky0 * p.kernel[1] + w.kx0;  // where nothing is above -inf, the first
        taps(w, n, c, [&]([[maybe_unused]] int tap, vf x) {
          const vf a = value(x);
          const auto more = beats(a, best);
          best = more ? a : best;
          if constexpr (kIndex) place = more ? vi{} + tap : place;
        });
        store(to, best);
        if constexpr (kIndex) put_places(p.index_out + out + c, place, p.C - c);
      }
    }
  }
  template <Activation kWithin>
  void pool_row(int64_t n, int64_t oy, float* row) const {
    if (p.index_out) p.affine ? pool_row<kWithin, true, true>(n, oy, row) : pool_row<kWithin, false, true>(n, oy, row);
    else p.affine ? pool_row<kWithin, true, false>(n, oy, row) : pool_row<kWithin, false, false>(n, oy, row);
  }
  void pool(int64_t at, float* row) const {
    const int64_t n = at / p.OH, oy = at % p.OH;
    const bool after = p.maximum && rises(p.activation, p.slope);
    with_activation(after ? Activation::none : p.activation, [&](auto a) { this->template pool_row<decltype(a)::value>(n, oy, row); });
    S* const out = static_cast<S*>(p.output) + at * p.OW * p.C;
    with_activation(after ? p.activation : Activation::none, [&](auto a) {
      for (int64_t ox = 0; ox < p.OW; ++ox)
        for (int64_t c = 0; c < p.C; c += kF)
          put(out + ox * p.C + c, activate<decltype(a)::value>(load(row + ox * vectors * kF + c), p.slope), p.C - c);
    });
  }

  // Sums of dz and dz * (x - mean) over a row of windows.
  void reduce(int64_t at, float* lanes, double* sums) const {
    const int64_t n = at / p.OH, oy = at % p.OH, padded = vectors * kF;
    const float each = share();
    const auto flush = [&] {
      for (int64_t c = 0; c < p.C; ++c) sums[c] += lanes[c], sums[p.C + c] += lanes[padded + c];
      for (int64_t i = 0; i < 2 * padded; ++i) lanes[i] = 0.f;
    };
    for (int64_t i = 0; i < 2 * padded; ++i) lanes[i] = 0.f;
    with_activation(p.activation, [&](auto act) {
      constexpr Activation A = decltype(act)::value;
      for (int64_t ox = 0; ox < p.OW; ++ox) {
        const Window w = window(oy, ox);
        for (int64_t c = 0; c < p.C; c += kF) {
          const Affine z = affine(c);
          const int64_t left = p.C - c, out = (at * p.OW + ox) * p.C + c;
          const vf g = get(static_cast<const S*>(p.grad) + out, left) * (p.index ? 1.f : each);
          vf dz = load(lanes + c), squares = load(lanes + padded + c);
          const auto add = [&](vf x) {
            const vf d = activation_gradient<A>(z(x), g, p.slope);
            dz += d, squares += d * (x - z.mean);
          };
          if (p.index) {
            const vi place = places(p.index + out, left);
            vf chosen{};
            taps(w, n, c, [&](int tap, vf x) { chosen = place == tap ? x : chosen; });
            add(chosen);
          } else {
            taps(w, n, c, [&](int, vf x) { add(x); });
          }
          store(lanes + c, dz), store(lanes + padded + c, squares);
        }
        if (ox % kRun == kRun - 1 || ox + 1 == p.OW) flush();
      }
    });
  }

  // A row of the input's gradient: what its windows send to each position, then through the activation and batch norm.
  void gather(int64_t n, int64_t y, float* row) const {
    for (int64_t i = 0; i < p.W * vectors * kF; ++i) row[i] = 0.f;
    const int64_t last = (y + p.padding[0]) / p.stride[0] + 1, before = y + p.padding[0] - p.kernel[0];
    for (int64_t oy = before < 0 ? 0 : before / p.stride[0] + 1; oy < last && oy < p.OH; ++oy) {
      const int ky = static_cast<int>(y + p.padding[0] - oy * p.stride[0]);
      for (int64_t ox = 0; ox < p.OW; ++ox) {
        const Window w = window(oy, ox);
        const int64_t out = ((n * p.OH + oy) * p.OW + ox) * p.C;
        for (int64_t c = 0; c < p.C; c += kF) {
          const vf g = get(static_cast<const S*>(p.grad) + out + c, p.C - c);
          const vi place = p.index ? places(p.index + out + c, p.C - c) : vi{};
          for (int kx = w.kx0; kx < w.kx1; ++kx) {
            float* const to = row + (w.x + kx) * vectors * kF + c;
            store(to, load(to) + (!p.index ? g * share() : place == ky * p.kernel[1] + kx ? g : vf{}));
          }
        }
      }
    }
  }
  void gradient(int64_t at, float* row) const {
    gather(at / p.H, at % p.H, row);
    const S* const input = static_cast<const S*>(p.input) + at * p.W * p.C;
    S* const out = static_cast<S*>(p.output) + at * p.W * p.C;
    with_activation(p.activation, [&](auto act) {
      for (int64_t x = 0; x < p.W; ++x)
        for (int64_t c = 0; c < p.C; c += kF) {
          const Affine z = affine(c);
          const int64_t left = p.C - c;
          const vf terms0 = p.terms ? get(p.terms + c, left) : vf{}, terms1 = p.terms ? get(p.terms + p.C + c, left) : vf{};
          const vf value = get(input + x * p.C + c, left);
          const vf dz = activation_gradient<decltype(act)::value>(z(value), load(row + x * vectors * kF + c), p.slope);
          put(out + x * p.C + c, dz * z.scale - terms0 - (value - z.mean) * terms1, left);
        }
    });
  }

  // ------------------------------------------------------------------------------------------------------------------ run

  void run(int64_t sum_doubles) {
    Layout size{nullptr};
    lay_out(size, sum_doubles);
    Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
    lay_out(at, sum_doubles);
    cpu::run_team(
        plan.threads,
        [](const Team& team, void* pass) {
          const auto& self = *static_cast<const PoolPass*>(pass);
          self.work(self, team);
        },
        this);
  }
  void lay_out(Layout& at, int64_t sum_doubles) {
    chunk_sums = at.take<double>(sum_doubles);
    rows = at.take<float>(plan.threads * row_values);
  }
  // f(row, chunk) for the rows of a member's chunks.
  template <class F>
  void each_row(const Team& team, const F& f) const {
    for (int64_t chunk = plan.chunks * team.rank / team.size; chunk < plan.chunks * (team.rank + 1) / team.size; ++chunk)
      for (int64_t row = plan.rows * chunk / plan.chunks; row < plan.rows * (chunk + 1) / plan.chunks; ++row) f(row, chunk);
  }
};

}  // namespace

void pool_run(const Pooling& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = PoolPass<decltype(s)>;
    Pass pass(p, p.N * p.OH, p.OW, [](const Pass& self, const Team& team) {
      self.each_row(team, [&](int64_t row, int64_t) { self.pool(row, self.rows + team.rank * self.row_values); });
    });
    pass.run(0);
  });
}

void pool_reduce(const Pooling& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = PoolPass<decltype(s)>;
    Pass pass(p, p.N * p.OH, p.OW + 1, [](const Pass& self, const Team& team) {  // two rows of sums fit in a row of two or more
      const int64_t doubles = 2 * self.p.C, chunks = self.plan.chunks;
      for (int64_t chunk = chunks * team.rank / team.size; chunk < chunks * (team.rank + 1) / team.size; ++chunk)
        for (int64_t i = 0; i < doubles; ++i) self.chunk_sums[chunk * doubles + i] = 0.0;
      self.each_row(team, [&](int64_t row, int64_t chunk) {
        self.reduce(row, self.rows + team.rank * self.row_values, self.chunk_sums + chunk * doubles);
      });
      team.sync();
      for (int64_t i = doubles * team.rank / team.size; i < doubles * (team.rank + 1) / team.size; ++i) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += self.chunk_sums[chunk * doubles + i];
        self.p.sums[i] = static_cast<float>(sum);
      }
    });
    pass.run(pass.plan.chunks * 2 * p.C);
  });
}

void pool_gradient(const Pooling& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = PoolPass<decltype(s)>;
    Pass pass(p, p.N * p.H, p.W, [](const Pass& self, const Team& team) {
      self.each_row(team, [&](int64_t row, int64_t) { self.gradient(row, self.rows + team.rank * self.row_values); });
    });
    pass.run(0);
  });
}

}  // namespace pyops::conv::PYOPS_ISA
