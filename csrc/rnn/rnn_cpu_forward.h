// One recurrent layer forward on the CPU: the whole sequence in one parallel region.
//
// Layouts: weights become panels [panel][K][64 or 48], a panel being G gates x 16 units (rnn: 64 units), so that one GEMM tile
// holds every gate of its units and the pointwise part follows while the tile is in L1. h lives in a double buffer
// [2][B][ldh] of the GEMM's type, c (and the GRU's h in full precision) in [B][ldh].
// Threads split the panels. For each chunk of steps a thread computes x W_ih^T of its own panels (no barrier: only it reads
// them) into gates [panel][chunk row][64 or 48], sized to stay in L2, then walks the steps with one barrier each (reset-before GRU: two).
// Floors: flops 2*T*B*G*H*(I+H) over peak; at B = 1 the bytes of W_hh from L2, T times.
#pragma once
#include "rnn_cpu_cells.h"

namespace pyops::rnn::PYOPS_ISA {
namespace {

template <class S, int G>
struct ForwardPass {
  using E = typename Gemm<S>::Elem;
  using T = typename Gemm<S>::Real;
  static constexpr int U = G == 1 ? 64 : 16;         // units of a panel
  static constexpr int COLS = G == 1 ? 64 : 16 * G;  // columns of a panel
  static constexpr int ROWS = kRows<E, COLS>;
  static constexpr bool kStage = !std::is_same_v<S, E>;  // input rows must be converted before the GEMM reads them

  const LayerForward& p;
  const int64_t panels, ldi, ldh, chunk_rows;
  const bool stage_input, reset_before;
  // Scratch, shared by the team.
  E *weight_ih, *weight_hh, *h[2], *reset_h, *staged;
  T *bias, *state, *gates, *update;
  int64_t *order, *len;
  const E** input_rows;

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  // 256 KiB of gates per thread: with the panel they stay in L2 (1 MiB), and W_ih is read once per 64 rows or more.
  int64_t pick_chunk(int64_t columns, int threads) const {
    int64_t most = (int64_t{256} << 10) * threads / (columns * static_cast<int64_t>(sizeof(T)));
    most = most < 64 ? 64 : most > 512 ? 512 : most;
    const int64_t B = p.B ? p.B : 1;
    return p.T <= most / B ? (p.T ? p.T : 1) * B : most;
  }

  ForwardPass(const LayerForward& params, int threads)
      : p(params),
        panels((p.H + U - 1) / U),
        ldi(round_up(p.I, 16) + 16),
        ldh(round_up(p.H, U) + 16),
        chunk_rows(pick_chunk(panels * COLS, threads)),
        stage_input(kStage || (sizeof(E) == 2 && p.I % 2)),
        reset_before(p.cell == Cell::gru_reset_before) {}

  void lay_out(Layout& at, int threads) {
    weight_ih = at.take<E>(panels * round_up(p.I, 2) * COLS);
    weight_hh = at.take<E>(panels * round_up(p.H, 2) * COLS);
    for (E*& buffer : h) buffer = at.take<E>(p.B * ldh);
    reset_h = at.take<E>(reset_before ? p.B * ldh : 0);
    staged = at.take<E>(stage_input ? threads * chunk_rows * ldi : 0);
    bias = at.take<T>(panels * 64);
    state = at.take<T>(G == 1 ? 0 : p.B * ldh);
    update = at.take<T>(reset_before ? p.B * ldh : 0);
    gates = at.take<T>(threads * panels * chunk_rows * COLS);
    order = at.take<int64_t>(p.B);
    len = at.take<int64_t>(p.B);
    input_rows = at.take<const E*>(threads * chunk_rows);
  }

  // ------------------------------------------------------------------------------------------------ before the steps

  void pack_weights(const Team& team) {
    constexpr int64_t kSlice = 256;  // of K: enough items for every thread when panels are few
    const int64_t slices_i = (p.I + kSlice - 1) / kSlice, slices = slices_i + (p.H + kSlice - 1) / kSlice;
    for (int64_t item = team.rank; item < panels * slices; item += team.size) {
      const int64_t panel = item / slices, slice = item % slices;
      const bool recurrent = slice >= slices_i;
      const int64_t K = recurrent ? p.H : p.I, k0 = (recurrent ? slice - slices_i : slice) * kSlice;
      const S* w = static_cast<const S*>(recurrent ? p.weight_hh : p.weight_ih);
      E* to = (recurrent ? weight_hh : weight_ih) + panel * round_up(K, 2) * COLS;
      for (int group = 0; group < COLS / 16; ++group) {
        const S* rows[16];
        for (int c = 0; c < 16; ++c) {
          const int64_t unit = panel * U + (G == 1 ? group * 16 : 0) + c;
          rows[c] = unit < p.H ? w + ((G == 1 ? 0 : group) * p.H + unit) * K : nullptr;
        }
        pack_rows<COLS>(rows, k0, k0 + kSlice < K ? k0 + kSlice : K, K, to + group * 16 * kPair<E>);
      }
      if (slice == 0)
        pack_bias<G>(p.cell, static_cast<const S*>(p.bias_ih), static_cast<const S*>(p.bias_hh), p.H, panel, bias + panel * 64);
    }
  }

  static void copy_row(E* to, const S* from, int64_t n) {
    if constexpr (kStage) load_row(to, from, n);
    else __builtin_memcpy(to, from, n * sizeof(S));
  }

  void start_row(int64_t j) {
    const int64_t b = order[j], H = p.H;
    const S* h0 = p.h0 ? static_cast<const S*>(p.h0) + b * H : nullptr;
    const S* start = p.cell == Cell::lstm ? (p.c0 ? static_cast<const S*>(p.c0) + b * H : nullptr) : h0;
    for (E* buffer : h) __builtin_memset(buffer + j * ldh, 0, ldh * sizeof(E));
    if (reset_before) __builtin_memset(reset_h + j * ldh, 0, ldh * sizeof(E));
    if (h0) copy_row(h[0] + j * ldh, h0, H);
    if (G != 1) {
      __builtin_memset(state + j * ldh, 0, ldh * sizeof(T));
      if (start) load_row(state + j * ldh, start, H);
    }
    if (len[j] == 0)
      for (int64_t k = 0; k < H; ++k) {
        static_cast<S*>(p.h_n)[b * H + k] = h0 ? h0[k] : S{};
        if (p.cell == Cell::lstm) static_cast<S*>(p.c_n)[b * H + k] = start ? start[k] : S{};
      }
    const int64_t width = saved(p.cell) * H;
    for (int64_t t = len[j]; t < p.T; ++t) {
      __builtin_memset(output(t, b), 0, H * sizeof(S));
      if (p.reserve) __builtin_memset(static_cast<T*>(p.reserve) + (t * p.B + b) * width, 0, width * sizeof(T));
    }
  }

  S* output(int64_t t, int64_t b) const { return static_cast<S*>(p.output.data) + t * p.output.t + b * p.output.b; }
  int64_t time(int64_t s, int64_t j) const { return p.reverse ? len[j] - 1 - s : s; }

  // ------------------------------------------------------------------------------------------------------- one thread

  struct Thread {
    int64_t panel0, panel1;       // its panels
    int64_t first, stride, rows;  // its group's rows: first, first + stride, ...
    T* gates;                     // [panel - panel0][chunk_rows][COLS]
    E* staged;
    const E** input_rows;
    int64_t row(int64_t i) const { return first + i * stride; }
  };

  // Gates of the input for steps s0..s1 and rows i0..i1 of the group, those alive; chunk rows in the order of this loop.
  void input_gemm(const Thread& me, int64_t s0, int64_t s1, int64_t i0, int64_t i1) {
    int64_t count = 0;
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = i0; i < i1 && len[me.row(i)] > s; ++i, ++count) {
        const int64_t j = me.row(i);
        const S* x = static_cast<const S*>(p.input.data) + time(s, j) * p.input.t + order[j] * p.input.b;
        if (stage_input) {
          E* row = me.staged + count * ldi;
          copy_row(row, x, p.I);
          row[p.I] = E{};
          me.input_rows[count] = row;
        } else {
          if constexpr (!kStage) me.input_rows[count] = x;
        }
      }
    for (int64_t panel = me.panel0; panel < me.panel1; ++panel) {
      const E* w = weight_ih + panel * round_up(p.I, 2) * COLS;
      T* to = me.gates + (panel - me.panel0) * chunk_rows * COLS;
      for (int64_t r = 0, n; r < count; r += n) {
        n = block_rows(count - r, ROWS);
        panel_rows<COLS, COLS>(static_cast<int>(n), me.input_rows + r, w, p.I, to + r * COLS, COLS);
      }
    }
  }

  enum Phase { kWhole, kReset, kCandidate };

  // Step s for rows i0..i1 of the group, whose input gates start at chunk row `at`.
  template <int PHASE>
  void step(const Thread& me, int64_t s, int64_t i0, int64_t i1, int64_t at) {
    constexpr int C0 = PHASE == kCandidate ? 32 : 0, C = PHASE == kReset ? 32 : PHASE == kCandidate ? 16 : COLS;
    constexpr int kBlock = kRows<E, C>;
    const E* from = PHASE == kCandidate ? reset_h : h[s % 2];
    alignas(64) T tile[kBlock * COLS];
    for (int64_t panel = me.panel0; panel < me.panel1; ++panel) {
      const E* w = weight_hh + panel * round_up(p.H, 2) * COLS + C0 * kPair<E>;
      const T* gx = me.gates + ((panel - me.panel0) * chunk_rows + at) * COLS;
      for (int64_t i = i0, n; i < i1; i += n) {
        n = block_rows(i1 - i, kBlock);
        const E* a[kBlock];
        for (int r = 0; r < n; ++r) a[r] = from + me.row(i + r) * ldh;
        panel_rows<COLS, C>(static_cast<int>(n), a, w, p.H, tile + C0, COLS);
        finish_rows<PHASE>(me, panel, s, i, static_cast<int>(n), tile, gx + (i - i0) * COLS);
      }
    }
  }

  template <int PHASE>
  void finish_rows(const Thread& me, int64_t panel, int64_t s, int64_t i, int rows, const T* tile, const T* gx) {
    const int64_t u0 = panel * U, H = p.H;
    const int n = static_cast<int>(H - u0 < U ? H - u0 : U);
    alignas(64) T out[Block<T>::kMost * U];
    Block<T> a;
    a.rows = rows, a.n = n, a.ld = COLS, a.H = H, a.tile = tile, a.gx = gx, a.bias = bias + panel * 64, a.out = out;
    for (int r = 0; r < rows; ++r) {
      const int64_t j = me.row(i + r);
      a.state[r] = state + j * ldh + u0;
      a.update[r] = update + j * ldh + u0;
      a.save[r] = p.reserve ? static_cast<T*>(p.reserve) + (time(s, j) * p.B + order[j]) * saved(p.cell) * H + u0 : nullptr;
    }
    if constexpr (G == 4) lstm_rows(a);
    else if constexpr (G == 1) rnn_rows(p.cell, a);
    else if constexpr (PHASE == kWhole) gru_rows(a);
    else if constexpr (PHASE == kReset) gru_reset_rows(a);
    else gru_candidate_rows(a);
    for (int r = 0; r < rows; ++r) {
      const int64_t j = me.row(i + r), b = order[j];
      const T* next = out + r * U;
      if constexpr (PHASE == kReset) {
        store_row(reset_h + j * ldh + u0, next, U);
      } else {
        store_row(h[(s + 1) % 2] + j * ldh + u0, next, U);
        store_row(output(time(s, j), b) + u0, next, n);
        if (s == len[j] - 1) {
          store_row(static_cast<S*>(p.h_n) + b * H + u0, next, n);
          if constexpr (G == 4) store_row(static_cast<S*>(p.c_n) + b * H + u0, a.state[r], n);
        }
      }
    }
  }

  void run(const Team& team, cpu::Barrier* barriers) {
    const Split split = choose_split(panels, p.B, team.size);
    pack_weights(team);
    for (int64_t j = team.rank; j < p.B; j += team.size) start_row(j);
    team.sync();
    if (team.rank >= split.units * split.rows) return;
    const int group = team.rank / split.units, unit = team.rank % split.units;
    Thread me;
    me.panel0 = panels * unit / split.units, me.panel1 = panels * (unit + 1) / split.units;
    me.first = group, me.stride = split.rows, me.rows = p.B <= group ? 0 : (p.B - group + split.rows - 1) / split.rows;
    me.gates = gates + (group * panels + me.panel0) * chunk_rows * COLS;
    me.staged = staged + (stage_input ? team.rank * chunk_rows * ldi : 0);
    me.input_rows = input_rows + team.rank * chunk_rows;
    const int64_t steps = me.rows ? len[me.first] : 0;
    int64_t alive = me.rows;
    for (int64_t s0 = 0, s1; s0 < steps; s0 = s1) {
      while (len[me.row(alive - 1)] <= s0) --alive;
      s1 = s0 + (alive < chunk_rows ? chunk_rows / alive : 1);
      if (s1 > steps) s1 = steps;
      for (int64_t i0 = 0; i0 < alive; i0 += chunk_rows) {  // more than one turn only when a single step overflows the chunk
        int64_t i1 = i0 + chunk_rows < alive ? i0 + chunk_rows : alive;
        input_gemm(me, s0, s1, i0, i1);
        for (int64_t s = s0, at = 0; s < s1; at += i1 - i0, ++s) {
          while (i1 > i0 && len[me.row(i1 - 1)] <= s) --i1;
          if (!reset_before) {
            step<kWhole>(me, s, i0, i1, at);
          } else if constexpr (G == 3) {
            step<kReset>(me, s, i0, i1, at);
            cpu::wait(barriers + group * split.units, unit, split.units);
            step<kCandidate>(me, s, i0, i1, at);
          }
          if (i0 + chunk_rows >= alive) cpu::wait(barriers + group * split.units, unit, split.units);
        }
      }
    }
  }
};

template <class S, int G>
void forward_sequence(const LayerForward& p) {
  using Pass = ForwardPass<S, G>;
  int threads = cpu::max_threads();
  // Waking the pool costs 2-5 us: below a million multiply-adds (10 us of one core) one thread is faster.
  // Threads meet once a step, 0.2 us where the cores share a cache. T = 64, B = 1, one and two threads: GRU H = 64 (12288
  // multiply-adds a step) 65 and 45 us, RNN H = 128 78 and 56, LSTM H = 64 86 and 58.
  const double step = static_cast<double>(p.B) * G * p.H * p.H;
  if (p.T * static_cast<double>(p.B) * G * p.H * (p.I + p.H) < 1e6 || (p.T > 1 && step < 8192)) threads = 1;
  Pass pass(p, threads);
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
  sort_rows(p.lengths, p.T, p.B, pass.order, pass.len);
  cpu::run_team(
      threads,
      [](const Team& team, void* at) {
        auto* c = static_cast<Context*>(at);
        c->pass->run(team, c->barriers);
      },
      &context);
}

}  // namespace
}  // namespace pyops::rnn::PYOPS_ISA
