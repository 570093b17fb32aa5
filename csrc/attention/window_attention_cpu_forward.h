// Window attention's forward pass on the CPU. A unit is a block of 64 queries of a window and head; a member takes a run of them, and
// packs keys and values once for all blocks: products [key][query] = k q^T from the queries' panel, softmax down the columns, and
// p^T v read across, from L1 where N is small. Results go straight to the map.
#pragma once
#include "window_attention_cpu_pass.h"

namespace pyops::attention::PYOPS_ISA {
namespace {

template <class S>
struct WindowForward : WindowPass<S> {
  using Base = WindowPass<S>;
  using E = typename Base::E;
  using Base::blocks, Base::C, Base::kPairs, Base::lanes, Base::ld, Base::N, Base::p, Base::wide;

  struct Member {
    Tokens tokens;
    const S** rows;                                      // [max(N, 64)]
    float *keys, *values, *key_factors;                  // [N][ld], [lanes of N][wide], [N]
    float *queries, *scores, *pairs, *own;               // [lanes][64], [N][64], [N/2][64], [N][64]
    float *query_norms, *query_factors, *lse, *inverse;  // [64]
    float* out;                                          // [64][wide]
  };

  explicit WindowForward(const WindowAttention& params) : Base(params) {}

  void lay_out(Layout& to, Member& me) const {
    me.tokens.lay_out(to, N);
    me.rows = to.take<const S*>(N > kPanel ? N : kPanel);
    me.keys = to.take<float>(N * ld), me.values = to.take<float>(lanes_of<E>(N) * wide), me.key_factors = to.take<float>(N);
    me.queries = to.take<float>(lanes * kPanel);
    me.query_norms = to.take<float>(kPanel), me.query_factors = to.take<float>(kPanel);
    me.scores = to.take<float>(N * kPanel), me.pairs = to.take<float>(kPairs ? lanes_of<E>(N) * kPanel : 0);
    me.own = to.take<float>(this->has_dense() ? 0 : N * kPanel);
    me.lse = to.take<float>(kPanel), me.inverse = to.take<float>(kPanel), me.out = to.take<float>(kPanel * wide);
  }
  void run() {
    const int64_t units = p.windows() * p.heads * blocks;
    if (units) run_pass(*this, window_threads(p, units));
  }

  void run(const Team& team, Member& me) const {
    const int64_t units = p.windows() * p.heads * blocks;
    int64_t packed = -1;
    team.deal(units, [&](int64_t unit) {
      const int64_t block = unit % blocks, pair = unit / blocks, head = pair % p.heads;
      if (pair != packed) {
        me.tokens.find(p, pair / p.heads);
        pack(me, head), packed = pair;
      }
      const bool ahead = block + 1 == blocks && unit + 1 < units;
      if (ahead) me.tokens.next.find(p, (pair + 1) / p.heads);
      attend(me, head, block, ahead ? (pair + 1) % p.heads : -1);
    });
  }

  void pack(const Member& me, int64_t head) const {
    this->rows(me.tokens, 1, head, 0, N, me.rows);
    for (int64_t u = 0; u < N; ++u) pack_row<E>(me.rows[u], p.D, me.keys + u * ld);
    if (p.logit_scale) this->inverse_norms(me.rows, N, me.key_factors);
    this->rows(me.tokens, 2, head, 0, N, me.rows);
    pack_straight<E>(me.rows, N, p.D, me.values);
  }

  // next: the head of the next unit, whose rows are fetched meanwhile; -1: none
  void attend(const Member& me, int64_t head, int64_t block, int64_t next) const {
    const int64_t first = block * kPanel, count = this->queries(block), columns = round_up(count, kUnit);
    this->rows(me.tokens, 0, head, first, count, me.rows);
    pack_transposed<E>(me.rows, count, p.D, me.queries);
    this->query_factors(me.rows, count, head, me.query_norms, me.query_factors);
    const auto fetch = [&](int64_t part) __attribute__((always_inline)) {
      if (next >= 0) this->fetch(me.tokens.next, p.qkv, 3 * C, part * C + next * p.D);
    };
    fetch(1);
    multiply<E>(N, columns / kF, me.keys, ld, 1, me.queries, kPanel, lanes, me.scores, kPanel, false);
    fetch(2);
    const auto scores = this->scores(me.tokens, head, block, me.scores, me.query_factors, me.key_factors, me.own);
    with_flags(p.logit_scale, me.tokens.apart, [&](auto cosine, auto masked) {
      for (int64_t v = 0; v < columns; v += kF) softmax<decltype(cosine)::value, decltype(masked)::value>(me, scores, head, first, v);
    });
    fetch(0);
    const int64_t sums = lanes_of<E>(N);
    multiply<E>(count, wide / kF, kPairs ? me.pairs : me.scores, 1, kPanel, me.values, wide, sums, me.out, wide, false);
    __builtin_memcpy(p.lse + (me.tokens.window * p.heads + head) * N + first, me.lse, count * sizeof(float));
    for (int64_t t = 0; t < count; ++t) {
      if (me.tokens.at[first + t] < 0) continue;
      S* to = static_cast<S*>(p.output) + me.tokens.at[first + t] * C + head * p.D;
      for (int64_t d = 0; d < p.D; d += kF) store_upto(to + d, load(me.out + t * wide + d) * me.inverse[t], p.D - d);
    }
  }

  // A vector of queries: weights that have yet to be divided by their sum.
  template <bool Cosine, bool Masked>
  void softmax(const Member& me, const typename Base::Scores& scores, int64_t head, int64_t first, int64_t v) const {
    float* const at = me.scores + v;
    vf most = vf{} - __builtin_inff(), sum{};
    for (int64_t u = 0; u < N; ++u) {
      const vf s = scores.template at<Cosine, Masked>(u, v);
      store(at + u * kPanel, s);
      most = larger(s, most);
    }
    by_fours(N, [&](int64_t u, auto count) {
      constexpr int R = decltype(count)::value;
      vf weights[4] = {};
      for (int r = 0; r < R; ++r) sum += weights[r] = exp_weight(load(at + (u + r) * kPanel) - most);
      if (p.threshold) {
        vf keep[4];
        keep_four(this->dropout, me.tokens.window, head, first + v, u, keep);
        for (int r = 0; r < R; ++r) weights[r] *= keep[r];
      }
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        for (int r = 0; r < R; r += 2) store(me.pairs + (u + r) / 2 * kPanel + v, pair_lanes(weights[r], weights[r + 1]));
        return;
      }
#endif
      for (int r = 0; r < R; ++r) store(at + (u + r) * kPanel, weights[r]);
    });
    store(me.lse + v, most + log(sum));
    store(me.inverse + v, 1.f / sum);
  }
};

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
