// Recurrence of a small layer, forward: one block runs the whole sequence for 8 batch rows, weights on chip throughout.
//
//   gates_x [T, B, G*H] (strided), W_hh [G*H, H]  ->  output [T, B, H], h_n, c_n [B, H], reserve [T, B, S, H]
//
// Grid: ceil(B/8) blocks, which never wait for each other. A warp owns 16 hidden units with all their gates, so the G
// values of a cell meet in one lane's accumulators and the pointwise math needs no exchange. W_hh sits in registers (the
// first 32 to 128 k of 16-bit types, 256 for rnn) and shared memory. h (rounded to T, as mma takes it) is double-buffered in
// shared memory; the carried state stays float in registers. One __syncthreads per step (two for gru_before); gates_x of
// the next step are loaded before this step's product.
//
// Floors per step and block: bytes (G + 1) * 8 * H * sizeof(T) from and to HBM (training adds 32 * S * H);
// shared memory H * H * G * sizeof(T) less what registers hold, at 128 bytes a clock; flops 16 * G * H * H, at the tensor
// rate of one SM. The clocks of a dependent mma chain and of one barrier come on top: see docs for measured steps.
#include "paths.cuh"

namespace pyops::rnn {
namespace {

// Blocks of K per tile in registers: as many as leave no spill (12 warps: 168 registers a thread, lstm prefetches 16 gates).
template <Kind K, int kWarps>
constexpr int kRegisterBlocks = K == Kind::rnn    ? 8
                                : kWarps == 8     ? 4
                                : K == Kind::lstm ? 1
                                                  : 3;

template <Kind K, class T, int kWarps>
using Weights = ResidentWeights<T, gates_of(K), kRegisterBlocks<K, kWarps>, false>;

template <class T>
PYOPS_HOST_DEVICE constexpr int hidden_pitch(int H) {
  return state_pitch<T>(round_up(H, kBlockK<T>));
}

template <Kind K, class T, int kWarps>
PYOPS_KERNEL(kWarps* kWarpSize)
one_cta_forward(ScanForward p) {
  constexpr int G = gates_of(K);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, H = p.H;
  constexpr int units = kWarps * kTileUnits;
  const int pitch = hidden_pitch<T>(H), buffer = kTileRows * pitch;

  // Shared memory: h[2][8][pitch], gru_before: r*h[8][pitch], bias[G][units], then each warp's weights.
  T* const hidden = reinterpret_cast<T*>(dynamic_shared());
  T* const reset_hidden = hidden + 2 * buffer;
  float* const bias = reinterpret_cast<float*>(hidden + (K == Kind::gru_before ? 3 : 2) * buffer);
  uint4* const weights_shared = reinterpret_cast<uint4*>(bias + G * units);

  Weights<K, T, kWarps> weights;
  const int k_blocks = ceil_div(H, kBlockK<T>);
  weights.load(static_cast<const T*>(p.weight_hh), H, warp * kTileUnits, 0, k_blocks,
               weights_shared + warp * (Weights<K, T, kWarps>::shared_bytes(k_blocks) / sizeof(uint4)), lane);

  // This lane's cells: j = 0..3.
  const int unit0 = warp * kTileUnits + tile_unit(lane, 0), row0 = blockIdx.x * kTileRows + tile_row(lane, 0);
  int length[2], steps = 0;
  for (int i = 0; i < 2; ++i) length[i] = length_of(p, row0 + i);
  for (int i = 0; i < kTileRows; ++i) {
    const int l = length_of(p, blockIdx.x * kTileRows + i);
    steps = l > steps ? l : steps;
  }
  float state[4], update[4];  // update: gru_before's z between its two halves
  PYOPS_UNROLL
  for (int j = 0; j < 4; ++j)
    state[j] = unit0 + j / 2 < H && row0 + j % 2 < p.B ? initial_state<K, T>(p, row0 + j % 2, unit0 + j / 2) : 0.f;

  for (int i = threadIdx.x; i < (K == Kind::gru_before ? 3 : 2) * buffer; i += blockDim.x) hidden[i] = from_float<T>(0.f);
  for (int i = threadIdx.x; i < G * units; i += blockDim.x)
    bias[i] = p.bias_hh && i % units < H ? to_float(static_cast<const T*>(p.bias_hh)[i / units * H + i % units]) : 0.f;
  __syncthreads();
  if (p.h0)
    for (int i = threadIdx.x; i < kTileRows * H; i += blockDim.x) {
      const int b = blockIdx.x * kTileRows + i / H;
      if (b < p.B) hidden[i / H * pitch + i % H] = static_cast<const T*>(p.h0)[cell_index(p, b, i % H)];
    }
  __syncthreads();

  auto takes_part = [&](int s, int j) { return s < length[j % 2] && unit0 + j / 2 < H; };
  T next[4][G] = {};
  auto prefetch = [&](int s) {
    PYOPS_UNROLL
    for (int j = 0; j < 4; ++j)
      if (takes_part(s, j)) load_gates_x<K, T>(p, time_of(p, length[j % 2], s), row0 + j % 2, unit0 + j / 2, next[j]);
  };
  prefetch(0);

  PYOPS_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    const T* h = hidden + s % 2 * buffer;
    T* h_next = hidden + (s + 1) % 2 * buffer;
    // 16-bit sums start from gates_x + bias, which frees the registers of gates_x. Float sums start from zero: adding the
    // large gates_x first would cost every later addition a larger rounding.
    constexpr bool kStartFromX = is_16bit<T>;
    float sum[G][4], x[4][G];
    PYOPS_UNROLL
    for (int q = 0; q < G; ++q) PYOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      sum[q][j] = kStartFromX ? bias[q * units + unit0 + j / 2] : 0.f;
      x[j][q] = to_float(next[j][q]);
      if (kStartFromX && joins_x<K>(q)) sum[q][j] += x[j][q];
    }
    prefetch(s + 1);
    auto activation_input = [&](int q, int j) {
      if (kStartFromX) return sum[q][j];
      const float with_bias = sum[q][j] + bias[q * units + unit0 + j / 2];
      return joins_x<K>(q) ? with_bias + x[j][q] : with_bias;
    };

    constexpr int kFirst = K == Kind::gru_before ? 2 : G;  // tiles of the first product
    weights.template multiply_all<0, kFirst>(sum, lane, [&](int, int block) { return load_state<T>(h, pitch, block, lane); });
    if constexpr (K == Kind::gru_before) {
      PYOPS_UNROLL
      for (int j = 0; j < 4; ++j)
        if (takes_part(s, j)) {
          const int b = row0 + j % 2, u = unit0 + j / 2;
          reset_hidden[tile_row(lane, j) * pitch + u] = from_float<T>(
              forward_reset<T>(p, time_of(p, length[j % 2], s), b, u, activation_input(0, j), activation_input(1, j), state[j], update[j]));
        }
      __syncthreads();
      weights.template multiply_all<2, G>(sum, lane, [&](int, int block) { return load_state<T>(reset_hidden, pitch, block, lane); });
    }
    PYOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int b = row0 + j % 2, u = unit0 + j / 2;
      if (takes_part(s, j)) {
        const int64_t t = time_of(p, length[j % 2], s);
        const bool last = s == length[j % 2] - 1;
        float h_new;
        if constexpr (K == Kind::gru_before) {
          h_new = forward_update<T>(p, t, b, u, last, activation_input(2, j), update[j], state[j]);
        } else {
          float a[G];
          PYOPS_UNROLL
          for (int q = 0; q < G; ++q) a[q] = activation_input(q, j);
          h_new = forward_cell<K, T>(p, t, b, u, last, a, x[j][G - 1], state[j]);
        }
        h_next[tile_row(lane, j) * pitch + u] = from_float<T>(h_new);
      } else if (b < p.B && u < H) {
        forward_padding<K, T>(p, s, b, u);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j)
    if (row0 + j % 2 < p.B && unit0 + j / 2 < H)
      for (int s = steps; s < p.T; ++s) forward_padding<K, T>(p, s, row0 + j % 2, unit0 + j / 2);
}

template <Kind K, class T, int kWarps>
size_t shared_bytes(int H) {
  const int warps = ceil_div(H, kTileUnits);
  return (K == Kind::gru_before ? 3 : 2) * kTileRows * hidden_pitch<T>(H) * sizeof(T) + gates_of(K) * kWarps * kTileUnits * sizeof(float) +
         warps * Weights<K, T, kWarps>::shared_bytes(ceil_div(H, kBlockK<T>));
}

}  // namespace

size_t one_cta_forward_shared_bytes(Cell cell, DType dtype, int64_t H) {
  return dispatch_one_cta(cell, dtype, H, [&](auto kind, auto type, auto warps) {
    return shared_bytes<decltype(kind)::kind, decltype(type), warps>(static_cast<int>(H));
  });
}

void one_cta_forward_launch(const ScanForward& p, cudaStream_t stream) {
  dispatch_one_cta(p.cell, p.dtype, p.H, [&](auto kind, auto type, auto warps) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    const LaunchShape shape{dim3(ceil_div(p.B, kTileRows)), kWarpSize * ceil_div(p.H, kTileUnits), shared_bytes<K, T, warps>(p.H)};
    launch("one_cta_forward", one_cta_forward<K, T, warps>, shape, stream, p);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, float, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru, float, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru_before, float, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru_before, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru_before, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru_before, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::gru_before, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::rnn, float, 16),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::rnn, bf16, 16),
    PYOPS_KERNEL_INFO(one_cta_forward, Kind::rnn, f16, 16),
});

}  // namespace pyops::rnn
