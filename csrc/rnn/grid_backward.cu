// Recurrence of a layer too large for one block, backward: one cooperative launch walks the whole sequence back.
//
//   grad_output, reserve [T, B, S, H], W_hh [G*H, H]  ->  grad_gates_x [T, B, G*H] (gru: grad_gates_h [T, B, H]), grad_h0, grad_c0
//
// As grid_forward, transposed: a block owns 16 units of h and holds W_hh[:, unit] as G tiles; all blocks' gate gradients of
// step s+1 ([rows][G][H], rounded to T) are what it reads from the exchange to form dh of its units at step s.
// gru_before exchanges twice per step: n's gradient first, which must pass W_hn before r's exists.
//
// Floors per step: one trip through L2; gradients read from L2 by every unit slice (ceil(H/16) * B * G * H * sizeof(T));
// reserve in (4 * B * S * H) and grad_gates_x out at HBM's rate; flops 2 * G * H * H * B.
#include "grid.cuh"

namespace pyops::rnn {
namespace {

template <Kind K, class T>
PYOPS_KERNEL(kGridThreads)
grid_backward(GridParams<ScanBackward> params) {
  constexpr int G = gates_of(K);
  constexpr bool kTwoPhases = K == Kind::gru_before;
  constexpr int kLast = kTwoPhases ? 2 : G;  // tiles of dh's product; gru_before: n's gradient took its own
  const ScanBackward& p = params.scan;
  const GridWorkspace& w = params.workspace;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, H = p.H;
  const int slice_row0 = blockIdx.y * params.rows,
            tiles = ceil_div((p.B - slice_row0 < params.rows ? p.B - slice_row0 : params.rows), kTileRows);
  const int64_t gate_pitch = padded_hidden(H), pitch = G * gate_pitch, buffer = static_cast<int64_t>(gridDim.y) * params.rows * pitch;

  float* const partial = reinterpret_cast<float*>(dynamic_shared());
  uint4* const weights_shared = reinterpret_cast<uint4*>(partial + kGridWarps * G * kPartialFloats);
  using Weights = ResidentWeights<T, G, kGridRegisterBlocks<K>, true>;
  Weights weights;
  const KRange range = k_range<T>(H, warp);
  weights.load(static_cast<const T*>(p.weight_hh), H, blockIdx.x * kTileUnits, range.first, range.count,
               weights_shared + warp * (Weights::shared_bytes(blocks_per_warp<T>(H)) / sizeof(uint4)), lane);

  T* const exchange = static_cast<T*>(w.exchange) + slice_row0 * pitch;
  unsigned* const flags = w.flags + blockIdx.y * gridDim.x;
  unsigned epoch = 0;

  // The cell of threads 0..127 in every batch tile.
  const int unit = blockIdx.x * kTileUnits + threadIdx.x % kTileUnits, tile_b = threadIdx.x / kTileUnits;
  const bool owns_cell = threadIdx.x < kCellThreads && unit < H;

  int steps = 0;
  for (int b = slice_row0; b < slice_row0 + tiles * kTileRows; ++b) {
    const int l = length_of(p, b);
    steps = l > steps ? l : steps;
  }

  // Tiles [begin, end) times one batch tile of `from`, summed over the block's warps into shared memory. Ends with a barrier.
  auto product = [&](auto first, auto last, const T* from, int tile) {
    constexpr int begin = decltype(first)::value, end = decltype(last)::value;
    float sum[G][4] = {};
    weights.template multiply_all<begin, end>(sum, lane, [&](int q, int block) {
      return load_state_l2<T>(from + tile * kTileRows * pitch + q * gate_pitch, pitch, block, lane);
    });
    store_partial<G>(partial, warp, lane, sum, begin, end);
    __syncthreads();
  };
  auto collect = [&](auto first, auto last) {
    float total = 0.f;
    PYOPS_UNROLL
    for (int q = decltype(first)::value; q < decltype(last)::value; ++q) total += collect_partial<G>(partial, q, unit % kTileUnits, tile_b);
    return total;
  };
  const std::integral_constant<int, 0> first{};
  const std::integral_constant<int, kLast> last{};

  PYOPS_NO_UNROLL
  for (int s = steps - 1; s >= 0; --s) {
    const T* after = exchange + (s + 1) % 2 * buffer;  // of step s+1
    T* own = exchange + s % 2 * buffer;
    PYOPS_NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
      const int b = slice_row0 + tile * kTileRows + tile_b, length = owns_cell ? length_of(p, b) : 0;
      const bool takes_part = s < length;
      BackwardInputs<K, T> in{};
      if (takes_part) in = load_backward<K, T>(p, s, length, b, unit);  // in flight while this warp waits and multiplies
      if (tile == 0) wait_for_owners<T>(flags, range, gridDim.x, epoch, lane);
      product(first, last, after, tile);
      if (takes_part) {
        const int64_t cell = cell_index(p, b, unit);
        float grad[G], state = s == length - 1 ? 0.f : w.state[cell], dh = in.dh;
        if (s != length - 1) dh += recurrent_gradient<K>(collect(first, last), state);
        backward_cell<K, T>(p, s, length, b, unit, in, dh, state, grad);
        T* gradient = own + (tile * kTileRows + tile_b) * pitch + unit;
        PYOPS_UNROLL
        for (int q = kTwoPhases ? 1 : 0; q < G; ++q) gradient[q * gate_pitch] = from_float<T>(grad[q]);
        if (K != Kind::rnn) w.state[cell] = state;
      } else if (owns_cell && b < p.B) {
        backward_padding<K, T>(p, s, b, unit);
      }
      if (tile + 1 < tiles) __syncthreads();  // the partial sums are free again
    }
    publish(flags + blockIdx.x, ++epoch);

    if constexpr (kTwoPhases) {
      const std::integral_constant<int, 2> n_gate{};
      const std::integral_constant<int, 3> n_end{};
      PYOPS_NO_UNROLL
      for (int tile = 0; tile < tiles; ++tile) {
        const int b = slice_row0 + tile * kTileRows + tile_b, length = owns_cell ? length_of(p, b) : 0;
        if (tile == 0) wait_for_owners<T>(flags, range, gridDim.x, epoch, lane);
        product(n_gate, n_end, own, tile);
        if (s < length) {
          const BackwardInputs<K, T> in = load_backward<K, T>(p, s, length, b, unit);
          float& state = w.state[cell_index(p, b, unit)];
          own[(tile * kTileRows + tile_b) * pitch + unit] =
              from_float<T>(backward_reset<T>(p, s, length, b, unit, in.saved[0], in.saved[4], collect(n_gate, n_end), state));
        }
        if (tile + 1 < tiles) __syncthreads();
      }
      publish(flags + blockIdx.x, ++epoch);
    }
  }

  PYOPS_NO_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    const int b = slice_row0 + tile * kTileRows + tile_b, length = owns_cell ? length_of(p, b) : 0;
    if (tile == 0) wait_for_owners<T>(flags, range, gridDim.x, epoch, lane);
    product(first, last, exchange, tile);  // of step 0
    if (length > 0) {
      const float state = K == Kind::gru || K == Kind::gru_before ? w.state[cell_index(p, b, unit)] : 0.f;
      store_grad_h0<T>(p, b, unit, recurrent_gradient<K>(collect(first, last), state));
    }
    __syncthreads();
  }
  if (owns_cell)
    for (int b = slice_row0 + tile_b; b < p.B && b < slice_row0 + params.rows; b += kTileRows)
      for (int s = steps; s < p.T; ++s) backward_padding<K, T>(p, s, b, unit);
}

}  // namespace

void grid_backward_launch(const ScanBackward& p, cudaStream_t stream) {
  dispatch(p.cell, p.dtype, [&](auto kind, auto type) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    launch_grid<T>("grid_backward", grid_backward<K, T>, p, K, true, grid_shared<K, T>(p.H), nullptr, stream);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(grid_backward, Kind::lstm, float),
    PYOPS_KERNEL_INFO(grid_backward, Kind::lstm, bf16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::lstm, f16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru, float),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru, bf16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru, f16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru_before, float),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru_before, bf16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::gru_before, f16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::rnn, float),
    PYOPS_KERNEL_INFO(grid_backward, Kind::rnn, bf16),
    PYOPS_KERNEL_INFO(grid_backward, Kind::rnn, f16),
});

}  // namespace pyops::rnn
