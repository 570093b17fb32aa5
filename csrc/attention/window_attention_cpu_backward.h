// Window attention's gradient on the CPU. A task is a chunk of windows in a group of heads. For each window and head k and v are packed
// once; then for each block of 64 queries, all of it [key][query] in L2:
//
//   products = k q^T, dw = v grad^T      from the panels of q and grad
//   p = exp(score - lse), delta, s = p * (dw * keep - delta), down the columns; s * scale replaces dw
//   grad v += w grad, grad k += s q      rows of w and s
//   grad q = s^T k                       s read across; stored at once, the others after the last block
//
// A task adds up s as it is, [key][query] for each head, folds it into rows of the table from time to time, and keeps its sums apart:
// [task's chunk][head]: table rows, k's and v's gradient beyond the map, logit_scale's. They are added in the chunks' order.
#pragma once
#include "window_attention_cpu_pass.h"

namespace pyops::attention::PYOPS_ISA {
namespace {

template <class S>
struct WindowBackward : WindowPass<S> {
  using Base = WindowPass<S>;
  using E = typename Base::E;
  using Base::blocks, Base::C, Base::kPairs, Base::lanes, Base::ld, Base::N, Base::p, Base::wide;
  static constexpr int64_t kFold = 32;  // windows whose s are added up in floats
  static constexpr int64_t kRow = kPanel / kPair<E>;

  struct Member {
    Tokens tokens;
    const S** rows;                                       // [max(N, 64)]
    float *keys, *values, *key_rows, *key_factors;        // [N][ld] twice, [lanes of N][wide], [N]
    float *queries, *grads, *query_rows, *grad_rows;      // [lanes][64] twice, [lanes of 64][wide] twice
    float *query_norms, *query_factors, *lse;             // [64]
    float *products, *weights, *dropped, *slopes, *own;   // [N][64]
    float *weight_rows, *slope_rows, *slope_pairs;        // pairs of [N][64], [N][64], [N/2][64]
    float *grad_queries, *grad_keys, *grad_values, *sum;  // [64][wide], [N][wide] twice, [group][blocks][N][64]
  };
  const WindowPlan plan;
  S* zeros;      // [D], the gradient of tokens beyond the map
  double* sums;  // [chunks][heads][numbers()]

  explicit WindowBackward(const WindowAttention& params)
      : Base(params), plan(plan_windows(params, blocks * this->block_floats() * static_cast<int64_t>(sizeof(float)))) {}

  int64_t entries() const { return p.grad_table ? p.entries() : 0; }
  int64_t numbers() const { return entries() + 2 * p.D + 1; }

  void lay_out_shared(Layout& to) {
    Base::lay_out_shared(to);
    zeros = to.take<S>(p.D), sums = to.take<double>(plan.chunks * p.heads * numbers());
  }
  void lay_out(Layout& to, Member& me) const {
    const int64_t square = N * kPanel, rows = lanes_of<E>(kPanel) * wide;
    me.tokens.lay_out(to, N);
    me.rows = to.take<const S*>(N > kPanel ? N : kPanel);
    me.keys = to.take<float>(N * ld), me.values = to.take<float>(N * ld), me.key_rows = to.take<float>(lanes_of<E>(N) * wide);
    me.queries = to.take<float>(lanes * kPanel), me.grads = to.take<float>(lanes * kPanel);
    me.query_rows = to.take<float>(rows), me.grad_rows = to.take<float>(rows);
    me.key_factors = to.take<float>(N), me.query_norms = to.take<float>(kPanel), me.query_factors = to.take<float>(kPanel),
    me.lse = to.take<float>(kPanel);
    me.products = to.take<float>(square), me.slopes = to.take<float>(square);
    me.weights = p.grad_logit_scale ? to.take<float>(square) : me.products;
    me.dropped = p.threshold && !kPairs ? to.take<float>(square) : me.weights;
    me.own = to.take<float>(this->has_dense() ? 0 : square);
    me.weight_rows = to.take<float>(kPairs ? N * kRow : 0), me.slope_rows = to.take<float>(kPairs ? N * kRow : 0);
    me.slope_pairs = to.take<float>(kPairs ? lanes_of<E>(N) * kPanel : 0);
    me.grad_queries = to.take<float>(kPanel * wide), me.grad_keys = to.take<float>(N * wide), me.grad_values = to.take<float>(N * wide);
    me.sum = to.take<float>(p.grad_table ? plan.group * blocks * square : 0);
  }
  void run() { run_pass(*this, plan.threads); }

  void prepare(const Team& team) const {
    if (team.rank == 0) __builtin_memset(zeros, 0, p.D * sizeof(S));
    Base::prepare(team);
  }

  void run(const Team& team, Member& me) const {
    const int64_t tasks = plan.chunks * plan.groups;
    for (int64_t task = tasks * team.rank / team.size; task < tasks * (team.rank + 1) / team.size; ++task) {
      const int64_t chunk = task / plan.groups, first = task % plan.groups * plan.group;
      const int64_t last = first + plan.group < p.heads ? first + plan.group : p.heads, begin = plan.begin(chunk),
                    end = plan.begin(chunk + 1);
      double* const totals = sums + (chunk * p.heads + first) * numbers();
      for (int64_t i = 0; i < (last - first) * numbers(); ++i) totals[i] = 0.0;
      for (int64_t window = begin; window < end; ++window) {
        const bool start = (window - begin) % kFold == 0, fold = window + 1 == end || (window + 1 - begin) % kFold == 0;
        me.tokens.find(p, window);
        for (int64_t head = first; head < last; ++head) {
          float* const sum = me.sum + (head - first) * blocks * this->block_floats();
          double* const own = totals + (head - first) * numbers();
          if (p.grad_table && start) __builtin_memset(sum, 0, blocks * this->block_floats() * sizeof(float));
          const bool wrap = head + 1 == last;
          if (!wrap || window + 1 < end) me.tokens.next.find(p, window + wrap);
          pair(me, head, wrap ? window + 1 < end ? first : -1 : head + 1, sum, own + entries());
          if (p.grad_table && fold) fold_into(sum, own);
        }
      }
    }
    team.sync();
    settle(team);
  }

  void fold_into(const float* sum, double* to) const {
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t u = 0; u < N; ++u, sum += kPanel)
        this->table_runs(u, block, [&](int64_t t, int64_t entry, int64_t count) {
          for (int64_t i = 0; i < count; ++i) to[entry + i] += sum[t + i];
        });
  }

  // The member's share of the results that are sums.
  void settle(const Team& team) const {
    const int64_t count = p.heads * numbers();
    for (int64_t i = count * team.rank / team.size; i < count * (team.rank + 1) / team.size; ++i) {
      const int64_t head = i / numbers(), at = i % numbers() - entries();
      double total = 0.0;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) total += sums[chunk * count + i];
      const float value = static_cast<float>(total);
      if (at < 0) p.grad_table[(at + entries()) * p.heads + head] = value;
      else if (at < 2 * p.D && p.grad_qkv_bias) p.grad_qkv_bias[(1 + at / p.D) * C + head * p.D + at % p.D] = value;
      else if (at == 2 * p.D && p.grad_logit_scale) p.grad_logit_scale[head] = value;
    }
    if (team.rank == 0 && p.grad_qkv_bias) __builtin_memset(p.grad_qkv_bias, 0, C * sizeof(float));
  }

  // One window and head; next: the head after it, whose rows are fetched meanwhile, -1: none. sum: [blocks][N][64]; beyond: sums [2][D] of
  // k's and v's gradient, then logit_scale's.
  void pair(const Member& me, int64_t head, int64_t next, float* sum, double* beyond) const {
    this->rows(me.tokens, 2, head, 0, N, me.rows);
    for (int64_t u = 0; u < N; ++u) pack_row<E>(me.rows[u], p.D, me.values + u * ld);
    this->rows(me.tokens, 1, head, 0, N, me.rows);
    for (int64_t u = 0; u < N; ++u) pack_row<E>(me.rows[u], p.D, me.keys + u * ld);
    pack_straight<E>(me.rows, N, p.D, me.key_rows);
    if (p.logit_scale) this->inverse_norms(me.rows, N, me.key_factors);
    for (int64_t block = 0; block < blocks; ++block)
      attend(me, head, block + 1 == blocks ? next : -1, block, sum + block * this->block_floats(), beyond + 2 * p.D);
    for (int64_t u = 0; u < N; ++u) {
      float *const key = me.grad_keys + u * wide, *const value = me.grad_values + u * wide;
      if (p.logit_scale) tangent(key, this->row(me.tokens, 1, head, u), me.key_factors[u]);
      if (me.tokens.at[u] >= 0) {
        put_row(key, grad_row(me, 1, head, u)), put_row(value, grad_row(me, 2, head, u));
      } else {
        for (int64_t d = 0; d < p.D; ++d) beyond[d] += key[d], beyond[p.D + d] += value[d];
      }
    }
  }
  S* grad_row(const Member& me, int64_t part, int64_t head, int64_t t) const {
    return static_cast<S*>(p.grad_qkv) + (me.tokens.at[t] * 3 + part) * C + head * p.D;
  }
  void put_row(const float* from, S* to) const {
    for (int64_t d = 0; d < p.D; d += kF) store_upto(to + d, load(from + d), p.D - d);
  }
  // grad (already over the norm) without its part along the row, whose length does not matter.
  void tangent(float* grad, const S* row, float inverse_norm) const {
    if (inverse_norm >= 1.f / kLeastNorm) return;
    vf along{};
    for (int64_t d = 0; d < p.D; d += kF) along += load(grad + d) * load_upto(row + d, p.D - d);
    const float share = sum_lane(along) * inverse_norm * inverse_norm;
    for (int64_t d = 0; d < p.D; d += kF) store(grad + d, load(grad + d) - load_upto(row + d, p.D - d) * share);
  }

  void attend(const Member& me, int64_t head, int64_t next, int64_t block, float* sum, double* logits) const {
    const int64_t first = block * kPanel, count = this->queries(block), columns = round_up(count, kUnit), sums = lanes_of<E>(count);
    this->rows(me.tokens, 0, head, first, count, me.rows);
    pack_transposed<E>(me.rows, count, p.D, me.queries), pack_straight<E>(me.rows, count, p.D, me.query_rows);
    this->query_factors(me.rows, count, head, me.query_norms, me.query_factors);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = me.tokens.at[first + t];
      me.rows[t] = at < 0 ? zeros : static_cast<const S*>(p.grad) + at * C + head * p.D;
    }
    pack_transposed<E>(me.rows, count, p.D, me.grads), pack_straight<E>(me.rows, count, p.D, me.grad_rows);
    const float* const lse = p.lse + (me.tokens.window * p.heads + head) * N + first;
    for (int64_t t = 0; t < kPanel; ++t) me.lse[t] = t < count ? lse[t] : 0.f;

    const auto fetch = [&](int64_t part) __attribute__((always_inline)) {
      if (next >= 0) this->fetch(me.tokens.next, p.qkv, 3 * C, part * C + next * p.D);
    };
    fetch(2);
    multiply<E>(N, columns / kF, me.keys, ld, 1, me.queries, kPanel, lanes, me.products, kPanel, false);
    fetch(1);
    multiply<E>(N, columns / kF, me.values, ld, 1, me.grads, kPanel, lanes, me.slopes, kPanel, false);
    const auto scores = this->scores(me.tokens, head, block, me.products, me.query_factors, me.key_factors, me.own);
    vf cosines{};
    with_flags(p.logit_scale, me.tokens.apart, [&](auto cosine, auto masked) {
      for (int64_t v = 0; v < columns; v += kF) {
        vf share;
        const vf delta = weigh<decltype(cosine)::value, decltype(masked)::value>(me, scores, head, first, v, share);
        cosines += slope<decltype(cosine)::value>(me, scores, delta, share, v, sum);
      }
    });
    if (p.grad_logit_scale) *logits += sum_lane(cosines);

    fetch(0);
    if (next >= 0) this->fetch(me.tokens.next, p.grad, C, next * p.D);
    const int64_t vectors = wide / kF;
    const bool more = block > 0;
    if constexpr (kPairs) {
      multiply<E>(N, vectors, me.weight_rows, kRow, 1, me.grad_rows, wide, sums, me.grad_values, wide, more);
      multiply<E>(N, vectors, me.slope_rows, kRow, 1, me.query_rows, wide, sums, me.grad_keys, wide, more);
      multiply<E>(count, vectors, me.slope_pairs, 1, kPanel, me.key_rows, wide, lanes_of<E>(N), me.grad_queries, wide, false);
    } else {
      multiply<E>(N, vectors, me.dropped, kPanel, 1, me.grad_rows, wide, sums, me.grad_values, wide, more);
      multiply<E>(N, vectors, me.slopes, kPanel, 1, me.query_rows, wide, sums, me.grad_keys, wide, more);
      multiply<E>(count, vectors, me.slopes, 1, kPanel, me.key_rows, wide, N, me.grad_queries, wide, false);
    }
    for (int64_t t = 0; t < count; ++t) {
      if (me.tokens.at[first + t] < 0) continue;
      float* const grad = me.grad_queries + t * wide;
      if (p.logit_scale) tangent(grad, this->row(me.tokens, 0, head, first + t), me.query_norms[t]);
      put_row(grad, grad_row(me, 0, head, first + t));
    }
  }

  // A vector of queries: the weights, and the mean of slopes under them. They are added up for it: lse is rounded, which at scores of a
  // hundred is 4e-6 of a weight, and where one weight is nearly all, its slope is nearly the mean.
  template <bool Cosine, bool Masked>
  vf weigh(const Member& me, const typename Base::Scores& scores, int64_t head, int64_t first, int64_t v, vf& share) const {
    const vf lse = load(me.lse + v);
    vf delta{}, sum{};
    by_fours(N, [&](int64_t u, auto count) {
      constexpr int R = decltype(count)::value;
      vf keep[4];
      if (p.threshold) keep_four(this->dropout, me.tokens.window, head, first + v, u, keep);
      for (int r = 0; r < R; ++r) {
        const int64_t at = (u + r) * kPanel + v;
        vf weight = exp_weight(scores.template at<Cosine, Masked>(u + r, v) - lse), slope = load(me.slopes + at);
        store(me.weights + at, weight), sum += weight;
        if (p.threshold) {
          slope *= keep[r], store(me.slopes + at, slope);
          delta += weight * slope;
          weight *= keep[r];
          if (!kPairs) store(me.dropped + at, weight);
        } else {
          delta += weight * slope;
        }
        if (kPairs) put_lanes<E>(me.weight_rows + (u + r) * kRow, v, weight);
      }
    });
    share = 1.f / larger(sum, vf{} + 0x1p-126f);  // columns without a query may have no weight
    return delta * share;
  }

  // The same vector: s in the table's sum, s times the products' factor as the two products read it; the sum of s times cosine.
  template <bool Cosine>
  vf slope(const Member& me, const typename Base::Scores& scores, vf delta, vf share, int64_t v, float* sum) const {
    vf cosines{}, lost{};
    by_fours(N, [&](int64_t u, auto count) {
      constexpr int R = decltype(count)::value;
      vf scaled[4] = {};
      for (int r = 0; r < R; ++r) {
        const int64_t at = (u + r) * kPanel + v;
        const vf weight = load(me.weights + at) * share, s = weight * (load(me.slopes + at) - delta);
        if (!kPairs) store(me.dropped + at, p.threshold ? load(me.dropped + at) * share : weight);
        if (p.grad_table) store(sum + at, load(sum + at) + s);
        scaled[r] = s * scores.template factor<Cosine>(u + r, v);
        if (Cosine && p.grad_logit_scale) {  // terms cancel: what each addition loses is added to the next
          const vf term = s * (load(me.query_norms + v) * scores.key[u + r]) * load(me.products + at) - lost, now = cosines + term;
          lost = (now - cosines) - term, cosines = now;
        }
        if constexpr (kPairs) put_lanes<E>(me.slope_rows + (u + r) * kRow, v, scaled[r]);
        else store(me.slopes + at, scaled[r]);
      }
#if defined(__AVX512BF16__)
      if constexpr (kPairs)
        for (int r = 0; r < R; r += 2) store(me.slope_pairs + (u + r) / 2 * kPanel + v, pair_lanes(scaled[r], scaled[r + 1]));
#endif
    });
    return cosines;
  }
};

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
