// Attention's output on the CPU.
//
// A member takes a run of groups of six rows. It packs its key head's keys (transposed panels) and values (straight rows) once per block of
// at most kMostKeys of them, so that both stay in L2, and keeps them while the key head stays. A group's scores [6][block] stay in L1
// between the two products; vectors of 16 keys that no row of the group sees are skipped at both ends. Keys of several blocks: rows keep a
// running maximum and sum, and chunks of kChunk floats of outputs go through all blocks, so that packing costs 1 % of the products.
//
// Floors: 4 * N * M * D flops at one FMA a cycle, and an exponential per score, 18 instructions per vector.
#pragma once
#include "attention_cpu_scores.h"

namespace pyops::attention::PYOPS_ISA {
namespace {
using cpu::Layout;
using cpu::Team;

static_assert(kGroup == kGroupRows);
constexpr int64_t kMostKeys = 512, kBlockFloats = 65536, kChunk = 16384;

inline int64_t block_keys(int64_t M, int64_t width, int64_t most, int64_t floats) {
  const int64_t fit = floats / width / kPanel * kPanel, limit = clamped(fit, kPanel, most);
  const int64_t blocks = M > 0 ? share_count(M, limit) : 1;
  return round_up(share_count(M > 0 ? M : 1, blocks), kPanel);
}

// S: storage; E: what is multiplied.
template <class S, class E, bool kPlain>
struct ForwardPass {
  const Attention& p;
  const Place* cuts;
  const int threads;
  const int64_t lanes, width, ldq, block, lds;
  const bool single;  // one block of keys serves every row
  const int64_t chunk;
  Dropout dropout{};
  char* members = nullptr;
  size_t member_bytes = 0;

  struct Member {
    float *keys, *values;         // packed
    float *q, *scores;            // [6][ldq], [6][lds]
    float* weights;               // [6][lds], of E: the scores themselves where that is float
    float* keep;                  // [lds + 64]: dropout's
    float *out, *sums, *maximum;  // [rows of a chunk][width], [..][kF], [..]
    const S** rows;
    int64_t sequence, head, first;  // whose keys are packed
  };

  ForwardPass(const Attention& params, const Place* places, int team)
      : p(params),
        cuts(places),
        threads(team),
        lanes(lanes_of<E>(p.D)),
        width(padded(p.D)),
        ldq(width),
        block(block_keys(p.M, width, kMostKeys, kBlockFloats)),
        lds(block + kUnit),
        single(p.M <= block),
        chunk(single ? 1 : clamped(kChunk / (kGroup * width), 8, 42)) {
    if (p.seed) dropout = dropout_of(static_cast<uint64_t>(*p.seed), p.threshold, 1.f);
  }

  Member member(Layout& to) const {
    Member me{};
    me.keys = to.take<float>(panel_floats(block, lanes));
    me.values = to.take<float>(lanes_of<E>(block) * width);
    me.q = to.take<float>(kGroup * ldq);
    me.scores = to.take<float>(kGroup * lds);
    me.weights = sizeof(E) == 2 ? to.take<float>(kGroup * lds / 2) : me.scores;
    me.keep = to.take<float>(lds + 4 * kF);
    me.out = to.take<float>(chunk * kGroup * width);
    me.sums = to.take<float>(chunk * kGroup * kF);
    me.maximum = to.take<float>(chunk * kGroup);
    me.rows = to.take<const S*>(block);
    me.sequence = -1;
    return me;
  }
  void lay_out(Layout& to) {
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = to.take<char>(threads * static_cast<int64_t>(member_bytes));
  }

  void pack(Member& me, const Sequence& q, int64_t s, int64_t head, int64_t first, int64_t count) const {
    if (me.sequence == s && me.head == head && me.first == first) return;
    me.sequence = s, me.head = head, me.first = first;
    for (int64_t j = 0; j < count; ++j) me.rows[j] = at<S>(p.key, q.batch, head, q.first_column + first + j);
    pack_transposed<E>(me.rows, count, p.D, me.keys);
    for (int64_t j = 0; j < count; ++j) me.rows[j] = at<S>(p.value, q.batch, head, q.first_column + first + j);
    pack_straight<E>(me.rows, count, p.D, me.values);
  }

  // Products -> weights of columns begin..end of the block at `first`; the row's outputs so far are scaled to its new maximum.
  void softmax(const Member& me, const Sequence& q, int64_t s, int64_t head, int64_t row, int64_t r, int64_t slot, int64_t first,
               Columns run, Columns seen) const {
    float *x = me.scores + r * lds, *weights = me.weights + r * lds / kPair<E>;
    const RowScores<kPlain> score(p, q, s, head, row);
    vf most = splat<float>(-kInfinity), unused;
    for (int64_t c = run.begin; c < run.end; c += kF) {
      vf v = splat<float>(-kInfinity);
      if (c < seen.end && c + kF > seen.begin) v = only(score(load(x + c), first + c, unused), c, seen.begin, seen.end);
      store(x + c, v);
      most = larger(v, most);
    }
    const float before = me.maximum[slot], now = max_lane(most), maximum = before > now ? before : now;
    const float base = maximum == -kInfinity ? 0.f : maximum;
    vf sum{};
    if (!single) {
      sum = load(me.sums + slot * kF);
      if (maximum != before) {
        const vf factor = exp_weight(splat<float>(before - base));
        sum *= factor;
        float* out = me.out + slot * width;
        for (int64_t d = 0; d < width; d += kF) store(out + d, load(out + d) * factor);
      }
    }
    if (p.seed) dropout.row(s, head, row, first + run.begin, first + run.end, me.keep);
    for (int64_t c = run.begin; c < run.end; c += kF) {
      vf w = exp_weight(load(x + c) - base);
      sum += w;
      if (p.seed) w *= load(me.keep + c - run.begin);
      put_lanes<E>(weights, c, w);
    }
    me.maximum[slot] = maximum;
    store(me.sums + slot * kF, sum);
  }

  // Rows i0..i1 against the packed block; their state is at `slot`.
  void group(const Member& me, const Sequence& q, int64_t s, int64_t head, int64_t i0, int64_t i1, int64_t slot, int64_t first,
             int64_t count) const {
    const Columns seen = within(seen_by(p, q, i0, i1 - 1), first, first + count);
    if (seen.begin >= seen.end) return;
    const Columns run{seen.begin / kUnit * kUnit, round_up(seen.end, kUnit)};
    const int64_t rows = i1 - i0;
    for (int64_t r = 0; r < rows; ++r) pack_row<E>(at<S>(p.query, q.batch, head, q.first_row + i0 + r), p.D, me.q + r * ldq);
    multiply_panels<E>(rows, me.q, ldq, me.keys, lanes, run.begin, run.end, me.scores, lds);
    for (int64_t r = 0; r < rows; ++r) {
      const Columns own = within(seen_by(p, q, i0 + r, i0 + r), first, first + count);
      softmax(me, q, s, head, i0 + r, r, slot + r, first, run, own);
    }
    const int64_t from = run.begin / kPair<E>, to = lanes_of<E>(seen.end);
    multiply<E>(rows, width / kF, me.weights + from, lds / kPair<E>, 1, me.values + from * width, width, to - from, me.out + slot * width,
                width, !single);
  }

  void finish(const Member& me, const Sequence& q, int64_t head, int64_t row, int64_t slot) const {
    const float total = sum_lane(load(me.sums + slot * kF));
    const bool blind = total == 0.f;
    const float factor = blind ? 0.f : (p.seed ? p.dropout_factor : 1.f) / total;
    S* to = at_mutable<S>(p.output, q.batch, head, q.first_row + row);
    const float* out = me.out + slot * width;
    for (int64_t d = 0; d < p.D; d += kF) store_upto(to + d, blind ? vf{} : load(out + d) * factor, p.D - d);
    p.lse[(q.batch * p.H + head) * p.N + q.first_row + row] = blind ? -kInfinity : me.maximum[slot] + __builtin_logf(total);
  }

  // Groups g0..g1 of one head.
  void groups(Member& me, const Sequence& q, int64_t s, int64_t head, int64_t g0, int64_t g1, int64_t all) const {
    for (int64_t next; g0 < g1; g0 = next) {
      next = g0 + chunk < g1 ? g0 + chunk : g1;
      const int64_t begin = share_begin(q.rows, all, g0), end = share_begin(q.rows, all, next);
      for (int64_t slot = 0; slot < end - begin; ++slot) me.maximum[slot] = -kInfinity, store(me.sums + slot * kF, vf{});
      if (!single) __builtin_memset(me.out, 0, (end - begin) * width * sizeof(float));
      const Columns seen = seen_by(p, q, begin, end - 1);
      for (int64_t first = seen.begin / block * block; first < seen.end; first += block) {
        const int64_t count = first + block < q.columns ? block : q.columns - first;
        pack(me, q, s, head * p.G / p.H, first, count);
        for (int64_t g = g0; g < next; ++g) {
          const int64_t i0 = share_begin(q.rows, all, g), i1 = share_begin(q.rows, all, g + 1);
          group(me, q, s, head, i0, i1, i0 - begin, first, count);
        }
      }
      for (int64_t i = begin; i < end; ++i) finish(me, q, head, i, i - begin);
    }
  }

  void run(const Team& team) const {
    Layout to{members + team.rank * member_bytes};
    Member me = member(to);
    const Place from = cuts[threads * team.rank / team.size], end = cuts[threads * (team.rank + 1) / team.size];
    for (int64_t s = from.sequence; s < p.S && s <= end.sequence; ++s) {
      const Sequence q = sequence_of(p, s);
      const int64_t all = share_count(q.rows, kGroup), heads = s == end.sequence ? (end.group > 0 ? end.head + 1 : end.head) : p.H;
      for (int64_t head = s == from.sequence ? from.head : 0; head < heads; ++head) {
        const int64_t first = s == from.sequence && head == from.head ? from.group : 0;
        groups(me, q, s, head, first, s == end.sequence && head == end.head ? end.group : all, all);
      }
    }
  }
};

template <class S, class E, bool kPlain>
void forward_as(const Attention& p, const Place* cuts, int threads) {
  ForwardPass<S, E, kPlain> pass(p, cuts, threads);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(threads, [](const Team& team, void* pass) { static_cast<const ForwardPass<S, E, kPlain>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
