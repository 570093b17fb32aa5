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
constexpr int64_t kMostKeys = 512, kBlockFloats = 65536, kChunk = 16384, kFewRows = 4;

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
  const int64_t lanes, width, block, lds;
  const bool single;  // one block of keys serves every row
  const int64_t chunk;
  Dropout dropout{};
  char* members = nullptr;
  size_t member_bytes = 0;

  struct Member {
    float *keys, *values;         // packed
    float *q, *scores;            // [6][width], [6][lds]
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
    me.q = to.take<float>(kGroup * width);
    me.scores = to.take<float>(kGroup * lds);
    me.weights = sizeof(E) == 2 ? to.take<float>(kGroup * lds / 2) : me.scores;
    me.keep = to.take<float>(lds + 4 * kF);
    me.out = to.take<float>(chunk * kGroup * width);
    me.sums = to.take<float>(chunk * kGroup * kF);
    me.maximum = to.take<float>(chunk * kGroup + kF);
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
    // What is packed next, into L2 while this head is worked on: short sequences begin with misses otherwise (49 rows of 32: 11.1 ms for
    // 11.8). Not a function of its own: GCC drops calls of one that only prefetches.
    const bool last = head + 1 == p.G;
    if (!single || (last && q.batch + 1 == p.B)) return;
    const int64_t batch = last ? q.batch + 1 : q.batch, next = last ? 0 : head + 1;
    for (int64_t j = 0; j < count; ++j) {
      const S *key = at<S>(p.key, batch, next, q.first_column + j), *value = at<S>(p.value, batch, next, q.first_column + j);
      for (int64_t d = 0; d < p.D; d += 64 / static_cast<int64_t>(sizeof(S)))
        __builtin_prefetch(key + d, 0, 2), __builtin_prefetch(value + d, 0, 2);
    }
  }

  // Few rows for a key head: packing would cost more than the products, so keys and values are read where they lie.
  bool in_place(const Sequence& q) const { return p.D % kF == 0 && q.rows * (p.H / p.G) <= kFewRows; }
  // Products of `rows` rows with the keys of columns begin..end, four at a time (beyond the last: the last again).
  void multiply_keys(const S* query, int64_t rows, const S* keys, int64_t begin, int64_t end, float* out) const {
    for (int64_t j = begin; j < end; j += 4)
      for (int64_t r = 0; r < rows; ++r) {
        vf sum[4] = {};
        const S* from[4];
        for (int i = 0; i < 4; ++i) from[i] = keys + (j + i < end ? j + i : end - 1) * p.key.row;
        for (int64_t d = 0; d < p.D; d += kF) {
          const vf x = load_as(query + r * p.query.row + d, float{});
          for (int i = 0; i < 4; ++i) sum[i] += x * load_as(from[i] + d, float{});
        }
        float sums[4];
        sum_lanes(sum, sums);
        __builtin_memcpy(out + r * lds + j, sums, sizeof sums);
      }
  }

  // Adds values of columns begin..end by their weights, which took the scores' place, to the rows' outputs.
  void multiply_values(const Member& me, int64_t rows, const S* values, int64_t begin, int64_t end, float* out) const {
    if constexpr (std::is_same_v<S, float>)
      return multiply<float>(rows, width / kF, me.scores + begin, lds, 1, values, p.value.row, end - begin, out, width, !single);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < p.D; d += 4 * kF) {
        const int vectors = static_cast<int>(p.D - d < 4 * kF ? (p.D - d) / kF : 4);
        vf total[4] = {};
        for (int v = 0; v < vectors && !single; ++v) total[v] = load(out + r * width + d + v * kF);
        for (int64_t k = begin; k < end;) {
          vf sum[4] = {};
          for (const int64_t stop = k + kSum < end ? k + kSum : end; k < stop; ++k) {
            const vf w = splat<float>(me.scores[r * lds + k]);
            const S* from = values + (k - begin) * p.value.row + d;
            for (int v = 0; v < 4; ++v)
              if (v < vectors) sum[v] += w * load_as(from + v * kF, float{});
          }
          for (int v = 0; v < 4; ++v) total[v] += sum[v];
        }
        for (int v = 0; v < vectors; ++v) store(out + r * width + d + v * kF, total[v]);
      }
  }

  // The maximum of a row's scores in columns begin..end of the block at `first`, which take the products' place (plain ones: unscaled).
  float find_maximum(const Member& me, const Sequence& q, int64_t s, int64_t head, int64_t row, int64_t r, int64_t first, Columns run,
                     Columns seen) const {
    float* x = me.scores + r * lds;
    const RowScores<kPlain> score(p, q, s, head, row);
    vf most = splat<float>(-kInfinity), unused;
    int64_t c = run.begin;
    const auto masked = [&](int64_t end) {
      for (; c < end; c += kF) {
        vf v = splat<float>(-kInfinity);
        if (c < seen.end && c + kF > seen.begin) {
          v = load(x + c);
          if constexpr (!kPlain) v = score(v, first + c, unused);
          v = only(v, c, seen.begin, seen.end);
        }
        store(x + c, v), most = larger(v, most);
      }
    };
    masked(round_up(seen.begin, kF) < run.end ? round_up(seen.begin, kF) : run.end);
    for (; c + kF <= seen.end; c += kF) {
      vf v = load(x + c);
      if constexpr (!kPlain) store(x + c, v = score(v, first + c, unused));
      most = larger(v, most);
    }
    masked(run.end);
    return max_lane(most);
  }
  // A score under the maximum, exact where it is the maximum itself. Plain ones are scaled only here.
  vf below(vf x, float maximum) const { return kPlain ? (x - maximum) * p.scale : x - maximum; }

  // Scores -> weights, floats in their place where `direct`; the row's outputs so far are scaled to its new maximum.
  void softmax(const Member& me, int64_t s, int64_t head, int64_t row, int64_t r, int64_t slot, int64_t first, Columns run, float now,
               bool direct) const {
    float* x = me.scores + r * lds;
    const float before = me.maximum[slot], maximum = before > now ? before : now;
    float* weights = me.weights + r * lds / kPair<E>;
    const float base = maximum == -kInfinity ? 0.f : maximum;
    vf sum{};
    if (!single) {
      sum = load(me.sums + slot * kF);
      if (maximum != before) {
        const vf factor = exp_weight(below(splat<float>(before), base));
        sum *= factor;
        float* out = me.out + slot * width;
        for (int64_t d = 0; d < width; d += kF) store(out + d, load(out + d) * factor);
      }
    }
    if (p.seed) dropout.row(s, head, row, first + run.begin, first + run.end, me.keep);
    for (int64_t c = run.begin; c < run.end; c += kF) {
      vf w = exp_weight(below(load(x + c), base));
      sum += w;
      if (p.seed) w *= load(me.keep + c - run.begin);
      if (direct) store(x + c, w);
      else put_lanes<E>(weights, c, w);
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
    const S* query = at<S>(p.query, q.batch, head, q.first_row + i0);
    const bool direct = in_place(q);
    if (direct) {
      const S* keys = at<S>(p.key, q.batch, head * p.G / p.H, q.first_column + first);
      multiply_keys(query, rows, keys, run.begin, seen.end, me.scores);
    } else if constexpr (std::is_same_v<S, float>) {
      multiply_panels<E>(rows, query, p.query.row, me.keys, lanes, run.begin, run.end, me.scores, lds);
    } else {
      for (int64_t r = 0; r < rows; ++r) pack_row<E>(query + r * p.query.row, p.D, me.q + r * width);
      multiply_panels<E>(rows, me.q, width, me.keys, lanes, run.begin, run.end, me.scores, lds);
    }
    float most[kGroup];
    for (int64_t r = 0; r < rows; ++r) {
      const Columns own = within(seen_by(p, q, i0 + r, i0 + r), first, first + count);
      most[r] = find_maximum(me, q, s, head, i0 + r, r, first, run, own);
    }
    for (int64_t r = 0; r < rows; ++r) softmax(me, s, head, i0 + r, r, slot + r, first, run, most[r], direct);
    if (direct) {
      const S* values = at<S>(p.value, q.batch, head * p.G / p.H, q.first_column + first + seen.begin);
      return multiply_values(me, rows, values, seen.begin, seen.end, me.out + slot * width);
    }
    const int64_t from = run.begin / kPair<E>, to = lanes_of<E>(seen.end);
    multiply<E>(rows, width / kF, me.weights + from, lds / kPair<E>, 1, me.values + from * width, width, to - from, me.out + slot * width,
                width, !single);
  }

  // Outputs and lse of rows begin..end, whose state is at slot 0 and on.
  void finish(const Member& me, const Sequence& q, int64_t head, int64_t begin, int64_t end) const {
    float* lse = p.lse + (q.batch * p.H + head) * p.N + q.first_row;
    for (int64_t i = begin; i < end; i += kF) {
      const int64_t rows = end - i < kF ? end - i : kF;
      float total[kF] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t slot = i - begin + r;
        total[r] = sum_lane(load(me.sums + slot * kF));
        const bool blind = total[r] == 0.f;
        const float factor = (p.seed ? p.dropout_factor : 1.f) / total[r];
        S* to = at_mutable<S>(p.output, q.batch, head, q.first_row + i + r);
        const float* out = me.out + slot * width;
        for (int64_t d = 0; d < p.D; d += kF) store_upto(to + d, blind ? vf{} : load(out + d) * factor, p.D - d);
      }
      const vf sums = load(total), whole = load(me.maximum + i - begin) * (kPlain ? p.scale : 1.f) + log(sums);
      store_upto(lse + i, sums == 0.f ? splat<float>(-kInfinity) : whole, rows);
    }
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
        if (!in_place(q)) pack(me, q, s, head * p.G / p.H, first, count);
        for (int64_t g = g0; g < next; ++g) {
          const int64_t i0 = share_begin(q.rows, all, g), i1 = share_begin(q.rows, all, g + 1);
          group(me, q, s, head, i0, i1, i0 - begin, first, count);
        }
      }
      finish(me, q, head, begin, end);
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
