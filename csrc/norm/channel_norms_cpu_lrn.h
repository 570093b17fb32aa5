// Local response normalisation on the CPU. Window sums are added anew for every channel, in the channels' order.
//
// Rows: a few positions at a time in L1, [position][before + C + after] squares with zeros where no channel is; a window is `size`
// unaligned loads. Planes: a block of positions walks through the channels over rings of rows, the last `window` of squares (and of
// shares and quotients in the gradient), so that each channel is read in one run.
#pragma once
#include "channel_norms_cpu_pass.h"

namespace pyops::norm::PYOPS_ISA {
namespace {

// d^beta. The common exponents by roots: one is a few cycles, a logarithm and an exponential twenty.
enum class Power { three_quarters, half, one, general };
template <Power K>
inline vf raised(vf d, [[maybe_unused]] float beta) {
  if constexpr (K == Power::three_quarters) {
    const vf root = cpu::PYOPS_ISA::sqrt(d);
    return root * cpu::PYOPS_ISA::sqrt(root);
  } else if constexpr (K == Power::half) {
    return cpu::PYOPS_ISA::sqrt(d);
  } else if constexpr (K == Power::one) {
    return d;
  } else {
    return power(d, beta);
  }
}
template <Power K>
struct PowerTag {
  static constexpr Power value = K;
};
template <class F>
inline void with_power(float beta, const F& f) {
  if (beta == 0.75f) f(PowerTag<Power::three_quarters>{});
  else if (beta == 0.5f) f(PowerTag<Power::half>{});
  else if (beta == 1.f) f(PowerTag<Power::one>{});
  else f(PowerTag<Power::general>{});
}

// A ring of rows of `width` floats.
struct Ring {
  float* data;
  int64_t slots, width;
  float* row(int64_t channel) const { return data + channel % slots * width; }
  // The sum of all slots at lane i, from that of `oldest` on.
  vf sum(int64_t oldest, int64_t i) const {
    const int64_t first = oldest % slots;
    vf s = load(data + first * width + i);
    for (int64_t r = first + 1; r < slots; ++r) s += load(data + r * width + i);
    for (int64_t r = 0; r < first; ++r) s += load(data + r * width + i);
    return s;
  }
};
inline void clear(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

template <class S, Power K>
struct LrnPass {
  const LocalResponse& p;
  const bool gradient;
  const int64_t before, after, window;  // of channels that may exist
  const float factor, lowest;
  const vi gated;  // lanes of all ones with relu

  LrnPass(const LocalResponse& params, bool backward)
      : p(params),
        gradient(backward),
        before(p.size / 2 < p.C ? p.size / 2 : p.C - 1),
        after((p.size - 1) / 2 < p.C ? (p.size - 1) / 2 : p.C - 1),
        window(before + after + 1),
        factor(p.alpha / static_cast<float>(p.size)),
        lowest(p.relu ? 0.f : -__builtin_inff()),
        gated(vi{} - p.relu) {}

  const S* input(int64_t at) const { return static_cast<const S*>(p.input) + at; }
  const S* grad(int64_t at) const { return static_cast<const S*>(p.grad) + at; }
  S* output(int64_t at) const { return static_cast<S*>(p.output) + at; }
  vf activated(vf x) const { return x < lowest ? vf{} + lowest : x; }  // keeps NaN
  vf base(vf squares) const { return squares * factor + p.k; }
  vf input_gradient(vf x, vf quotient, vf shares) const {
    const vf dx = quotient - activated(x) * shares * (2.f * p.beta * factor);
    return bits<vf>(bits<vi>(dx) & ~((x <= 0.f) & gated));
  }

  void run() const {
    if (p.rows) return run_rows();
    // rings in half of a 32 KiB L1
    const int64_t rings = gradient ? 2 * window + before + 1 : window, most = 4096 / rings / kF * kF;
    const NormPlan plan = plan_norm(p.N, p.P, p.C, false, most < kF ? kF : most < 128 ? most : 128, kF, 0);
    run_chunks(
        plan, rings * plan.block, 0, nullptr, [](float*) {},
        [&](float* scratch, double*, int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit) gradient ? plane_gradient(scratch, plan, unit) : plane(scratch, plan, unit);
        });
  }

  // ------------------------------------------------------------------------------------------------------------- planes

  void square_row(const Ring& squares, const Block& block, int64_t c) const {
    float* to = squares.row(c);
    if (c >= p.C) return clear(to, squares.width);
    const S* x = input(block.at + c * p.P);
    for (int64_t i = 0; i < block.count; i += kF) {
      const vf a = activated(get(x + i, block.count - i));
      store(to + i, a * a);
    }
  }
  void plane(float* scratch, const NormPlan& plan, int64_t unit) const {
    const Block block(plan, unit, p.P, p.C);
    const Ring squares{scratch, window, plan.block};
    clear(scratch, window * plan.block);
    for (int64_t c = 0; c < p.C + after; ++c) {
      square_row(squares, block, c);
      if (c < after) continue;
      const int64_t at = block.at + (c - after) * p.P;
      for (int64_t i = 0; i < block.count; i += kF) {
        const int64_t lanes = block.count - i;
        put(output(at + i), activated(get(input(at + i), lanes)) / raised<K>(base(squares.sum(c + 1, i)), p.beta), lanes);
      }
    }
  }
  void plane_gradient(float* scratch, const NormPlan& plan, int64_t unit) const {
    const Block block(plan, unit, p.P, p.C);
    const Ring squares{scratch, window, plan.block}, shares{scratch + window * plan.block, window, plan.block};
    const Ring quotients{scratch + 2 * window * plan.block, before + 1, plan.block};
    clear(scratch, 2 * window * plan.block);
    for (int64_t c = 0; c < p.C + after + before; ++c) {
      if (c < p.C + after) square_row(squares, block, c);
      const int64_t read = c - after, done = read - before;  // the channel whose base is known, and the one whose shares are
      if (read >= p.C) clear(shares.row(read), plan.block);
      else if (read >= 0)
        for (int64_t i = 0; i < block.count; i += kF) {
          const int64_t at = block.at + read * p.P + i, lanes = block.count - i;
          const vf d = base(squares.sum(c + 1, i)), quotient = get(grad(at), lanes) / raised<K>(d, p.beta);
          store(quotients.row(read) + i, quotient);
          store(shares.row(read) + i, quotient * activated(get(input(at), lanes)) / d);
        }
      if (done < 0) continue;
      for (int64_t i = 0; i < block.count; i += kF) {
        const int64_t at = block.at + done * p.P + i, lanes = block.count - i;
        put(output(at), input_gradient(get(input(at), lanes), load(quotients.row(done) + i), shares.sum(read + 1, i)), lanes);
      }
    }
  }

  // --------------------------------------------------------------------------------------------------------------- rows

  static vf window_sum(const float* from, int64_t window) {
    vf s = load(from);
    for (int64_t j = 1; j < window; ++j) s += load(from + j);
    return s;
  }
  void run_rows() const {
    constexpr int64_t kTogether = 8;  // positions: what is loaded across two stores has long left the store buffer
    const int64_t wide = padded(window - 1 + padded(p.C));
    run_chunks(
        plan_norm(p.N, p.P, p.C, true, 1, kF, 0), kTogether * wide * (gradient ? 3 : 1), 0, nullptr,
        [&](float* scratch) { clear(scratch, kTogether * wide * (gradient ? 3 : 1)); },
        [&](float* scratch, double*, int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; r += kTogether) {
            const int64_t rows = end - r < kTogether ? end - r : kTogether;
            for (int64_t k = 0; k < rows; ++k) {
              const S* x = input((r + k) * p.C);
              for (int64_t i = 0; i < p.C; i += kF) {
                const vf a = activated(get(x + i, p.C - i));
                store(scratch + k * wide + before + i, a * a);
              }
            }
            if (!gradient)
              for (int64_t k = 0; k < rows; ++k) row(scratch + k * wide, (r + k) * p.C);
            else rows_gradient(scratch, wide, kTogether, r, rows);
          }
        });
  }
  void row(const float* squares, int64_t at) const {
    for (int64_t i = 0; i < p.C; i += kF) {
      const vf a = activated(get(input(at + i), p.C - i));
      put(output(at + i), a / raised<K>(base(window_sum(squares + i, window)), p.beta), p.C - i);
    }
  }
  void rows_gradient(float* scratch, int64_t wide, int64_t together, int64_t r, int64_t rows) const {
    float *shares = scratch + together * wide, *quotients = shares + together * wide;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t at = (r + k) * p.C;
      for (int64_t i = 0; i < p.C; i += kF) {
        const vf d = base(window_sum(scratch + k * wide + i, window)), quotient = get(grad(at + i), p.C - i) / raised<K>(d, p.beta);
        store(quotients + k * wide + i, quotient);
        store(shares + k * wide + after + i, quotient * activated(get(input(at + i), p.C - i)) / d);
      }
      for (int64_t i = p.C; i < padded(p.C); ++i) shares[k * wide + after + i] = 0.f;  // may be NaN: 0 / 0
    }
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t at = (r + k) * p.C;
      for (int64_t i = 0; i < p.C; i += kF) {
        const vf sums = window_sum(shares + k * wide + i, window), x = get(input(at + i), p.C - i);
        put(output(at + i), input_gradient(x, load(quotients + k * wide + i), sums), p.C - i);
      }
    }
  }
};

}  // namespace
}  // namespace pyops::norm::PYOPS_ISA
