// Attention's gradients on the CPU.
//
// A task is a sequence's key head (BackwardPlan says who takes which). For each of its query heads and blocks of at most kMostColumns keys,
// packed as transposed panels of keys and of values and as straight rows of keys, it takes the rows in blocks of at most 64:
//   scores = q k^T and dp = g v^T, [64][block]; then p and dx in their place; grad_value += p^T g, grad_key += dx^T q, grad_query += dx k
// Sums of grad_key and grad_value, [M][D] floats, stay while the query heads pass; those of grad_query while the blocks of keys do. The
// bias' gradient is added up as dx is made. bfloat16 pairs: p and dx are rounded once, in pairs along rows for the sums over rows.
//
// Floors: 10 * N * M * D flops at one FMA a cycle, and an exponential per score.
#pragma once
#include "attention_cpu_forward.h"

namespace pyops::attention::PYOPS_ISA {
namespace {

constexpr int64_t kMostColumns = 256, kColumnFloats = 16384;

template <class S, class E, bool kPlain>
struct BackwardPass {
  const AttentionGradient& a;
  const Attention& p;
  const BackwardPlan& plan;
  const int64_t lanes, width, block, lds;
  Dropout dropout{};
  char* members = nullptr;
  size_t member_bytes = 0;
  float *partial = nullptr, *bias_sums = nullptr;  // [S * G][parts][2][M][width], [copies][bias' sizes]

  struct Member {
    float *keys, *values, *straight;  // packed: panels, panels, rows of keys
    float *q, *g;                     // [64][width]
    float *q_rows, *g_rows;           // the same as straight rows
    float *scores, *products;         // [64][lds]; p and dx afterwards
    float *weights, *dx, *dx_rows;    // what is multiplied: p and dx along rows, dx along columns
    float* keep;
    float *lse, *delta;                         // [N]
    float *grad_query, *grad_key, *grad_value;  // [N][width], [M][width]
    const S** rows;
    int64_t sequence, head, first;  // whose keys are packed
  };
  // One head of a sequence, and where its bias' gradient goes (null: not wanted).
  struct Head {
    const Sequence& q;
    int64_t s, head;
    float *grad_key, *grad_value, *grad_bias;
    int64_t bias_row;  // floats from row to row
  };

  BackwardPass(const AttentionGradient& gradient, const BackwardPlan& cut)
      : a(gradient),
        p(gradient.forward),
        plan(cut),
        lanes(lanes_of<E>(p.D)),
        width(padded(p.D)),
        block(block_keys(p.M, width, kMostColumns, kColumnFloats)),
        lds(block + kUnit) {
    if (p.seed) dropout = dropout_of(static_cast<uint64_t>(*p.seed), p.threshold, p.dropout_factor);
  }

  Member member(Layout& to) const {
    constexpr bool pairs = sizeof(E) == 2;
    Member me{};
    me.keys = to.take<float>(panel_floats(block, lanes)), me.values = to.take<float>(panel_floats(block, lanes));
    me.straight = to.take<float>(lanes_of<E>(block) * width);
    me.q = to.take<float>(kBlockRows * width), me.g = to.take<float>(kBlockRows * width);
    me.scores = to.take<float>(kBlockRows * lds), me.products = to.take<float>(kBlockRows * lds);
    me.q_rows = pairs ? to.take<float>(kBlockRows / 2 * width) : me.q, me.g_rows = pairs ? to.take<float>(kBlockRows / 2 * width) : me.g;
    me.weights = pairs ? to.take<float>(kBlockRows / 2 * lds) : me.scores,
    me.dx = pairs ? to.take<float>(kBlockRows / 2 * lds) : me.products;
    me.dx_rows = pairs ? to.take<float>(kBlockRows / 2 * lds) : me.products;
    me.keep = to.take<float>(lds + 4 * kF);
    me.lse = to.take<float>(p.N), me.delta = to.take<float>(p.N);
    me.grad_query = to.take<float>(p.N * width);
    me.grad_key = to.take<float>(p.M * width), me.grad_value = to.take<float>(p.M * width);
    me.rows = to.take<const S*>(block > kBlockRows ? block : kBlockRows);
    me.sequence = -1;
    return me;
  }
  void lay_out(Layout& to) {
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = to.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
    if (plan.parts > 1) partial = to.take<float>(p.S * p.G * plan.parts * 2 * p.M * width);
    bias_sums = plan.bias_copies > 1 ? to.take<float>(plan.bias_copies * plan.bias_floats) : a.grad_bias;
  }
  float* partial_of(int64_t task, int64_t part) const { return partial + (task * plan.parts + part) * 2 * p.M * width; }

  void pack(Member& me, const Sequence& q, int64_t s, int64_t head, int64_t first, int64_t count) const {
    if (me.sequence == s && me.head == head && me.first == first) return;
    me.sequence = s, me.head = head, me.first = first;
    for (int64_t j = 0; j < count; ++j) me.rows[j] = at<S>(p.value, q.batch, head, q.first_column + first + j);
    pack_transposed<E>(me.rows, count, p.D, me.values);
    for (int64_t j = 0; j < count; ++j) me.rows[j] = at<S>(p.key, q.batch, head, q.first_column + first + j);
    pack_transposed<E>(me.rows, count, p.D, me.keys);
    pack_straight<E>(me.rows, count, p.D, me.straight);
  }
  void pack_rows_of(const Member& me, const Heads& t, const Head& h, int64_t i0, int64_t rows, float* to, float* straight) const {
    for (int64_t r = 0; r < rows; ++r) {
      me.rows[r] = at<S>(t, h.q.batch, h.head, h.q.first_row + i0 + r);
      pack_row<E>(me.rows[r], p.D, to + r * width);
    }
    if (straight != to) pack_straight<E>(me.rows, rows, p.D, straight);
  }

  // lse (infinity for rows that see nothing, so that their p is zero) and delta of rows begin..end.
  void row_constants(const Member& me, const Head& h, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = (h.q.batch * p.H + h.head) * p.N + h.q.first_row + i;
      const S *g = at<S>(a.grad, h.q.batch, h.head, h.q.first_row + i), *o = at<S>(p.output, h.q.batch, h.head, h.q.first_row + i);
      vf sum{};
      for (int64_t d = 0; d < p.D; d += kF) sum += load_upto(g + d, p.D - d) * load_upto(o + d, p.D - d);
      me.delta[i] = sum_lane(sum) - (a.grad_lse ? a.grad_lse[index] : 0.f);
      me.lse[i] = p.lse[index] == -kInfinity ? kInfinity : p.lse[index];
    }
  }

  // Products of one row -> p and dx, of columns begin..end of the block at `first`.
  void row(const Member& me, const Head& h, int64_t i, int64_t r, int64_t first, Columns run, Columns seen) const {
    float *x = me.scores + r * lds, *dp = me.products + r * lds;
    const RowScores<kPlain> score(p, h.q, h.s, h.head, i);
    const float lse = me.lse[i], delta = me.delta[i];
    const Columns all = seen_by(p, h.q, i, i);
    const bool lone = all.end - all.begin == 1;  // one key: dp is grad . output, though not to the last bit
    const float lone_difference = lone && a.grad_lse ? a.grad_lse[(h.q.batch * p.H + h.head) * p.N + h.q.first_row + i] : 0.f;
    float* grad_bias = h.grad_bias ? h.grad_bias + i * h.bias_row : nullptr;
    const bool spread = p.bias.sizes[3] != 1;
    vf bias_sum{}, capped{};
    if (p.seed) dropout.row(h.s, h.head, i, first + run.begin, first + run.end, me.keep);
    for (int64_t c = run.begin; c < run.end; c += kF) {
      if (c >= seen.end || c + kF <= seen.begin) {
        store(x + c, vf{}), store(dp + c, vf{});
        continue;
      }
      const vf z = only(score(load(x + c), first + c, capped), c, seen.begin, seen.end), weight = exp_weight(z - lse);
      vf kept = weight, g = load(dp + c);
      if (p.seed) {
        const vf keep = load(me.keep + c - run.begin);
        kept *= keep, g *= keep;
      }
      const vf ds = weight * (lone ? splat<float>(lone_difference) : g - delta);
      vf dx = ds * p.scale;
      if constexpr (!kPlain) {
        if (grad_bias && spread) {
          float* to = grad_bias + first + c;
          const int64_t left = h.q.columns - first - c;
          store_upto(to, load_upto(to, left) + ds, left);
        } else if (grad_bias) {
          bias_sum += ds;
        }
        if (p.softcap > 0) {
          const vf t = capped * score.inverse_cap;
          dx *= 1.f - t * t;
        }
      }
      store(x + c, kept), store(dp + c, dx);
    }
    if (!kPlain && grad_bias && !spread) grad_bias[0] += sum_lane(bias_sum);
  }

  // p and dx of `rows` rows as bfloat16 pairs.
  void pair(const Member& me, int64_t rows, Columns run) const {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t c = run.begin; c < run.end; c += kF) {
        const bool two = r + 1 < rows;
        const float *x = me.scores + r * lds + c, *dx = me.products + r * lds + c;
        const vf low = load(dx), high = two ? load(dx + lds) : vf{};
        store(me.weights + r / 2 * lds + c, pair_lanes(load(x), two ? load(x + lds) : vf{}));
        store(me.dx + r / 2 * lds + c, pair_lanes(low, high));
        put_lanes<E>(me.dx_rows + r * lds / 2, c, low);
        if (two) put_lanes<E>(me.dx_rows + (r + 1) * lds / 2, c, high);
      }
#endif
  }

  // Rows i0..i1 against the packed block of keys.
  void rows_of(const Member& me, const Head& h, int64_t i0, int64_t i1, int64_t first, int64_t count, float* grad_query) const {
    const Columns seen = within(seen_by(p, h.q, i0, i1 - 1), first, first + count);
    if (seen.begin >= seen.end) return;
    const Columns run{seen.begin / kUnit * kUnit, round_up(seen.end, kUnit)};
    const int64_t rows = i1 - i0, keys = seen.end - run.begin, vectors = width / kF;
    pack_rows_of(me, p.query, h, i0, rows, me.q, me.q_rows);
    pack_rows_of(me, a.grad, h, i0, rows, me.g, me.g_rows);
    multiply_panels<E>(rows, me.q, width, me.keys, lanes, run.begin, run.end, me.scores, lds);
    multiply_panels<E>(rows, me.g, width, me.values, lanes, run.begin, run.end, me.products, lds);
    for (int64_t r = 0; r < rows; ++r) row(me, h, i0 + r, r, first, run, within(seen_by(p, h.q, i0 + r, i0 + r), first, first + count));
    if constexpr (sizeof(E) == 2) pair(me, rows, run);
    const int64_t to = (first + run.begin) * width, from = run.begin / kPair<E>;
    multiply<E>(keys, vectors, me.weights + run.begin, 1, lds, me.g_rows, width, lanes_of<E>(rows), h.grad_value + to, width, true);
    multiply<E>(keys, vectors, me.dx + run.begin, 1, lds, me.q_rows, width, lanes_of<E>(rows), h.grad_key + to, width, true);
    multiply<E>(rows, vectors, me.dx_rows + from, lds / kPair<E>, 1, me.straight + from * width, width, lanes_of<E>(seen.end) - from,
                grad_query, width, true);
  }

  // Blocks b0..b1 of `all` of a head's rows.
  void head(Member& me, const Head& h, int64_t key_head, int64_t b0, int64_t b1, int64_t all) const {
    const Sequence& q = h.q;
    const int64_t begin = share_begin(q.rows, all, b0), end = share_begin(q.rows, all, b1);
    row_constants(me, h, begin, end);
    __builtin_memset(me.grad_query, 0, (end - begin) * width * sizeof(float));
    const Columns seen = seen_by(p, q, begin, end - 1);
    for (int64_t first = seen.begin / block * block; first < seen.end; first += block) {
      const int64_t count = first + block < q.columns ? block : q.columns - first;
      pack(me, q, h.s, key_head, first, count);
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t i0 = share_begin(q.rows, all, b);
        rows_of(me, h, i0, share_begin(q.rows, all, b + 1), first, count, me.grad_query + (i0 - begin) * width);
      }
    }
    for (int64_t i = begin; i < end; ++i)
      store_row(at_mutable<S>(a.grad_query, q.batch, h.head, q.first_row + i), me.grad_query + (i - begin) * width, p.D);
  }

  void task(Member& me, const Task& t, int64_t part, float* bias) const {
    const Sequence q = sequence_of(p, t.sequence);
    const int64_t all = share_count(q.rows, kBlockRows), share = p.H / p.G, units = all * share;
    float* grad_key = plan.parts > 1 ? partial_of(t.sequence * p.G + t.head, part) : me.grad_key;
    float* grad_value = plan.parts > 1 ? grad_key + p.M * width : me.grad_value;
    __builtin_memset(grad_key, 0, q.columns * width * sizeof(float));
    __builtin_memset(grad_value, 0, q.columns * width * sizeof(float));
    const int64_t* sizes = p.bias.sizes;
    for (int64_t u = units * part / plan.parts, end = units * (part + 1) / plan.parts, next; u < end; u = next) {
      next = (u / all + 1) * all < end ? (u / all + 1) * all : end;
      Head h{q, t.sequence, t.head * share + u / all, grad_key, grad_value, nullptr, 0};
      if (bias) {
        const int64_t s = sizes[0] == 1 ? 0 : h.s, row = (s * sizes[1] + (sizes[1] == 1 ? 0 : h.head)) * sizes[2];
        h.grad_bias = bias + row * sizes[3], h.bias_row = sizes[2] == 1 ? 0 : sizes[3];
      }
      head(me, h, t.head, u % all, u % all + next - u, all);
    }
    if (plan.parts > 1) return;
    for (int64_t j = 0; j < q.columns; ++j) {
      store_row(at_mutable<S>(a.grad_key, q.batch, t.head, q.first_column + j), grad_key + j * width, p.D);
      store_row(at_mutable<S>(a.grad_value, q.batch, t.head, q.first_column + j), grad_value + j * width, p.D);
    }
  }

  // Sums of the parts of columns begin..end, all sequences' and key heads' columns in a row.
  void add_parts(const Member& me, int64_t begin, int64_t end) const {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t task = index / p.M, j = index % p.M, s = task / p.G, head = task % p.G;
      const Sequence q = sequence_of(p, s);
      if (j >= q.columns) continue;
      for (int which = 0; which < 2; ++which) {
        for (int64_t d = 0; d < width; d += kF) {
          vf sum{};
          for (int64_t part = 0; part < plan.parts; ++part) sum += load(partial_of(task, part) + (which * p.M + j) * width + d);
          store(me.grad_key + d, sum);
        }
        store_row(at_mutable<S>(which ? a.grad_value : a.grad_key, q.batch, head, q.first_column + j), me.grad_key, p.D);
      }
    }
  }
  void add_copies(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kF) {
      vf sum{};
      for (int64_t copy = 0; copy < plan.bias_copies; ++copy) sum += load_upto(bias_sums + copy * plan.bias_floats + i, end - i);
      store_upto(a.grad_bias + i, sum, end - i);
    }
  }

  void run(const Team& team) const {
    Layout to{members + team.rank * member_bytes};
    Member me = member(to);
    const auto share = [&](int64_t n, int64_t rank) { return n * rank / team.size; };
    if (plan.bias_copies > 1) {
      const int64_t all = plan.bias_copies * plan.bias_floats, from = share(all, team.rank);
      __builtin_memset(bias_sums + from, 0, (share(all, team.rank + 1) - from) * sizeof(float));
      team.sync();
    }
    for (int64_t o = plan.cuts[share(plan.threads, team.rank)]; o < plan.cuts[share(plan.threads, team.rank + 1)]; ++o) {
      const Owner owner = owner_of(p, plan, o);
      float* bias = a.grad_bias ? bias_sums + owner.bias_copy * plan.bias_floats : nullptr;
      for (int64_t t = owner.first_task; t < owner.end; ++t) task(me, task_of(p, plan, owner, t), owner.part, bias);
    }
    if (plan.parts <= 1 && plan.bias_copies <= 1) return;
    team.sync();
    const int64_t columns = plan.parts > 1 ? p.S * p.G * p.M : 0, floats = plan.bias_copies > 1 ? plan.bias_floats : 0;
    add_parts(me, share(columns, team.rank), share(columns, team.rank + 1));
    add_copies(share(floats, team.rank), share(floats, team.rank + 1));
  }
};

template <class S, class E, bool kPlain>
void backward_as(const AttentionGradient& a, const BackwardPlan& plan) {
  BackwardPass<S, E, kPlain> pass(a, plan);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(plan.threads, [](const Team& team, void* pass) { static_cast<const BackwardPass<S, E, kPlain>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
