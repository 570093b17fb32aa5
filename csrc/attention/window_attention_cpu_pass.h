// What the forward and the backward pass of window attention share on the CPU: where a window's tokens stand, the table spread out over
// pairs of tokens, and scores.
//
// Scores are kept [key][64 queries]: a row for each key and no key that does not exist, a block of columns for up to 64 queries. Softmax
// goes down the columns, so that nothing is added across lanes; of a window's N queries only those behind the last 16 are computed in vain.
// Cosines are taken of the products: q.k * (1/|q|) * (1/|k|), and q and k multiplied as they are.
#pragma once
#include "../conv/depthwise_cpu_pass.h"
#include "attention_cpu_dropout.h"
#include "attention_cpu_tile.h"
#include "window_attention_cpu.h"

namespace pyops::attention::PYOPS_ISA {
namespace {
using cpu::Layout;
using cpu::Team;

constexpr float kLeastNorm = 1e-12f;
constexpr float kApart = -100.f;     // between regions
constexpr int64_t kMostAhead = 256;  // tokens of a window whose rows are fetched ahead

// The factors of keys u .. u + 3 (u a multiple of four: a block's four words) for a vector of queries from t on.
inline void keep_four(const Dropout& dropout, int64_t window, int64_t head, int64_t t, int64_t u, vf (&keep)[4]) {
  const vu zero{};
  vu words[4];
  dropout.numbers.words(zero + static_cast<uint32_t>(u / 4), counted(static_cast<uint32_t>(t)), zero + static_cast<uint32_t>(head),
                        zero + static_cast<uint32_t>(window), words);
  for (int i = 0; i < 4; ++i) keep[i] = words[i] >= dropout.threshold ? vf{} + dropout.factor : vf{};
}

// f(u, R) for keys 0 .. N - 1, R of them at a time: four, and once what is left.
template <class F>
inline void by_fours(int64_t N, const F& f) {
  int64_t u = 0;
  for (; u + 4 <= N; u += 4) f(u, std::integral_constant<int, 4>{});
  if (N - u == 3) f(u, std::integral_constant<int, 3>{});
  else if (N - u == 2) f(u, std::integral_constant<int, 2>{});
  else if (N - u == 1) f(u, std::integral_constant<int, 1>{});
}

// f(a, b) with the two as constants.
template <class F>
inline void with_flags(bool a, bool b, const F& f) {
  if (a) b ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  else b ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

// The tokens of one window.
struct WindowTokens {
  int64_t window = -1;
  int64_t* at;    // [N] position in the images [B * H * W], -1 beyond the map
  float* region;  // [N], zeros to a multiple of 64
  bool apart;     // whether there are several regions

  void lay_out(Layout& to, int64_t N) {
    at = to.take<int64_t>(N), region = to.take<float>(round_up(N, kPanel));
    if (to.base) __builtin_memset(region, 0, round_up(N, kPanel) * sizeof(float));
  }

  void find(const WindowAttention& p, int64_t number) {
    if (number == window) return;
    window = number;
    const int64_t image = number / (p.rows * p.columns), a = number / p.columns % p.rows, b = number % p.columns;
    apart = (p.shift_h && a + 1 == p.rows) || (p.shift_w && b + 1 == p.columns);
    const int64_t height = p.rows * p.wh, width = p.columns * p.ww;
    for (int64_t i = 0, t = 0; i < p.wh; ++i) {
      int64_t y = a * p.wh + i + p.shift_h;
      if (y >= height) y -= height;
      const int64_t row = y < p.H ? (image * p.H + y) * p.W : -1;
      const int vertical = 3 * part(a, p.rows, i, p.wh, p.shift_h);
      for (int64_t j = 0; j < p.ww; ++j, ++t) {
        int64_t x = b * p.ww + j + p.shift_w;
        if (x >= width) x -= width;
        at[t] = row >= 0 && x < p.W ? row + x : -1;
        region[t] = static_cast<float>(vertical + part(b, p.columns, j, p.ww, p.shift_w));
      }
    }
  }
  static int part(int64_t window, int64_t windows, int64_t i, int64_t side, int64_t shift) {
    return !shift || window + 1 < windows ? 0 : i < side - shift ? 1 : 2;
  }
};
// Those of the window at hand, and of the one whose rows are fetched ahead.
struct Tokens : WindowTokens {
  WindowTokens next;
  void lay_out(Layout& to, int64_t N) { WindowTokens::lay_out(to, N), next.lay_out(to, N); }
  void find(const WindowAttention& p, int64_t number) {
    if (next.window == number) {
      const WindowTokens other = *this;
      static_cast<WindowTokens&>(*this) = next, next = other;
    }
    WindowTokens::find(p, number);
  }
};

template <class S>
struct WindowPass {
  using E = typename Gemm<S>::Elem;
  static constexpr bool kPairs = kPair<E> == 2;
  const WindowAttention& p;
  const int64_t N, C, blocks, wide, lanes, ld;  // wide: padded D; lanes: of D; ld: of a packed row
  const Dropout dropout;
  S* beyond;                    // [3C] q, k, v of tokens beyond the map
  float *turned, *dense, *one;  // [heads][entries]; [heads][blocks][N][64], null where that is much; [64] zeros

  explicit WindowPass(const WindowAttention& params)
      : p(params),
        N(p.tokens()),
        C(p.heads * p.D),
        blocks((N + kPanel - 1) / kPanel),
        wide(padded(p.D)),
        lanes(lanes_of<E>(p.D)),
        ld(round_up(lanes, 16)),
        dropout(dropout_of(p.threshold ? static_cast<uint64_t>(*p.seed) : 0, p.threshold, p.keep_scale)) {}

  int64_t block_floats() const { return N * kPanel; }
  int64_t queries(int64_t block) const { return N - block * kPanel < kPanel ? N - block * kPanel : kPanel; }
  bool has_dense() const { return p.table && p.heads * blocks * block_floats() <= int64_t{1} << 21; }  // 8 MiB

  void lay_out_shared(Layout& to) {
    beyond = to.take<S>(3 * C), one = to.take<float>(kPanel);
    turned = to.take<float>(p.table ? p.heads * p.entries() : 0);
    dense = to.take<float>(has_dense() ? p.heads * blocks * block_floats() : 0);
  }
  // The member's share of what all read.
  void prepare(const Team& team) const {
    if (team.rank == 0) {
      __builtin_memset(one, 0, kPanel * sizeof(float));
      if (p.qkv_bias) store_row(beyond, p.qkv_bias, 3 * C);
      else __builtin_memset(beyond, 0, 3 * C * sizeof(S));
    }
    for (int64_t h = team.rank; p.table && h < p.heads; h += team.size)
      for (int64_t i = 0; i < p.entries(); ++i) turned[h * p.entries() + i] = p.table[i * p.heads + h];
    team.sync();
    if (!has_dense()) return;
    for (int64_t i = team.rank; i < p.heads * blocks; i += team.size) spread(i / blocks, i % blocks, dense + i * block_floats());
    team.sync();
  }

  // f(u, column, entry, count) for the runs of neighbours that a block's queries are in the table, seen from key u
  template <class F>
  void table_runs(int64_t u, int64_t block, const F& f) const {
    const int64_t first = block * kPanel, end = first + queries(block),
                  corner = (p.wh - 1 - u / p.ww) * (2 * p.ww - 1) + p.ww - 1 - u % p.ww;
    for (int64_t t = first, ti = first / p.ww, tj = first % p.ww; t < end; ++ti, tj = 0) {
      const int64_t count = p.ww - tj < end - t ? p.ww - tj : end - t;
      f(t - first, corner + ti * (2 * p.ww - 1) + tj, count);
      t += count;
    }
  }
  // to[u][t] = the table's value of query t and key u; zeros for queries that there are not
  void spread(int64_t head, int64_t block, float* to) const {
    const float* from = turned + head * p.entries();
    for (int64_t u = 0; u < N; ++u, to += kPanel) {
      table_runs(u, block, [&](int64_t t, int64_t entry, int64_t count) { __builtin_memcpy(to + t, from + entry, count * sizeof(float)); });
      for (int64_t t = queries(block); t < kPanel; ++t) to[t] = 0.f;
    }
  }

  const S* row(const Tokens& tokens, int64_t part, int64_t head, int64_t t) const {
    const int64_t at = part * C + head * p.D;
    return tokens.at[t] < 0 ? beyond + at : static_cast<const S*>(p.qkv) + tokens.at[t] * 3 * C + at;
  }
  void rows(const Tokens& tokens, int64_t part, int64_t head, int64_t first, int64_t count, const S** to) const {
    for (int64_t t = 0; t < count; ++t) to[t] = row(tokens, part, head, first + t);
  }
  // A unit's rows of `image` [.., tokens, channels], the next to be read, on their way to L2 (Swin-T stage 1, 8 images, one thread: 12.9
  // ms without, 10.1 with). Inline always: GCC drops calls of a function that does nothing else.
  [[gnu::always_inline]] void fetch(const WindowTokens& tokens, const void* image, int64_t channels, int64_t at) const {
    if (N > kMostAhead) return;
    const S* from = static_cast<const S*>(image) + at;
    for (int64_t t = 0; t < N; ++t) {
      const char* row = reinterpret_cast<const char*>(from + tokens.at[t] * channels);
      for (int64_t i = 0; tokens.at[t] >= 0 && i < p.D * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(row + i, 0, 2);
    }
  }
  void inverse_norms(const S* const* rows, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i) {
      vf sum{};
      for (int64_t d = 0; d < p.D; d += kF) {
        const vf x = load_upto(rows[i] + d, p.D - d);
        sum += x * x;
      }
      const float norm = __builtin_sqrtf(sum_lane(sum));
      to[i] = 1.f / (norm < kLeastNorm ? kLeastNorm : norm);
    }
  }

  // Scores of one block of queries from their products, and what the products were multiplied with.
  struct Scores {
    const float *products, *bias;  // [N][64]; [64] a key or, step 0, for all
    int64_t step;
    const float *query, *key;  // the factors of queries [64] and, where Cosine, of keys [N]
    const float *column_region, *region;

    template <bool Cosine>
    vf factor(int64_t u, int64_t v) const {
      return Cosine ? load(query + v) * key[u] : load(query + v);
    }
    template <bool Cosine, bool Masked>
    vf at(int64_t u, int64_t v) const {
      vf s = load(products + u * kPanel + v) * factor<Cosine>(u, v) + load(bias + u * step + v);
      if constexpr (Masked) s += load(column_region + v) != region[u] ? vf{} + kApart : vf{};
      return s;
    }
  };
  // query: [64] as of `query_factors`; own: [N][64], where the table is not spread out for all
  Scores scores(const Tokens& tokens, int64_t head, int64_t block, const float* products, const float* query, const float* key,
                float* own) const {
    Scores s{products, one, 0, query, key, tokens.region + block * kPanel, tokens.region};
    if (!p.table) return s;
    s.step = kPanel, s.bias = own;
    if (has_dense()) s.bias = dense + (head * blocks + block) * block_floats();
    else spread(head, block, own);
    return s;
  }
  // Of a block's query rows, [64] each; zeros for those that there are not.
  void query_factors(const S* const* rows, int64_t count, int64_t head, float* norms, float* factors) const {
    if (p.logit_scale) inverse_norms(rows, count, norms);
    for (int64_t t = 0; t < kPanel; ++t) {
      norms[t] = t >= count ? 0.f : p.logit_scale ? norms[t] : 1.f;
      factors[t] = norms[t] * (p.logit_scale ? p.logit_scale[head] : p.scale);
    }
  }
};

// One call of a pass on its team: shared memory, a member's, and pass.run(team, member).
template <class Pass>
void run_pass(Pass& pass, int threads) {
  struct Context {
    Pass& pass;
    char* members;
    size_t bytes;
  } context{pass, nullptr, 0};
  typename Pass::Member one;
  Layout member{nullptr}, size{nullptr};
  pass.lay_out(member, one), context.bytes = member.bytes;
  pass.lay_out_shared(size), size.take<char>(threads * static_cast<int64_t>(context.bytes));
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out_shared(at);
  context.members = at.take<char>(threads * static_cast<int64_t>(context.bytes));
  cpu::run_team(
      threads,
      [](const Team& team, void* context) {
        const Context& c = *static_cast<const Context*>(context);
        Layout own{c.members + team.rank * c.bytes};
        typename Pass::Member me;
        c.pass.lay_out(own, me);
        c.pass.prepare(team);
        c.pass.run(team, me);
      },
      &context);
}

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
