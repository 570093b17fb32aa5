// Recurrence of a layer beyond on-chip residency, or of a large batch, forward: one launch per step.
//
//   gates_x [T, B, G*H] (strided), W_hh [G*H, H]  ->  output [T, B, H], h_n, c_n [B, H], reserve [T, B, S, H]
//
// A launch multiplies h [B, H] with W_hh^T in tiles of 32 units (all gates) x 64 rows and finishes the cells in its epilogue:
// the gates of a cell meet in one lane's accumulators. h goes to the next launch through the workspace, double-buffered; the
// carried state is float there. gru_before takes two launches per step. W_hh is packed into zero-padded rows once per call,
// or read where it is when H is a multiple of 32 already.
//
// Floors per step: W_hh (G * H * H * sizeof(T)) from L2 or HBM, gates_x in and output out; flops 2 * G * H * H * B.
#include "step.cuh"

namespace pyops::rnn {
namespace {

// kPhase: gru_before's first (r, z, r*h) or second (n, h') half; 0 for every other kind.
template <Kind K, class T, int kPhase>
PYOPS_KERNEL(kStepThreads)
step_forward(StepParams<ScanForward> params) {
  constexpr int G = gates_of(K);
  constexpr bool kTwoPhases = K == Kind::gru_before;
  constexpr int kBegin = kPhase == 0 ? 0 : 2, NQ = kTwoPhases ? (kPhase == 0 ? 2 : 1) : G;
  const ScanForward& p = params.scan;
  const StepWorkspace& w = params.workspace;
  const int s = params.s, H = p.H;
  const int64_t pitch = padded_hidden(H), gate_stride = pitch * pitch;
  T* const exchange = static_cast<T*>(w.exchange);
  T* const reset_exchange = static_cast<T*>(w.exchange2);
  T* const h_next = exchange + (s + 1) % 2 * params.exchange_elements;

  float sum[NQ][kRowTiles][4] = {};
  if (any_row_takes_part(p, s))
    step_product<T, NQ>(
        sum, static_cast<const T*>(w.weights) + kBegin * gate_stride + static_cast<int64_t>(blockIdx.x) * kStepUnits * pitch, gate_stride,
        pitch,
        (kPhase == 0 ? exchange + s % 2 * params.exchange_elements : reset_exchange) + static_cast<int64_t>(blockIdx.y) * kStepRows * pitch,
        pitch, pitch);

  PYOPS_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) PYOPS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int b = step_row(tile, j), u = step_unit(j);
    if (b >= p.B || u >= H) continue;
    const int length = length_of(p, b);
    if (s >= length) {
      if (kPhase == 0) forward_padding<K, T>(p, s, b, u);
      continue;
    }
    const int64_t t = time_of(p, length, s), cell = cell_index(p, b, u);
    const T* gates_x = at<T>(p.gates_x, t, b) + u;
    float state = K == Kind::rnn ? 0.f : s == 0 ? initial_state<K, T>(p, b, u) : w.state[cell];
    float a[NQ], x_n = 0.f;
    PYOPS_UNROLL
    for (int q = 0; q < NQ; ++q) {
      const int64_t gate = static_cast<int64_t>(kBegin + q) * H;
      a[q] = sum[q][tile][j] + load_or_zero<T>(p.bias_hh, gate + u);
      if (joins_x<K>(kBegin + q)) a[q] += to_float(gates_x[gate]);
      else x_n = to_float(gates_x[gate]);
    }
    if constexpr (kTwoPhases && kPhase == 0) {
      float z;
      reset_exchange[b * pitch + u] = from_float<T>(forward_reset<T>(p, t, b, u, a[0], a[1], state, z));
      w.aux[cell] = z;
    } else {
      float h;
      if constexpr (kTwoPhases) h = forward_update<T>(p, t, b, u, s == length - 1, a[0], w.aux[cell], state);
      else h = forward_cell<K, T>(p, t, b, u, s == length - 1, a, x_n, state);
      h_next[b * pitch + u] = from_float<T>(h);
      if (K != Kind::rnn) w.state[cell] = state;
    }
  }
}

}  // namespace

size_t step_workspace(Cell cell, DType dtype, int64_t B, int64_t H, bool backward) {
  return carve_step(nullptr, kind_of(cell), dtype == DType::f32 ? 4 : 2, B, H, backward).bytes;
}

void step_forward_launch(const ScanForward& p, cudaStream_t stream) {
  dispatch(p.cell, p.dtype, [&](auto kind, auto type) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    constexpr int G = gates_of(K);
    const int64_t pitch = padded_hidden(p.H);
    StepParams<ScanForward> params{p, carve_step(p.workspace, K, sizeof(T), p.B, p.H, false), padded_rows(p.B) * pitch, 0};
    StepWorkspace& w = params.workspace;
    zero_async(p.workspace, w.zeroed, stream);
    if (p.h0) copy_rows_async(w.exchange, pitch * sizeof(T), p.h0, p.H * sizeof(T), p.H * sizeof(T), p.B, stream);
    if (p.H == pitch && reinterpret_cast<uintptr_t>(p.weight_hh) % 16 == 0) w.weights = const_cast<void*>(p.weight_hh);
    else launch_pack<T, false>(p.weight_hh, w.weights, p.H, G, stream);

    for (params.s = 0; params.s < p.T; ++params.s) {
      constexpr int NQ = K == Kind::gru_before ? 2 : G;
      launch("step_forward", step_forward<K, T, 0>, LaunchShape{step_grid(p.B, p.H), kStepThreads, kStepShared<T, NQ>}, stream, params);
      if constexpr (K == Kind::gru_before)
        launch("step_forward", step_forward<K, T, 1>, LaunchShape{step_grid(p.B, p.H), kStepThreads, kStepShared<T, 1>}, stream, params);
    }
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(step_forward, Kind::lstm, float, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::lstm, bf16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::lstm, f16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru, float, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru, bf16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru, f16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, float, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, bf16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, f16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, float, 1),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, bf16, 1),
    PYOPS_KERNEL_INFO(step_forward, Kind::gru_before, f16, 1),
    PYOPS_KERNEL_INFO(step_forward, Kind::rnn, float, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::rnn, bf16, 0),
    PYOPS_KERNEL_INFO(step_forward, Kind::rnn, f16, 0),
    PYOPS_KERNEL_INFO(pack_weights, uint16_t, false),
    PYOPS_KERNEL_INFO(pack_weights, uint32_t, false),
});

}  // namespace pyops::rnn
