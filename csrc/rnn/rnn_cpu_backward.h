// One recurrent layer backward on the CPU: one parallel region.
//
// A token is a (step, row) pair that exists; tokens are numbered step by step, rows by falling length, and padding has none.
// 1. From the last step to the first: dh = dy + dgates_{s+1} W_hh (panels of 64 units, K = G*H), pointwise, dgates of every token
//    kept, [tokens][D*H]. Threads split the panels as in forward; one barrier a step (reset-before GRU: two).
//      lstm, rnn, gru_reset_before  D = G, torch's gate order; input and hidden side see the same gradient
//      gru                          D = 4: dn*r, dr, dz, dn. The hidden side sees the first three (W_hh is packed n, r, z), the
//                                   input side the last three
// 2. grad_input = dgates W_ih, tokens split among the threads.
// 3. grad_weight = dgates^T [x | h_{t-1}]: rows split among the threads, K-blocks of 256 tokens in fixed order (the same bits
//    with any number of threads); dgates^T packed 48 x 256 (48 KiB, L1/L2), activations 256 x 512 (512 KiB, L2).
// Floor: 2 * tokens * G*H * (I+H) flops each for 1+2 and for 3; 2 needs dgates from memory once, 3 twice.
#pragma once
#include "rnn_cpu_backward_cells.h"

namespace pyops::rnn::PYOPS_ISA {
namespace {

template <class S, int G>
struct BackwardPass {
  using T = typename Gemm<S>::Real;
  static constexpr int kRowBlock = kRows<T, 64>;
  static constexpr int64_t kFew = 8;                                   // tokens whose outer products are summed in registers
  static constexpr int64_t kTokens = 96;                               // of a grad_input block
  static constexpr int64_t kBlockM = 48, kDepth = 256, kBlockN = 512;  // of a grad_weight block

  const LayerBackward& p;
  const bool reset_before, packed;
  const int64_t H, D, ldd, ldh, panels, panels_i, ldc, ldt;
  T *weight_hh, *weight_ih, *dgates, *carry, *blocks, *product;
  double* bias;
  int64_t *order, *len, *base, *token_time, *token_row;
  const T** row_pointers;
  int64_t steps = 0, tokens = 0;

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  BackwardPass(const LayerBackward& params)
      : p(params),
        reset_before(p.cell == Cell::gru_reset_before),
        packed(p.T > 1 || p.B > kRowBlock),  // else every weight is used once
        H(p.H),
        D(p.cell == Cell::gru ? 4 : G),
        ldd(round_up(D * H, 16) + 16),
        ldh(round_up(H, 64)),
        panels((H + 63) / 64),
        panels_i((p.I + 63) / 64),
        ldc(round_up(p.I > H ? p.I : H, 64)),
        ldt(kDepth + 16) {}

  int64_t block_size() const { return kTokens * 64 + kBlockM * ldt + kBlockN * kDepth; }

  void lay_out(Layout& at, int threads) {
    order = at.take<int64_t>(p.B), len = at.take<int64_t>(p.B), base = at.take<int64_t>(p.T + 1);
    if (at.base) number_tokens();
    const int64_t most = at.base ? tokens : count_tokens();
    token_time = at.take<int64_t>(most), token_row = at.take<int64_t>(most);
    weight_hh = at.take<T>(packed ? panels * G * H * 64 : 0);
    weight_ih = at.take<T>(packed && p.grad_input.data ? panels_i * G * H * 64 : 0);
    dgates = at.take<T>(most * ldd);
    carry = at.take<T>(p.B * ldh);
    blocks = at.take<T>(threads * block_size());
    product = at.take<T>(p.grad_weight_ih || p.grad_weight_hh ? 2 * G * H * ldc : 0);
    bias = at.take<double>(threads * D * H);
    row_pointers = at.take<const T*>(threads * kDepth);
  }
  int64_t count_tokens() const {
    int64_t count = p.lengths ? 0 : p.T * p.B;
    for (int64_t b = 0; p.lengths && b < p.B; ++b) count += p.lengths[b];
    return count;
  }
  void number_tokens() {
    sort_rows(p.lengths, p.T, p.B, order, len);
    steps = p.B ? len[0] : 0;
    int64_t alive = p.B;
    for (int64_t s = 0; s < steps; ++s) {
      while (len[alive - 1] <= s) --alive;
      base[s] = tokens, tokens += alive;
    }
    base[steps] = tokens;
  }

  int64_t alive(int64_t s) const { return s < steps ? base[s + 1] - base[s] : 0; }
  int64_t time(int64_t s, int64_t j) const { return p.reverse ? len[j] - 1 - s : s; }
  const T* reserve(int64_t s, int64_t j) const {
    return static_cast<const T*>(p.reserve) + (time(s, j) * p.B + order[j]) * saved(p.cell) * H;
  }
  template <class R>
  static R* at(const Rows& rows, int64_t t, int64_t b) {
    return static_cast<R*>(rows.data) + t * rows.t + b * rows.b;
  }
  // h_{t-1} of row j at step s; null: zeros.
  const S* previous_h(int64_t s, int64_t j) const {
    if (s > 0) return at<const S>(p.output, time(s - 1, j), order[j]);
    return p.h0 ? static_cast<const S*>(p.h0) + order[j] * H : nullptr;
  }
  // 64 units from u0 as T, zeros where there is nothing.
  static void fetch(T* to, const S* from, int64_t u0, int n) {
    if (!from || n < 64) __builtin_memset(to, 0, 64 * sizeof(T));
    if (from) load_row(to, from + u0, n);
  }

  // ---------------------------------------------------------------------------------------------- before the steps

  // Rows k0 .. k0 + count (at most 64) of 64 columns of W_hh (rows n, r, z for the GRU) or W_ih.
  void pack_slice(bool recurrent, int64_t panel, int64_t k0, int64_t count, T* to) const {
    const int64_t width = recurrent ? H : p.I;
    const S* rows[64];
    for (int64_t k = 0; k < count; ++k) {
      int64_t from = k0 + k;
      if (recurrent && p.cell == Cell::gru) from = from < H ? from + 2 * H : from - H;
      rows[k] = static_cast<const S*>(recurrent ? p.weight_hh : p.weight_ih) + from * width;
    }
    pack_columns(rows, count, panel * 64, width, to);
  }

  void pack_weights(const Team& team) {
    const int64_t K = G * H, slices = (K + 63) / 64, all = panels + (p.grad_input.data ? panels_i : 0);
    for (int64_t item = team.rank; item < all * slices; item += team.size) {
      const int64_t k0 = item % slices * 64, at = item / slices;
      const bool recurrent = at < panels;
      const int64_t panel = recurrent ? at : at - panels;
      pack_slice(recurrent, panel, k0, K - k0 < 64 ? K - k0 : 64, (recurrent ? weight_hh : weight_ih) + (panel * K + k0) * 64);
    }
  }

  // out[r] (+)= a[r] . rows k0 .. k0 + K of a panel, 64 columns.
  void multiply(int64_t rows, const T* const* a, bool recurrent, int64_t panel, int64_t k0, int64_t K, T* out, bool accumulate) const {
    const int n = static_cast<int>(rows);
    if (packed) return panel_rows<64, 64>(n, a, (recurrent ? weight_hh : weight_ih) + (panel * G * H + k0) * 64, K, out, 64, accumulate);
    alignas(64) T slice[64 * 64];  // packed in L1 and used there
    const T* part[kRowBlock];
    for (int64_t k = 0; k < K; k += 64) {
      const int64_t count = K - k < 64 ? K - k : 64;
      pack_slice(recurrent, panel, k0 + k, count, slice);
      for (int r = 0; r < n; ++r) part[r] = a[r] + k;
      panel_rows<64, 64>(n, part, slice, count, out, 64, accumulate || k > 0);
    }
  }

  void start_row(int64_t j) {
    const int64_t b = order[j];
    const void* from = p.cell == Cell::lstm ? p.grad_c_n : G == 3 ? p.grad_h_n : nullptr;
    __builtin_memset(carry + j * ldh, 0, ldh * sizeof(T));
    if (from) load_row(carry + j * ldh, static_cast<const S*>(from) + b * H, H);
    for (int64_t s = 0; s < len[j]; ++s) token_time[base[s] + j] = time(s, j), token_row[base[s] + j] = j;
    if (p.grad_input.data)
      for (int64_t t = len[j]; t < p.T; ++t) __builtin_memset(at<S>(p.grad_input, t, b), 0, p.I * sizeof(S));
    if (len[j] == 0 && p.grad_h0) {
      S* to = static_cast<S*>(p.grad_h0) + b * H;
      if (p.grad_h_n) __builtin_memcpy(to, static_cast<const S*>(p.grad_h_n) + b * H, H * sizeof(S));
      else __builtin_memset(to, 0, H * sizeof(S));
    }
  }

  // ------------------------------------------------------------------------------------------------------- the steps

  struct Thread {
    int64_t panel0, panel1, first, stride, rows;
    double* bias;  // its group's sums, [D*H]
    int64_t row(int64_t i) const { return first + i * stride; }
    int64_t among(int64_t rows_alive) const { return rows_alive <= first ? 0 : (rows_alive - first + stride - 1) / stride; }
  };
  enum Phase { kWhole, kReset, kInitial };

  // kWhole: dh of step s and all that follows from it (reset-before: dz, dn). kReset: dr, from dn of the same step.
  // kInitial (s = -1): the gradient of h0.
  template <int PHASE>
  void step(const Thread& me, int64_t s) {
    const int64_t from = PHASE == kReset ? s : s + 1;  // step whose dgates are multiplied
    const int64_t k0 = PHASE == kReset ? 2 * H : 0, K = PHASE == kReset ? H : reset_before ? 2 * H : G * H;
    const int64_t count = me.among(alive(PHASE == kInitial ? 0 : s)), fed = me.among(alive(from));
    alignas(64) T tile[kRowBlock * 64];
    alignas(64) T sums[4 * 64];
    for (int64_t panel = me.panel0; panel < me.panel1; ++panel) {
      const int n = static_cast<int>(H - panel * 64 < 64 ? H - panel * 64 : 64);
      for (int64_t i = 0, rows; i < count; i += rows) {
        __builtin_memset(sums, 0, sizeof sums);
        rows = block_rows((i < fed ? fed : count) - i, kRowBlock);
        if (i < fed) {
          const T* a[kRowBlock];
          for (int64_t r = 0; r < rows; ++r) a[r] = dgates + (base[from] + me.row(i + r)) * ldd + k0;
          multiply(rows, a, true, panel, k0, K, tile, false);
        } else {
          __builtin_memset(tile, 0, sizeof tile);
        }
        for (int64_t r = 0; r < rows; ++r) finish_row<PHASE>(s, me.row(i + r), panel * 64, n, tile + r * 64, sums);
        for (int64_t k = 0; k < D && PHASE != kInitial; ++k)
          for (int u = 0; u < n; ++u) me.bias[k * H + panel * 64 + u] += sums[k * 64 + u];
      }
    }
  }

  template <int PHASE>
  void finish_row(int64_t s, int64_t j, int64_t u0, int n, T* dh, T* sums) {
    constexpr int N = Simd<T>::N;
    const int64_t b = order[j];
    T* own = carry + j * ldh + u0;
    if constexpr (PHASE == kInitial) {
      if (G == 3)
        for (int u = 0; u < 64; u += N) store(dh + u, load(dh + u) + load(own + u));
      if (p.grad_h0) store_row(static_cast<S*>(p.grad_h0) + b * H + u0, dh, n);
    } else {
      alignas(64) T buffer[64];
      alignas(64) T prev[64];
      const auto add = [&](const S* from) {
        fetch(buffer, from, u0, n);
        for (int u = 0; u < 64; u += N) store(dh + u, load(dh + u) + load(buffer + u));
      };
      if (PHASE == kWhole) {
        if (p.grad_output.data) add(at<const S>(p.grad_output, time(s, j), b));
        if (G != 3 && s == len[j] - 1 && p.grad_h_n) add(static_cast<const S*>(p.grad_h_n) + b * H);
      }
      const T* kept = G == 1 ? nullptr : reserve(s, j) + u0;
      BackwardRow<T> row{dh, kept, prev, buffer, own, dgates + (base[s] + j) * ldd + u0, sums, H, n};
      if constexpr (G == 4) {
        if (s > 0 && n == 64) row.prev = reserve(s - 1, j) + 4 * H + u0;
        else if (s > 0) load_row(prev, reserve(s - 1, j) + 4 * H + u0, n);
        else fetch(prev, p.c0 ? static_cast<const S*>(p.c0) + b * H : nullptr, u0, n);
        lstm_backward_row(row);
      } else if constexpr (G == 3) {
        fetch(prev, previous_h(s, j), u0, n);
        if (PHASE == kReset) gru_reset_backward_row(row);
        else if (reset_before) gru_candidate_backward_row(row);
        else gru_backward_row(row);
      } else {
        fetch(buffer, at<const S>(p.output, time(s, j), b), u0, n);
        rnn_backward_row(p.cell, row);
      }
    }
  }

  void walk(const Team& team, cpu::Barrier* barriers) {
    const Split split = choose_split(panels, p.B, team.size);
    if (team.rank >= split.units * split.rows) return;
    const int group = team.rank / split.units, unit = team.rank % split.units;
    const Thread me{panels * unit / split.units, panels * (unit + 1) / split.units, group, split.rows, p.B, bias + group * D * H};
    for (int64_t k = 0; k < D; ++k)
      for (int64_t u = me.panel0 * 64; u < H && u < me.panel1 * 64; ++u) me.bias[k * H + u] = 0;
    for (int64_t s = steps - 1; s >= 0; --s) {
      step<kWhole>(me, s);
      cpu::wait(barriers + group * split.units, unit, split.units);
      if constexpr (G == 3)
        if (reset_before) {
          step<kReset>(me, s);
          cpu::wait(barriers + group * split.units, unit, split.units);
        }
    }
    if (p.grad_h0 && steps > 0) step<kInitial>(me, -1);
    if (G == 4 && p.grad_c0)
      for (int64_t i = 0; i < me.among(p.B); ++i)
        for (int64_t panel = me.panel0; panel < me.panel1; ++panel)
          store_row(static_cast<S*>(p.grad_c0) + order[me.row(i)] * H + panel * 64, carry + me.row(i) * ldh + panel * 64,
                    H - panel * 64 < 64 ? H - panel * 64 : 64);
  }

  // ------------------------------------------------------------------------------------------------- dense gradients

  int64_t input_side() const { return p.cell == Cell::gru ? H : 0; }  // first column of dgates that the input sees

  void input_gradient(const Team& team, T* out) {
    constexpr int64_t kSlice = 512;  // of K: the panel's slice, 128 KiB, stays in L2 for all of the block's rows
    for (int64_t k0 = team.rank * kTokens; k0 < tokens; k0 += team.size * kTokens) {
      const int64_t count = tokens - k0 < kTokens ? tokens - k0 : kTokens;
      for (int64_t panel = 0; panel < panels_i; ++panel) {
        for (int64_t k = 0; k < G * H; k += kSlice)
          for (int64_t i = 0, n; i < count; i += n) {
            n = block_rows(count - i, kRowBlock);
            const T* a[kRowBlock];
            for (int64_t r = 0; r < n; ++r) a[r] = dgates + (k0 + i + r) * ldd + input_side() + k;
            multiply(n, a, false, panel, k, G * H - k < kSlice ? G * H - k : kSlice, out + i * 64, k > 0);
          }
        const int64_t width = p.I - panel * 64 < 64 ? p.I - panel * 64 : 64;
        for (int64_t i = 0; i < count; ++i)
          store_row(at<S>(p.grad_input, token_time[k0 + i], order[token_row[k0 + i]]) + panel * 64, out + i * 64, width);
      }
    }
  }

  // rows[i] = the activations of token k0 + i that its dgates multiply.
  enum Source { kInput, kHidden, kResetHidden };
  template <class R>
  void source_rows(Source source, int64_t k0, int64_t count, const R** rows) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = token_time[k0 + i], j = token_row[k0 + i], s = p.reverse ? len[j] - 1 - t : t;
      if constexpr (std::is_same_v<R, T>)
        if (source == kResetHidden) {
          rows[i] = reserve(s, j) + 3 * H;
          continue;
        }
      if constexpr (std::is_same_v<R, S>) rows[i] = source == kInput ? at<const S>(p.input, t, order[j]) : previous_h(s, j);
    }
  }
  template <class R>
  void pack_source(Source source, int64_t k0, int64_t count, int64_t n0, int64_t width, const T** pointers, T* to) {
    const R** rows = reinterpret_cast<const R**>(pointers);
    source_rows(source, k0, count, rows);
    for (int64_t n = n0; n < width && n < n0 + kBlockN; n += 64) pack_columns(rows, count, n, width, to + (n - n0) * kDepth);
  }

  // to[m][k] = dgates[k0 + k][column + m], m < kBlockM (padded), k < count.
  void transpose_gates(int64_t k0, int64_t count, int64_t column, int64_t rows, T* to) {
    constexpr int N = Simd<T>::N;
    for (int64_t k = 0; k < count; k += N)
      for (int64_t m = 0; m < rows; m += N) {
        Vec<T> v[N];
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
          v[i] = k + i < count ? load(dgates + (k0 + k + i) * ldd + column + m) : Vec<T>{};  // ldd pads the last vector
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store(to + (m + i) * ldt + k, v[i]);
      }
  }

  // The same for a few tokens: each gradient is written once, where it belongs. Floor: the bytes of the gradient.
  void outer_products(S* grad, int64_t column, int64_t m0, int64_t m1, Source source, int64_t width, T* activations, const T** pointers) {
    constexpr int N = Simd<T>::N;
    for (int64_t n0 = 0; n0 < width; n0 += kBlockN) {
      if (source == kResetHidden) pack_source<T>(source, 0, tokens, n0, width, pointers, activations);
      else pack_source<S>(source, 0, tokens, n0, width, pointers, activations);
      for (int64_t m = m0; m < m1; ++m)
        for (int64_t n = n0; n < width && n < n0 + kBlockN; n += 64) {
          alignas(64) T sums[64];
          const T* x = activations + (n - n0) * kDepth;
          for (int c = 0; c < 64; c += N) {
            Vec<T> sum{};
            for (int64_t k = 0; k < tokens; ++k) sum += splat<T>(dgates[k * ldd + column + m]) * load(x + k * 64 + c);
            store(sums + c, sum);
          }
          store_row(grad + m * width + n, sums, width - n < 64 ? width - n : 64);
        }
    }
  }

  // grad[first_row + m, n] = sum over tokens of dgates[token][column + m] * source[token][n], m < M.
  void weight_gradient(const Team& team, S* grad, int64_t column, int64_t M, int64_t first_row, Source source, int64_t width, T* gates,
                       T* activations, const T** pointers) {
    const int64_t units = (M + kBlockM - 1) / kBlockM;
    const int64_t m0 = units * team.rank / team.size * kBlockM, end = units * (team.rank + 1) / team.size * kBlockM, m1 = end < M ? end : M;
    if (m0 >= m1) return;
    if (tokens > 0 && tokens <= kFew) return outer_products(grad + first_row * width, column, m0, m1, source, width, activations, pointers);
    T* const out = product + (source == kInput ? column - input_side() : G * H + column) * ldc;  // no two jobs share a row
    for (int64_t n0 = 0; n0 < width; n0 += kBlockN)
      for (int64_t k0 = 0; k0 < tokens; k0 += kDepth) {
        const int64_t depth = tokens - k0 < kDepth ? tokens - k0 : kDepth;
        if (source == kResetHidden) pack_source<T>(source, k0, depth, n0, width, pointers, activations);
        else pack_source<S>(source, k0, depth, n0, width, pointers, activations);
        for (int64_t m = m0; m < m1; m += kBlockM) {
          const int64_t rows = m1 - m < kBlockM ? m1 - m : kBlockM;
          transpose_gates(k0, depth, column + m, rows, gates);
          for (int64_t n = n0; n < width && n < n0 + kBlockN; n += 64)
            for (int64_t i = 0, block; i < rows; i += block) {
              block = block_rows(rows - i, kRowBlock);
              const T* a[kRowBlock];
              for (int64_t r = 0; r < block; ++r) a[r] = gates + (i + r) * ldt;
              panel_rows<64, 64>(static_cast<int>(block), a, activations + (n - n0) * kDepth, depth, out + (m + i) * ldc + n, ldc, k0 > 0);
            }
        }
      }
    for (int64_t m = m0; m < m1; ++m) {
      S* to = grad + (first_row + m) * width;
      if (tokens) store_row(to, out + m * ldc, width);
      else __builtin_memset(to, 0, width * sizeof(S));
    }
  }

  void bias_gradient(void* grad, int groups, bool hidden) {
    if (!grad) return;
    for (int64_t m = 0; m < G * H; ++m) {
      int64_t column = m + (hidden ? 0 : input_side());
      if (hidden && p.cell == Cell::gru) column = m < 2 * H ? m + H : m - 2 * H;
      double sum = 0;
      for (int group = 0; group < groups; ++group) sum += bias[group * D * H + column];
      static_cast<S*>(grad)[m] = narrow<S>(static_cast<T>(sum));
    }
  }

  void run(const Team& team, cpu::Barrier* barriers) {
    if (packed) pack_weights(team);
    for (int64_t j = team.rank; j < p.B; j += team.size) start_row(j);
    team.sync();
    walk(team, barriers);
    team.sync();
    T* mine = blocks + team.rank * block_size();
    const T** pointers = row_pointers + team.rank * kDepth;
    if (p.grad_input.data) input_gradient(team, mine);
    T *gates = mine + kTokens * 64, *activations = gates + kBlockM * ldt;
    S* ih = static_cast<S*>(p.grad_weight_ih);
    S* hh = static_cast<S*>(p.grad_weight_hh);
    if (ih) weight_gradient(team, ih, input_side(), G * H, 0, kInput, p.I, gates, activations, pointers);
    if (hh && reset_before) {
      weight_gradient(team, hh, 0, 2 * H, 0, kHidden, H, gates, activations, pointers);
      weight_gradient(team, hh + 2 * H * H, 2 * H, H, 0, kResetHidden, H, gates, activations, pointers);
    } else if (hh && p.cell == Cell::gru) {
      weight_gradient(team, hh, 0, H, 2 * H, kHidden, H, gates, activations, pointers);
      weight_gradient(team, hh, H, 2 * H, 0, kHidden, H, gates, activations, pointers);
    } else if (hh) {
      weight_gradient(team, hh, 0, G * H, 0, kHidden, H, gates, activations, pointers);
    }
    if (team.rank == team.size - 1) {
      const int groups = choose_split(panels, p.B, team.size).rows;
      bias_gradient(p.grad_bias_ih, groups, false);
      bias_gradient(p.grad_bias_hh, groups, true);
    }
  }
};

template <class S, int G>
void backward(const LayerBackward& p) {
  using Pass = BackwardPass<S, G>;
  int threads = cpu::max_threads();
  if (static_cast<double>(p.T) * p.B * G * p.H * (p.I + p.H) < 5e5) threads = 1;  // waking the pool costs more
  Pass pass(p);
  Layout size{nullptr};
  pass.lay_out(size, threads);
  size.take<cpu::Barrier>(threads);
  Layout block{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(block, threads);
  struct Context {
    Pass* pass;
    cpu::Barrier* barriers;
  } context{&pass, block.take<cpu::Barrier>(threads)};
  for (int i = 0; i < threads; ++i) context.barriers[i] = {};
  cpu::run_team(
      threads,
      [](const Team& team, void* at) {
        auto* c = static_cast<Context*>(at);
        c->pass->run(team, c->barriers);
      },
      &context);
}

template <int G>
void backward_any(const LayerBackward& p) {
  switch (p.dtype) {
    case DType::f32: return backward<float, G>(p);
    case DType::f64: return backward<double, G>(p);
    case DType::bf16: return backward<bf16, G>(p);
    case DType::f16: return backward<f16, G>(p);
  }
}

}  // namespace
}  // namespace pyops::rnn::PYOPS_ISA
