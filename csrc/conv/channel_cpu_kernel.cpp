// Channelwise ops on the CPU (channel.h says what they compute), compiled once per instruction set.
//
// A row is `group` positions, so that a few channels still make long loops; vectors are repeated to that length. Every op walks rows in
// stages over L1 buffers: u, the activation or its gradient, then its own sums or stores.
// Sums: a lane adds at most kRun rows in float, then its channel's sums of the chunk go on in double; chunks are added in order.
// Floors: bytes of the images over memory bandwidth; the activation, 12 to 25 cycles for 16 values, hides behind them from DRAM.
#include "channel_cpu.h"
#include "depthwise_cpu_pass.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int64_t kRun = 32;  // rows

struct Vectors {  // of one image, repeated over a row; null where there is none
  const float *mean, *scale, *bias, *gate, *offset, *terms0, *terms1;
};

template <class S>
struct ChannelPass {
  const Channelwise& p;
  const ChannelPlan plan;
  const int64_t width, padded;
  double* chunk_sums = nullptr;  // [chunks or items][2][C]
  char* members = nullptr;
  size_t member_bytes = 0;
  void (*work)(const ChannelPass&, const Team&);

  struct Member {
    float *affine, *gates, *terms;  // [3], [2], [2] rows
    float *u, *g, *sums;            // a row, a row, two rows
    const float* gated = nullptr;   // the image whose gates are in place
  };

  ChannelPass(const Channelwise& params, void (*w)(const ChannelPass&, const Team&))
      : p(params), plan(plan_channels(p.N, p.P, p.C)), width(plan.group * p.C), padded((width + kF - 1) / kF * kF), work(w) {}

  Member member(Layout& to) const {
    Member m;
    m.affine = to.take<float>(3 * padded), m.gates = to.take<float>(2 * padded), m.terms = to.take<float>(2 * padded);
    m.u = to.take<float>(padded), m.g = to.take<float>(padded), m.sums = to.take<float>(2 * padded);
    return m;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    Member m = member(to);
    for (int i = 0; i < 3 && p.affine; ++i) repeat(p.affine + i * p.C, m.affine + i * padded);
    for (int i = 0; i < 2 && p.terms; ++i) repeat(p.terms + i * p.C, m.terms + i * padded);
    return m;
  }
  void repeat(const float* from, float* to) const {
    for (int64_t r = 0; r < plan.group; ++r) __builtin_memcpy(to + r * p.C, from, p.C * sizeof(float));
    for (int64_t i = width; i < padded; ++i) to[i] = 0.f;
  }
  Vectors vectors(const Member& me, int64_t n) const {
    Vectors v{};
    if (p.affine) v.mean = me.affine, v.scale = me.affine + padded, v.bias = me.affine + 2 * padded;
    if (p.terms) v.terms0 = me.terms, v.terms1 = me.terms + padded;
    if (p.gate) repeat(p.gate + n * p.C, me.gates), v.gate = me.gates;
    if (p.offset) repeat(p.offset + n * p.C, me.gates + padded), v.offset = me.gates + padded;
    return v;
  }

  int64_t chunk_begin(int64_t of, int64_t chunk) const { return of * chunk / plan.chunks; }

  // f(image, first value, values) for every row of a band; `flush()` after every kRun of them and at the end.
  template <class Row, class Flush>
  void band_rows(int64_t item, const Row& row, const Flush& flush) const {
    const int64_t n = item / plan.bands, band = item % plan.bands;
    const int64_t p0 = p.P * band / plan.bands, p1 = p.P * (band + 1) / plan.bands;
    int64_t run = 0;
    for (int64_t at = p0; at < p1; at += plan.group) {
      const int64_t positions = p1 - at < plan.group ? p1 - at : plan.group;
      row((n * p.P + at) * p.C, positions * p.C);
      if (++run == kRun) flush(), run = 0;
    }
    if (run) flush();
  }
  // Sums of a row's lanes into their channels', and zero again.
  void flush(float* sums, double* to) const {
    for (int64_t i = 0, c = 0; i < width; ++i, c = c + 1 == p.C ? 0 : c + 1) to[c] += sums[i], sums[i] = 0.f;
  }

  // -------------------------------------------------------------------------------------------------------------- stages

  void place(const Vectors& v, float keep, int64_t at, int64_t count, float* u) const {
    const S *x = static_cast<const S*>(p.input) + at, *residual = p.residual ? static_cast<const S*>(p.residual) + at : nullptr;
    for (int64_t i = 0; i < count; i += kF) {
      vf z = get(x + i, count - i);
      if (v.mean) z = (z - load(v.mean + i)) * load(v.scale + i) + load(v.bias + i);
      z *= keep;
      if (residual) z += get(residual + i, count - i);
      store(u + i, z);
    }
  }
  void activate_row(float* u, int64_t count) const {
    if (p.activation == Activation::none) return;
    with_activation(p.activation, [&](auto a) {
      for (int64_t i = 0; i < count; i += kF) store(u + i, activate<decltype(a)::value>(load(u + i), p.slope));
    });
  }
  // g = du for the incoming gradient
  void differentiate_row(const Vectors& v, int64_t at, int64_t count, const float* u, float* g) const {
    const S* grad = static_cast<const S*>(p.grad) + at;
    for (int64_t i = 0; i < count; i += kF) {
      vf value = get(grad + i, count - i);
      if (v.gate) value *= load(v.gate + i);
      if (v.offset) value += load(v.offset + i);
      store(g + i, value);
    }
    if (p.activation == Activation::none) return;
    with_activation(p.activation, [&](auto a) {
      for (int64_t i = 0; i < count; i += kF) store(g + i, activation_gradient<decltype(a)::value>(load(u + i), load(g + i), p.slope));
    });
  }
  float keep_of(int64_t n) const { return p.keep ? p.keep[n] : 1.f; }
  bool needs_u() const { return p.activation != Activation::none; }

  // ------------------------------------------------------------------------------------------------------------- the ops

  void apply(const Member& me, int64_t item) const {
    const int64_t n = item / plan.bands;
    const Vectors v = vectors(me, n);
    const float keep = keep_of(n);
    band_rows(
        item,
        [&](int64_t at, int64_t count) {
          place(v, keep, at, count, me.u);
          activate_row(me.u, count);
          S* out = static_cast<S*>(p.output) + at;
          for (int64_t i = 0; i < count; i += kF) {
            vf a = load(me.u + i);
            if (v.gate) a *= load(v.gate + i);
            if (v.offset) a += load(v.offset + i);
            put(out + i, a, count - i);
          }
        },
        [] {});
  }

  void totals(const Member& me, int64_t item, double* sums) const {
    const int64_t n = item / plan.bands;
    const Vectors v = vectors(me, n);
    const float keep = keep_of(n);
    band_rows(
        item,
        [&](int64_t at, int64_t count) {
          place(v, keep, at, count, me.u);
          activate_row(me.u, count);
          const S* grad = p.grad ? static_cast<const S*>(p.grad) + at : nullptr;
          for (int64_t i = 0; i < count; i += kF) {
            vf a = part(me.u + i, count - i);
            if (grad) a *= get(grad + i, count - i);
            store(me.sums + i, load(me.sums + i) + a);
          }
        },
        [&] { flush(me.sums, sums); });
  }

  void reduce(const Member& me, int64_t item, double* sums) const {
    const int64_t n = item / plan.bands;
    const Vectors v = vectors(me, n);
    const float keep = keep_of(n);
    band_rows(
        item,
        [&](int64_t at, int64_t count) {
          if (needs_u()) place(v, keep, at, count, me.u);
          differentiate_row(v, at, count, me.u, me.g);
          const S* x = static_cast<const S*>(p.input) + at;
          for (int64_t i = 0; i < count; i += kF) {
            const vf dz = part(me.g + i, count - i) * keep;
            store(me.sums + i, load(me.sums + i) + dz);
            store(me.sums + padded + i, load(me.sums + padded + i) + dz * (get(x + i, count - i) - load(v.mean + i)));
          }
        },
        [&] { flush(me.sums, sums), flush(me.sums + padded, sums + p.C); });
  }

  void gradient(const Member& me, int64_t item) const {
    const int64_t n = item / plan.bands;
    const Vectors v = vectors(me, n);
    const float keep = keep_of(n);
    band_rows(
        item,
        [&](int64_t at, int64_t count) {
          if (needs_u()) place(v, keep, at, count, me.u);
          differentiate_row(v, at, count, me.u, me.g);
          const S* x = static_cast<const S*>(p.input) + at;
          S *out = static_cast<S*>(p.output) + at, *du = p.grad_residual ? static_cast<S*>(p.grad_residual) + at : nullptr;
          for (int64_t i = 0; i < count; i += kF) {
            vf dx = load(me.g + i);
            if (du) put(du + i, dx, count - i);
            dx *= keep;
            if (v.scale) dx *= load(v.scale + i);
            if (v.terms0) dx -= load(v.terms0 + i) + (get(x + i, count - i) - load(v.mean + i)) * load(v.terms1 + i);
            put(out + i, dx, count - i);
          }
        },
        [] {});
  }
  // The first `count` lanes of a buffer, zeros behind them: what the last vector computed of no value must not be summed.
  static vf part(const float* from, int64_t count) { return count >= kF ? load(from) : load_part(from, static_cast<int>(count)); }

  // Mean and squared deviations of rows [r0, r1) of N*P positions, into state [3][C]: count (the same for all), mean, squares.
  void moments(const Member& me, int64_t r0, int64_t r1, double* state) const {
    double& count = state[0];
    const auto absorb = [&](int64_t rows, int64_t lanes, int64_t r) {
      const float inverse = 1.f / static_cast<float>(rows);
      const S* x = static_cast<const S*>(p.input) + r * p.C;
      for (int64_t i = 0; i < lanes; i += kF) {
        vf sum{}, squares{};
        for (int64_t k = 0; k < rows; ++k) sum += get(x + k * width + i, lanes - i);
        const vf mean = sum * inverse;
        for (int64_t k = 0; k < rows; ++k) {
          const vf d = get(x + k * width + i, lanes - i) - mean;
          squares += d * d;
        }
        store(me.u + i, mean), store(me.g + i, squares);
      }
      for (int64_t first = 0; first < lanes; first += p.C) {
        const double total = count + static_cast<double>(rows), weight = static_cast<double>(rows) / total;
        double *mean = state + p.C, *squares = state + 2 * p.C;
        for (int64_t c = 0; c < p.C; ++c) {
          const double d = me.u[first + c] - mean[c];
          mean[c] += d * weight, squares[c] += me.g[first + c] + d * d * count * weight;
        }
        count = total;
      }
    };
    int64_t r = r0;
    for (; r + plan.group <= r1;) {
      const int64_t rows = (r1 - r) / plan.group < kRun ? (r1 - r) / plan.group : kRun;
      absorb(rows, width, r);
      r += rows * plan.group;
    }
    if (r < r1) absorb(1, (r1 - r) * p.C, r);
  }

  // ---------------------------------------------------------------------------------------------------------------- run

  void run(int64_t sum_doubles) {
    Layout size{nullptr};
    lay_out(size, sum_doubles);
    Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
    lay_out(at, sum_doubles);
    cpu::run_team(
        plan.threads,
        [](const Team& team, void* pass) {
          const auto& self = *static_cast<const ChannelPass*>(pass);
          self.work(self, team);
        },
        this);
  }
  void lay_out(Layout& at, int64_t sum_doubles) {
    chunk_sums = at.take<double>(sum_doubles);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }
  // f(member, item, chunk) for the items of a member's chunks.
  template <class F>
  void items(const Team& team, const F& f) const {
    const Member me = member(team.rank);
    for (int64_t i = 0; i < padded * 2; ++i) me.sums[i] = 0.f;
    for (int64_t chunk = plan.chunks * team.rank / team.size; chunk < plan.chunks * (team.rank + 1) / team.size; ++chunk)
      for (int64_t item = chunk_begin(p.N * plan.bands, chunk); item < chunk_begin(p.N * plan.bands, chunk + 1); ++item) f(me, item, chunk);
  }
};

void zero_sums(double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0;
}

}  // namespace

void channel_moments(const Channelwise& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = ChannelPass<decltype(s)>;
    Pass pass(p, [](const Pass& self, const Team& team) {
      const Channelwise& p = self.p;
      const int64_t chunks = self.plan.chunks, rows = p.N * p.P;
      const auto me = self.member(team.rank);
      for (int64_t chunk = chunks * team.rank / team.size; chunk < chunks * (team.rank + 1) / team.size; ++chunk) {
        double* state = self.chunk_sums + chunk * 3 * p.C;
        zero_sums(state, 3 * p.C);
        self.moments(me, rows * chunk / chunks, rows * (chunk + 1) / chunks, state);
      }
      team.sync();
      for (int64_t c = p.C * team.rank / team.size; c < p.C * (team.rank + 1) / team.size; ++c) {
        double count = 0.0, mean = 0.0, squares = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const double *state = self.chunk_sums + chunk * 3 * p.C, total = count + state[0];
          if (state[0] == 0.0) continue;
          const double d = state[p.C + c] - mean;
          mean += d * state[0] / total, squares += state[2 * p.C + c] + d * d * count * state[0] / total, count = total;
        }
        p.sums[c] = static_cast<float>(mean), p.sums[p.C + c] = static_cast<float>(squares);
      }
    });
    pass.run(pass.plan.chunks * 3 * p.C);
  });
}

void channel_apply(const Channelwise& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = ChannelPass<decltype(s)>;
    Pass pass(p, [](const Pass& self, const Team& team) {
      self.items(team, [&](const auto& me, int64_t item, int64_t) { self.apply(me, item); });
    });
    pass.run(0);
  });
}

void channel_totals(const Channelwise& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = ChannelPass<decltype(s)>;
    Pass pass(p, [](const Pass& self, const Team& team) {
      const Channelwise& p = self.p;
      self.items(team, [&](const auto& me, int64_t item, int64_t) {
        zero_sums(self.chunk_sums + item * p.C, p.C);
        self.totals(me, item, self.chunk_sums + item * p.C);
      });
      team.sync();
      for (int64_t i = p.N * p.C * team.rank / team.size; i < p.N * p.C * (team.rank + 1) / team.size; ++i) {
        double sum = 0.0;
        for (int64_t band = 0; band < self.plan.bands; ++band) sum += self.chunk_sums[(i / p.C * self.plan.bands + band) * p.C + i % p.C];
        p.sums[i] = static_cast<float>(sum);
      }
    });
    pass.run(p.N * pass.plan.bands * p.C);
  });
}

void channel_reduce(const Channelwise& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = ChannelPass<decltype(s)>;
    Pass pass(p, [](const Pass& self, const Team& team) {
      const Channelwise& p = self.p;
      const int64_t chunks = self.plan.chunks;
      for (int64_t chunk = chunks * team.rank / team.size; chunk < chunks * (team.rank + 1) / team.size; ++chunk)
        zero_sums(self.chunk_sums + chunk * 2 * p.C, 2 * p.C);
      self.items(team, [&](const auto& me, int64_t item, int64_t chunk) { self.reduce(me, item, self.chunk_sums + chunk * 2 * p.C); });
      team.sync();
      for (int64_t i = 2 * p.C * team.rank / team.size; i < 2 * p.C * (team.rank + 1) / team.size; ++i) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += self.chunk_sums[chunk * 2 * p.C + i];
        p.sums[i] = static_cast<float>(sum);
      }
    });
    pass.run(pass.plan.chunks * 2 * p.C);
  });
}

void channel_gradient(const Channelwise& p) {
  with_storage(p.dtype, [&](auto s) {
    using Pass = ChannelPass<decltype(s)>;
    Pass pass(p, [](const Pass& self, const Team& team) {
      self.items(team, [&](const auto& me, int64_t item, int64_t) { self.gradient(me, item); });
    });
    pass.run(0);
  });
}

}  // namespace pyops::conv::PYOPS_ISA
