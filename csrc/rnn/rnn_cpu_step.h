// A few rows, a few steps (the streaming step above all): dot products straight on the row-major weights, nothing packed.
//
// Unit by unit: its gates' rows of W_ih and W_hh against up to 4 rows of x and h, 4 x 4 accumulators, lanes summed at the end;
// sixteen units make a tile for the same pointwise code as the packed path.
// Floor: the bytes of the weights, once per 4 rows and step. Threads split the units; one barrier per further step.
#pragma once
#include "rnn_cpu_cells.h"

namespace pyops::rnn::PYOPS_ISA {
namespace {

template <class E>
inline void multiply_add(vf& sum, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(E) == 2) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    return;
  }
#endif
  sum += a * b;
}

// acc[m][b] += w[m] . x[b] over K, lane-wise.
template <int M, int NB, class E, class S>
inline void dot(const S* const (&w)[M], const E* const (&x)[NB], int64_t K, vf (&acc)[M][NB]) {
  constexpr int step = kF * kPair<E>;
  int64_t k = 0;
  for (; k + step <= K; k += step) {
    vf b[NB];
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i) b[i] = load(reinterpret_cast<const float*>(x[i] + k));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf a = load_whole<E>(w[m] + k);
      __builtin_prefetch(w[m] + k + K);  // the same place in the next unit's row
#pragma GCC unroll 4
      for (int i = 0; i < NB; ++i) multiply_add<E>(acc[m][i], a, b[i]);
    }
  }
  if (k < K)
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < NB; ++i) multiply_add<E>(acc[m][i], load_lanes<E>(w[m], k, K), load_lanes<E>(x[i], k, K));
}

template <class S, int G>
struct StepPass {
  using E = typename Gemm<S>::Elem;
  static constexpr int U = G == 1 ? 64 : 16;
  static constexpr bool kStage = !std::is_same_v<S, E>;

  const LayerForward& p;
  const int64_t ldi, ldh;
  E *x, *h[2];
  float* state;

  StepPass(const LayerForward& params) : p(params), ldi((p.I + 63) / 64 * 64), ldh((p.H + 63) / 64 * 64) {}

  void lay_out(Layout& at) {
    x = at.take<E>(kStage ? p.T * p.B * ldi : 0);
    for (E*& buffer : h) buffer = at.take<E>(p.B * ldh);
    state = at.take<float>(p.B * ldh);
  }

  S* output(int64_t t, int64_t b) const { return static_cast<S*>(p.output.data) + t * p.output.t + b * p.output.b; }
  const S* input(int64_t t, int64_t b) const { return static_cast<const S*>(p.input.data) + t * p.input.t + b * p.input.b; }

  void start() {
    for (int64_t b = 0; b < p.B; ++b) {
      const S* h0 = p.h0 ? static_cast<const S*>(p.h0) + b * p.H : nullptr;
      const S* from = p.cell == Cell::lstm ? (p.c0 ? static_cast<const S*>(p.c0) + b * p.H : nullptr) : h0;
      E* row = h[0] + b * ldh;
      if (!h0) __builtin_memset(row, 0, ldh * sizeof(E));
      else if constexpr (kStage) load_row(row, h0, p.H);
      else __builtin_memcpy(row, h0, p.H * sizeof(S));
      if constexpr (G != 1) {
        if (from) load_row(state + b * ldh, from, p.H);
        else __builtin_memset(state + b * ldh, 0, ldh * sizeof(float));
        for (int64_t k = p.H; k < ldh; ++k) state[b * ldh + k] = 0;
      }
      if constexpr (kStage)
        for (int64_t t = 0; t < p.T; ++t) load_row(x + (t * p.B + b) * ldi, input(t, b), p.I);
    }
  }

  // Units u0 .. u0 + U of NB rows at step s.
  template <int NB>
  void units(int64_t s, int64_t u0, int64_t b0, const float* bias) {
    const int64_t t = p.reverse ? p.T - 1 - s : s, H = p.H;
    const S* weight_ih = static_cast<const S*>(p.weight_ih);
    const S* weight_hh = static_cast<const S*>(p.weight_hh);
    const E *xs[NB], *hs[NB];
    for (int i = 0; i < NB; ++i) {
      if constexpr (kStage) xs[i] = x + (t * p.B + b0 + i) * ldi;
      else xs[i] = input(t, b0 + i);
      hs[i] = h[s % 2] + (b0 + i) * ldh;
    }
    const int n = static_cast<int>(H - u0 < U ? H - u0 : U);
    alignas(64) float tile[NB][64], gx[NB][64];
    __builtin_memset(gx, 0, sizeof gx);
    if (n < U) __builtin_memset(tile, 0, sizeof tile);
    for (int u = 0; u < n; u += G == 1 ? 4 : 1) {
      constexpr int M = G == 3 ? 3 : 4;
      vf acc[M][NB] = {}, input_part[NB];
      const S *wi[M], *wh[M];
      for (int g = 0; g < M; ++g) {
        // The gates of one unit; four units of an RNN (the last again where H is no multiple of four).
        const int64_t row = G == 1 ? u0 + (u + g < n ? u + g : n - 1) : g * H + u0 + u;
        wi[g] = weight_ih + row * p.I, wh[g] = weight_hh + row * H;
      }
      dot(wi, xs, p.I, acc);
      for (int i = 0; G == 3 && i < NB; ++i) input_part[i] = acc[2][i], acc[2][i] = vf{};  // gru: n's two halves stay apart
      dot(wh, hs, H, acc);
      for (int i = 0; i < NB; ++i) {
        const vf four[4] = {acc[0][i], acc[1][i], acc[2][i], G == 3 ? input_part[i] : acc[M - 1][i]};
        float sums[4];
        sum_lanes(four, sums);
        if constexpr (G == 1) {
          for (int g = 0; g < 4; ++g) tile[i][u + g] = sums[g];
        } else {
          for (int g = 0; g < G; ++g) tile[i][g * 16 + u] = sums[g];
          if constexpr (G == 3) gx[i][32 + u] = sums[3];
        }
      }
    }
    alignas(64) float out[NB][U];
    Block<float> a;
    a.rows = NB, a.n = n, a.ld = 64, a.H = H, a.tile = tile[0], a.gx = gx[0], a.bias = bias, a.out = out[0];
    for (int i = 0; i < NB; ++i) {
      a.state[i] = state + (b0 + i) * ldh + u0;
      a.save[i] = p.reserve ? static_cast<float*>(p.reserve) + (t * p.B + b0 + i) * saved(p.cell) * H + u0 : nullptr;
    }
    if constexpr (G == 4) lstm_rows(a);
    else if constexpr (G == 3) gru_rows(a);
    else rnn_rows(p.cell, a);
    for (int i = 0; i < NB; ++i) {
      const int64_t b = b0 + i;
      store_row(h[(s + 1) % 2] + b * ldh + u0, out[i], n);
      store_row(output(t, b) + u0, out[i], n);
      if (s + 1 == p.T) {
        store_row(static_cast<S*>(p.h_n) + b * H + u0, out[i], n);
        if constexpr (G == 4) store_row(static_cast<S*>(p.c_n) + b * H + u0, a.state[i], n);
      }
    }
  }

  void run(const Team& team) {
    const int64_t blocks = (p.H + U - 1) / U;
    const int64_t first = blocks * team.rank / team.size, last = blocks * (team.rank + 1) / team.size;
    for (int64_t s = 0; s < p.T; ++s) {
      if (s > 0) team.sync();
      for (int64_t block = first; block < last; ++block) {
        alignas(64) float bias[64];
        pack_bias<G>(p.cell, static_cast<const S*>(p.bias_ih), static_cast<const S*>(p.bias_hh), p.H, block, bias);
        for (int64_t b = 0; b < p.B;) {
          switch (block_rows(p.B - b, 4)) {
            case 1: units<1>(s, block * U, b, bias), b += 1; break;
            case 2: units<2>(s, block * U, b, bias), b += 2; break;
            case 3: units<3>(s, block * U, b, bias), b += 3; break;
            default: units<4>(s, block * U, b, bias), b += 4;
          }
        }
      }
    }
  }
};

// Where dot products win over packing first. They read the weights T * ceil(B/4) times (H = I = 256, two Zen 4 cores: LSTM B = 32,
// T = 1: 0.21 ms against 0.23 packed; B = 1, T = 8: 0.12 against 0.13; RNN 0.07 against 0.14).
inline bool few_rows(const LayerForward& p) {
  return p.dtype != DType::f64 && p.cell != Cell::gru_reset_before && !p.lengths && p.T > 0 && p.B > 0 && p.T <= 8 && p.B <= 32 &&
         p.T * ((p.B + 3) / 4) <= 8;
}

template <class S, int G>
void forward_step(const LayerForward& p) {
  using Pass = StepPass<S, G>;
  Pass pass(p);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout block{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(block);
  pass.start();
  // Two awake cores, one and two threads: RNN H = I = 256 (2^17 weights) 14.5 and 12.8 us, GRU H = 128 (2^16.6) 13.5 and 11.7,
  // RNN H = 128 (2^15) 9.4 and 10.1. A sleeping pool costs more to wake, so the bound is on the high side.
  const int threads = G * p.H * (p.I + p.H) < 131072 ? 1 : cpu::max_threads();
  cpu::run_team(threads, [](const Team& team, void* at) { static_cast<Pass*>(at)->run(team); }, &pass);
}

template <class S, int G>
void forward(const LayerForward& p) {
  if constexpr (!std::is_same_v<S, double>)
    if (few_rows(p)) return forward_step<S, G>(p);
  forward_sequence<S, G>(p);
}

template <int G>
void forward_any(const LayerForward& p) {
  switch (p.dtype) {
    case DType::f32: return forward<float, G>(p);
    case DType::f64: return forward<double, G>(p);
    case DType::bf16: return forward<bf16, G>(p);
    case DType::f16: return forward<f16, G>(p);
  }
}

}  // namespace
}  // namespace pyops::rnn::PYOPS_ISA
