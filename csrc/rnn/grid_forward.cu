// Recurrence of a layer too large for one block, forward: one cooperative launch runs the whole sequence, weights on chip.
//
//   gates_x [T, B, G*H] (strided), W_hh [G*H, H]  ->  output [T, B, H], h_n, c_n [B, H], reserve [T, B, S, H]
//
// Grid: (ceil(H/16) unit slices, batch slices), all resident. A block holds the G x 16 rows of W_hh of its units, cut along K
// between 8 warps, in registers (16-bit: 128 k per warp, 256 for rnn) and shared memory; see grid.cuh for the exchange of h.
// A step: gates_x of the first batch tile are requested, each warp waits for its part of h, multiplies 8 rows at a time,
// partial sums meet in shared memory, 128 threads do one cell each, h goes out, the flag goes up. gru_before does this twice.
//
// Floors per step: one trip through L2 (flag and data), gates_x in and output out at HBM's rate, h read from L2 by every
// unit slice (ceil(H/16) * B * H * sizeof(T)), flops 2 * G * H * H * B.
#include "grid.cuh"

namespace pyops::rnn {
namespace {

template <Kind K, class T>
PYOPS_KERNEL(kGridThreads)
grid_forward(GridParams<ScanForward> params) {
  constexpr int G = gates_of(K);
  constexpr bool kTwoPhases = K == Kind::gru_before;
  constexpr int kFirst = kTwoPhases ? 2 : G;  // tiles of the first product
  const ScanForward& p = params.scan;
  const GridWorkspace& w = params.workspace;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, H = p.H;
  const int slice_row0 = blockIdx.y * params.rows,
            tiles = ceil_div((p.B - slice_row0 < params.rows ? p.B - slice_row0 : params.rows), kTileRows);
  const int64_t pitch = padded_hidden(H), buffer = static_cast<int64_t>(gridDim.y) * params.rows * pitch;

  float* const partial = reinterpret_cast<float*>(dynamic_shared());
  uint4* const weights_shared = reinterpret_cast<uint4*>(partial + kGridWarps * G * kPartialFloats);
  using Weights = ResidentWeights<T, G, kGridRegisterBlocks<K>, false>;
  Weights weights;
  const KRange range = k_range<T>(H, warp);
  weights.load(static_cast<const T*>(p.weight_hh), H, blockIdx.x * kTileUnits, range.first, range.count,
               weights_shared + warp * (Weights::shared_bytes(blocks_per_warp<T>(H)) / sizeof(uint4)), lane);

  T* const exchange = static_cast<T*>(w.exchange) + slice_row0 * pitch;
  T* const reset_exchange = static_cast<T*>(w.exchange2) + slice_row0 * pitch;
  unsigned* const flags = w.flags + blockIdx.y * gridDim.x;
  unsigned epoch = 0;

  // The cell of threads 0..127 in every batch tile.
  const int unit = blockIdx.x * kTileUnits + threadIdx.x % kTileUnits, tile_b = threadIdx.x / kTileUnits;
  const bool owns_cell = threadIdx.x < kCellThreads && unit < H;
  float bias[G];
  PYOPS_UNROLL
  for (int q = 0; q < G; ++q) bias[q] = owns_cell ? load_or_zero<T>(p.bias_hh, static_cast<int64_t>(q) * H + unit) : 0.f;

  int steps = 0;
  for (int b = slice_row0; b < slice_row0 + tiles * kTileRows; ++b) {
    const int l = length_of(p, b);
    steps = l > steps ? l : steps;
  }

  PYOPS_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    const T* h = exchange + s % 2 * buffer;
    T* h_next = exchange + (s + 1) % 2 * buffer;
    PYOPS_NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
      const int b = slice_row0 + tile * kTileRows + tile_b, length = owns_cell ? length_of(p, b) : 0;
      const bool takes_part = s < length;
      const int64_t t = time_of(p, length, s), cell = cell_index(p, b, unit);
      T gates_x[G] = {};
      float state = 0.f;
      if (takes_part) {  // in flight while this warp waits and multiplies
        load_gates_x<K, T>(p, t, b, unit, gates_x);
        if (K != Kind::rnn) state = s == 0 ? initial_state<K, T>(p, b, unit) : w.state[cell];
      }
      if (tile == 0) wait_for_owners<T>(flags, range, gridDim.x, epoch, lane);
      float sum[G][4] = {};
      weights.template multiply_all<0, kFirst>(
          sum, lane, [&](int, int block) { return load_state_l2<T>(h + tile * kTileRows * pitch, pitch, block, lane); });
      store_partial<G>(partial, warp, lane, sum, 0, kFirst);
      __syncthreads();
      if (takes_part) {
        float a[G], x_n = 0.f;
        PYOPS_UNROLL
        for (int q = 0; q < G; ++q) {
          a[q] = bias[q] + (q < kFirst ? collect_partial<G>(partial, q, unit % kTileUnits, tile_b) : 0.f);
          if (joins_x<K>(q)) a[q] += to_float(gates_x[q]);
          else x_n = to_float(gates_x[q]);
        }
        if constexpr (kTwoPhases) {
          float z;
          const float rh = forward_reset<T>(p, t, b, unit, a[0], a[1], state, z);
          reset_exchange[(tile * kTileRows + tile_b) * pitch + unit] = from_float<T>(rh);
          w.state[cell] = state;
          w.aux[cell] = z;
        } else {
          const float h_new = forward_cell<K, T>(p, t, b, unit, s == length - 1, a, x_n, state);
          h_next[(tile * kTileRows + tile_b) * pitch + unit] = from_float<T>(h_new);
          if (K != Kind::rnn) w.state[cell] = state;
        }
      } else if (owns_cell && b < p.B) {
        forward_padding<K, T>(p, s, b, unit);
      }
      if (tile + 1 < tiles) __syncthreads();  // the partial sums are free again
    }
    publish(flags + blockIdx.x, ++epoch);

    if constexpr (kTwoPhases) {
      PYOPS_NO_UNROLL
      for (int tile = 0; tile < tiles; ++tile) {
        const int b = slice_row0 + tile * kTileRows + tile_b, length = owns_cell ? length_of(p, b) : 0;
        const bool takes_part = s < length;
        const int64_t t = time_of(p, length, s), cell = cell_index(p, b, unit);
        const float x_n = takes_part ? to_float(at<T>(p.gates_x, t, b)[2 * static_cast<int64_t>(H) + unit]) : 0.f;
        if (tile == 0) wait_for_owners<T>(flags, range, gridDim.x, epoch, lane);
        float sum[G][4] = {};
        weights.template multiply_all<2, G>(
            sum, lane, [&](int, int block) { return load_state_l2<T>(reset_exchange + tile * kTileRows * pitch, pitch, block, lane); });
        store_partial<G>(partial, warp, lane, sum, 2, G);
        __syncthreads();
        if (takes_part) {
          float state = w.state[cell];
          const float a = bias[2] + x_n + collect_partial<G>(partial, 2, unit % kTileUnits, tile_b);
          const float h_new = forward_update<T>(p, t, b, unit, s == length - 1, a, w.aux[cell], state);
          h_next[(tile * kTileRows + tile_b) * pitch + unit] = from_float<T>(h_new);
          w.state[cell] = state;
        }
        if (tile + 1 < tiles) __syncthreads();
      }
      publish(flags + blockIdx.x, ++epoch);
    }
  }
  if (owns_cell)
    for (int b = slice_row0 + tile_b; b < p.B && b < slice_row0 + params.rows; b += kTileRows)
      for (int s = steps; s < p.T; ++s) forward_padding<K, T>(p, s, b, unit);
}

}  // namespace

size_t grid_shared_bytes(Cell cell, DType dtype, int64_t H) {
  return dispatch(cell, dtype,
                  [&](auto kind, auto type) { return grid_shared<decltype(kind)::kind, decltype(type)>(static_cast<int>(H)); });
}

size_t grid_workspace(Cell cell, DType dtype, int64_t B, int64_t H, bool backward, int sm_count) {
  return carve_grid(nullptr, kind_of(cell), dtype == DType::f32 ? 4 : 2, grid_shape(B, H, sm_count), B, H, backward).bytes;
}

void grid_forward_launch(const ScanForward& p, cudaStream_t stream) {
  dispatch(p.cell, p.dtype, [&](auto kind, auto type) {
    constexpr Kind K = decltype(kind)::kind;
    using T = decltype(type);
    launch_grid<T>("grid_forward", grid_forward<K, T>, p, K, false, grid_shared<K, T>(p.H), p.h0, stream);
  });
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(grid_forward, Kind::lstm, float),
    PYOPS_KERNEL_INFO(grid_forward, Kind::lstm, bf16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::lstm, f16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru, float),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru, bf16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru, f16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru_before, float),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru_before, bf16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::gru_before, f16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::rnn, float),
    PYOPS_KERNEL_INFO(grid_forward, Kind::rnn, bf16),
    PYOPS_KERNEL_INFO(grid_forward, Kind::rnn, f16),
});

}  // namespace pyops::rnn
