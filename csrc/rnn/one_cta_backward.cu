// Recurrence of a small layer, backward: one block walks the whole sequence back for 8 batch rows, weights on chip.
//
//   grad_output, reserve [T, B, S, H], W_hh [G*H, H]  ->  grad_gates_x [T, B, G*H] (gru: grad_gates_h [T, B, H]), grad_h0, grad_c0
//
// Per step s, last to first: dh = grad_output + W_hh^T (gradients of the gates at step s+1) + what bypasses the product;
// then the gates' gradients. As one_cta_forward, transposed: a warp owns 16 units of h and holds the columns W_hh[:, unit] as
// G tiles, one per gate, which reduce over that gate's H gradients into G sums (added in a fixed order). The gradients,
// rounded to T, are double-buffered in shared memory as [8][G*H]; the carried state is float in registers. One
// __syncthreads per step (two for gru_before, whose n gate must pass W_hn before r's gradient exists).
//
// Floors per step and block: bytes 32 * S * H of reserve plus (G + 2) * 8 * H * sizeof(T); shared memory and flops as forward.
#include "paths.cuh"

namespace pyops::rnn {
namespace {

// Blocks of K per tile in registers: as many as leave no spill (12 warps: 168 registers a thread).
template <Kind K, int kWarps>
constexpr int kRegisterBlocks = K == Kind::rnn    ? 8
                                : kWarps == 8     ? 4
                                : K == Kind::lstm ? 2
                                                  : 3;

template <Kind K, class T, int kWarps>
using Weights = ResidentWeights<T, gates_of(K), kRegisterBlocks<K, kWarps>, true>;

template <Kind K, class T>
PYOPS_HOST_DEVICE constexpr int gradient_pitch(int H) {
  return state_pitch<T>(gates_of(K) * round_up(H, kBlockK<T>));
}

template <Kind K, class T, int kWarps>
PYOPS_KERNEL(kWarps* kWarpSize)
one_cta_backward(ScanBackward p) {
  constexpr int G = gates_of(K);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, H = p.H;
  const int k_blocks = ceil_div(H, kBlockK<T>), padded = k_blocks * kBlockK<T>;
  const int pitch = gradient_pitch<K, T>(H), buffer = kTileRows * pitch;

  // Shared memory: gradients [2][8][pitch], then each warp's weights.
  T* const gradients = reinterpret_cast<T*>(dynamic_shared());
  uint4* const weights_shared = reinterpret_cast<uint4*>(gradients + 2 * buffer);

  Weights<K, T, kWarps> weights;
  weights.load(static_cast<const T*>(p.weight_hh), H, warp * kTileUnits, 0, k_blocks,
               weights_shared + warp * (Weights<K, T, kWarps>::shared_bytes(k_blocks) / sizeof(uint4)), lane);
  for (int i = threadIdx.x; i < 2 * buffer; i += blockDim.x) gradients[i] = from_float<T>(0.f);

  const int unit0 = warp * kTileUnits + tile_unit(lane, 0), row0 = blockIdx.x * kTileRows + tile_row(lane, 0);
  int length[2], steps = 0;
  for (int i = 0; i < 2; ++i) length[i] = length_of(p, row0 + i);
  for (int i = 0; i < kTileRows; ++i) {
    const int l = length_of(p, blockIdx.x * kTileRows + i);
    steps = l > steps ? l : steps;
  }
  float state[4] = {0.f, 0.f, 0.f, 0.f};
  __syncthreads();

  // The sums of tiles [kBegin, kEnd) for this lane's cells, from the gradients of one step.
  auto product = [&](auto first, auto last, const T* from, float (&total)[4]) {
    constexpr int begin = decltype(first)::value, end = decltype(last)::value;
    float sum[G][4] = {};
    weights.template multiply_all<begin, end>(sum, lane,
                                              [&](int q, int block) { return load_state<T>(from + q * padded, pitch, block, lane); });
    PYOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      total[j] = sum[begin][j];
      PYOPS_UNROLL
      for (int q = begin + 1; q < end; ++q) total[j] += sum[q][j];
    }
  };
  using First = std::integral_constant<int, 0>;
  using Last = std::integral_constant<int, K == Kind::gru_before ? 2 : G>;  // gru_before: n's gradient took its own product

  PYOPS_NO_UNROLL
  for (int s = steps - 1; s >= 0; --s) {
    const T* after = gradients + (s + 1) % 2 * buffer;  // of step s+1
    T* own = gradients + s % 2 * buffer;
    float total[4];
    product(First{}, Last{}, after, total);

    float reset[4], previous[4];  // gru_before's r and h_prev between its two halves
    PYOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int b = row0 + j % 2, u = unit0 + j / 2;
      if (s < length[j % 2] && u < H) {
        const BackwardInputs<K, T> in = load_backward<K, T>(p, s, length[j % 2], b, u);
        float dh = in.dh, grad[G];
        if (s != length[j % 2] - 1) dh += recurrent_gradient<K>(total[j], state[j]);
        backward_cell<K, T>(p, s, length[j % 2], b, u, in, dh, state[j], grad);
        T* gradient = own + tile_row(lane, j) * pitch + u;
        PYOPS_UNROLL
        for (int q = K == Kind::gru_before ? 1 : 0; q < G; ++q) gradient[q * padded] = from_float<T>(grad[q]);
        if constexpr (K == Kind::gru_before) reset[j] = in.saved[0], previous[j] = in.saved[4];
      } else if (b < p.B && u < H) {
        backward_padding<K, T>(p, s, b, u);
      }
    }
    __syncthreads();
    if constexpr (K == Kind::gru_before) {
      product(std::integral_constant<int, 2>{}, std::integral_constant<int, 3>{}, own, total);
      PYOPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int b = row0 + j % 2, u = unit0 + j / 2;
        if (s < length[j % 2] && u < H)
          own[tile_row(lane, j) * pitch + u] =
              from_float<T>(backward_reset<T>(p, s, length[j % 2], b, u, reset[j], previous[j], total[j], state[j]));
      }
      __syncthreads();
    }
  }

  float total[4];
  product(First{}, Last{}, gradients, total);  // of step 0
  for (int j = 0; j < 4; ++j) {
    const int b = row0 + j % 2, u = unit0 + j / 2;
    if (b >= p.B || u >= H) continue;
    if (length[j % 2] > 0) store_grad_h0<T>(p, b, u, recurrent_gradient<K>(total[j], state[j]));
    for (int s = steps; s < p.T; ++s) backward_padding<K, T>(p, s, b, u);
  }
}

template <Kind K, class T, int kWarps>
size_t shared_bytes(int H) {
  return 2 * kTileRows * gradient_pitch<K, T>(H) * sizeof(T) +
         ceil_div(H, kTileUnits) * Weights<K, T, kWarps>::shared_bytes(ceil_div(H, kBlockK<T>));
}

}  // namespace

size_t one_cta_backward_shared_bytes(Cell cell, DType dtype, int64_t H) {
  return dispatch_one_cta(cell, dtype, H, [&](auto kind, auto type, auto warps) {
    return shared_bytes<decltype(kind)::kind, decltype(type), warps>(static_cast<int>(H));
  });
}

void one_cta_backward_launch(const ScanBackward& p, cudaStream_t stream) {
  dispatch_one_cta(p.cell, p.dtype, p.H, [&](auto kind, auto type, auto warps) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    const LaunchShape shape{dim3(ceil_div(p.B, kTileRows)), kWarpSize * ceil_div(p.H, kTileUnits), shared_bytes<K, T, warps>(p.H)};
    launch("one_cta_backward", one_cta_backward<K, T, warps>, shape, stream, p);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::lstm, float, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::lstm, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::lstm, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::lstm, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::lstm, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru, float, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru_before, float, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru_before, bf16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru_before, bf16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru_before, f16, 8),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::gru_before, f16, 12),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::rnn, float, 16),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::rnn, bf16, 16),
    PYOPS_KERNEL_INFO(one_cta_backward, Kind::rnn, f16, 16),
});

}  // namespace pyops::rnn
