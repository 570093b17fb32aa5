// Recurrence of a layer beyond on-chip residency, or of a large batch, backward: one launch per step, one more for grad_h0.
//
//   grad_output, reserve [T, B, S, H], W_hh [G*H, H]  ->  grad_gates_x [T, B, G*H] (gru: grad_gates_h [T, B, H]), grad_h0, grad_c0
//
// The launch of step s multiplies the gate gradients of step s+1 ([B][G][H], rounded to T, in the workspace) with W_hh to get
// what reaches h of step s, in tiles of 32 units x 64 rows, and its epilogue goes on to the gate gradients of step s.
// gru_before takes a second launch per step: n's gradient must pass W_hn before r's exists. W_hh is transposed and
// zero-padded once per call.
//
// Floors per step: W_hh (G * H * H * sizeof(T)) from L2 or HBM, reserve in (4 * B * S * H), grad_gates_x out; flops 2 * G * H * H * B.
#include "step.cuh"

namespace pyops::rnn {
namespace {

// kPhase 1: gru_before's second half, the gradient of r*h and of r. s = -1: grad_h0.
template <Kind K, class T, int kPhase>
PYOPS_KERNEL(kStepThreads)
step_backward(StepParams<ScanBackward> params) {
  constexpr int G = gates_of(K);
  constexpr bool kTwoPhases = K == Kind::gru_before;
  const ScanBackward& p = params.scan;
  const StepWorkspace& w = params.workspace;
  const int s = params.s, H = p.H;
  const int64_t gate_pitch = padded_hidden(H), pitch = G * gate_pitch;
  T* const own = static_cast<T*>(w.exchange) + (s & 1) * params.exchange_elements;
  const T* const from = kPhase == 0 ? static_cast<T*>(w.exchange) + ((s + 1) & 1) * params.exchange_elements : own;
  const int64_t first_k = kPhase == 0 ? 0 : 2 * gate_pitch, k_count = kTwoPhases ? (kPhase == 0 ? 2 : 1) * gate_pitch : pitch;

  float sum[1][kRowTiles][4] = {};
  if (any_row_takes_part(p, kPhase == 0 ? s + 1 : s))  // no row with a step s+1: nothing flows back
    step_product<T, 1>(sum, static_cast<const T*>(w.weights) + static_cast<int64_t>(blockIdx.x) * kStepUnits * pitch + first_k, 0, pitch,
                       from + static_cast<int64_t>(blockIdx.y) * kStepRows * pitch + first_k, pitch, k_count);

  PYOPS_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) PYOPS_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int b = step_row(tile, j), u = step_unit(j);
    if (b >= p.B || u >= H) continue;
    const int length = length_of(p, b);
    const int64_t cell = cell_index(p, b, u);
    const float product = sum[0][tile][j];
    if (s >= length) {
      if (kPhase == 0) backward_padding<K, T>(p, s, b, u);
      continue;
    }
    float state = K == Kind::rnn || (kPhase == 0 && s == length - 1) ? 0.f : w.state[cell];
    if (kPhase == 0 && s < 0) {
      if (length > 0) store_grad_h0<T>(p, b, u, recurrent_gradient<K>(product, state));
      continue;
    }
    const BackwardInputs<K, T> in = load_backward<K, T>(p, s, length, b, u);
    T* gradient = own + b * pitch + u;
    if constexpr (kPhase == 0) {
      float grad[G], dh = in.dh;
      if (s != length - 1) dh += recurrent_gradient<K>(product, state);
      backward_cell<K, T>(p, s, length, b, u, in, dh, state, grad);
      PYOPS_UNROLL
      for (int q = kTwoPhases ? 1 : 0; q < G; ++q) gradient[q * gate_pitch] = from_float<T>(grad[q]);
    } else {
      gradient[0] = from_float<T>(backward_reset<T>(p, s, length, b, u, in.saved[0], in.saved[4], product, state));
    }
    if (K != Kind::rnn) w.state[cell] = state;
  }
}

}  // namespace

void step_backward_launch(const ScanBackward& p, cudaStream_t stream) {
  dispatch(p.cell, p.dtype, [&](auto kind, auto type) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    constexpr int G = gates_of(K);
    StepParams<ScanBackward> params{p, carve_step(p.workspace, K, sizeof(T), p.B, p.H, true), padded_rows(p.B) * padded_hidden(p.H) * G, 0};
    zero_async(p.workspace, params.workspace.zeroed, stream);
    launch_pack<T, true>(p.weight_hh, params.workspace.weights, p.H, G, stream);

    const LaunchShape shape{step_grid(p.B, p.H), kStepThreads, kStepShared<T, 1>};
    for (params.s = p.T - 1; params.s >= -1; --params.s) {
      launch("step_backward", step_backward<K, T, 0>, shape, stream, params);
      if constexpr (K == Kind::gru_before)
        if (params.s >= 0) launch("step_backward", step_backward<K, T, 1>, shape, stream, params);
    }
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(step_backward, Kind::lstm, float, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::lstm, bf16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::lstm, f16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru, float, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru, bf16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru, f16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, float, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, bf16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, f16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, float, 1),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, bf16, 1),
    PYOPS_KERNEL_INFO(step_backward, Kind::gru_before, f16, 1),
    PYOPS_KERNEL_INFO(step_backward, Kind::rnn, float, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::rnn, bf16, 0),
    PYOPS_KERNEL_INFO(step_backward, Kind::rnn, f16, 0),
    PYOPS_KERNEL_INFO(pack_weights, uint16_t, true),
    PYOPS_KERNEL_INFO(pack_weights, uint32_t, true),
});

}  // namespace pyops::rnn
