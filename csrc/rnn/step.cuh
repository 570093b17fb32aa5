// What the two step kernels share: their workspace, the packed weights, and the product of one launch.
//
// A block computes, for 32 units and 64 batch rows, NQ sums over K (forward: the G gates of a unit; backward: one). Both
// operands are rows of K, zero-padded to whole tiles, so the product needs no masks: weights [NQ][padded H][K] and states
// [64-padded B][K]. Three stages of 128-byte (float) or 64-byte (16-bit) row pieces come through cp.async. 8 warps: 2 across
// units x 4 across rows, each 16 units x 16 rows x NQ.
#pragma once
#include "paths.cuh"

namespace pyops::rnn {

constexpr int kStepUnits = 32, kStepRows = 64, kStepK = 32, kStages = 3;
constexpr int kRowTiles = 2;  // batch tiles of 8 rows per warp

// Elements per row at rest in shared memory: 16-bit rows are 64 bytes, read two at a time; float rows need a gap.
template <class T>
constexpr int kStepPitch = is_16bit<T> ? kStepK : kStepK + 4;
template <class T, int NQ>
constexpr int kStageElements = (NQ * kStepUnits + kStepRows) * kStepPitch<T>;
template <class T, int NQ>
constexpr size_t kStepShared = kStages * kStageElements<T, NQ> * sizeof(T);

struct StepWorkspace {
  void* exchange;   // [2][padded B][width] of T: what the next product multiplies
  void* exchange2;  // gru_before forward: r*h, [padded B][width]
  float* state;     // [B, H] carried state
  float* aux;       // gru_before forward: z, [B, H]
  void* weights;    // packed: forward [G][padded H][padded H], backward [padded H][G*padded H]
  size_t zeroed, bytes;
};

inline int64_t padded_rows(int64_t B) { return round_up(B, kStepRows); }

inline StepWorkspace carve_step(void* base, Kind kind, size_t element, int64_t B, int64_t H, bool backward) {
  const int64_t padded = padded_hidden(H), width = padded * (backward ? gates_of(kind) : 1);
  const bool two_phases = kind == Kind::gru_before && !backward;
  Carver carve(base);
  StepWorkspace w{};
  w.exchange = carve.take<char>(2 * padded_rows(B) * width * element);
  w.exchange2 = carve.take<char>(two_phases ? padded_rows(B) * width * element : 0);
  w.zeroed = carve.size();
  w.state = carve.take<float>(B * H);
  w.aux = carve.take<float>(two_phases ? B * H : 0);
  w.weights = carve.take<char>(gates_of(kind) * padded * padded * element);
  w.bytes = carve.size();
  return w;
}

template <class Scan>
struct StepParams {
  Scan scan;
  StepWorkspace workspace;
  int64_t exchange_elements;  // in one of the two buffers
  int s;
};

// One stage: row pieces of kStepK elements from K = k. Weight rows land in tile order (unit 2g at row g, unit 2g+1 at row g+8
// of its 16), so that neighbouring lanes read neighbouring rows.
template <class T, int NQ>
PYOPS_DEVICE void load_stage(T* stage, const T* weights, int64_t gate_stride, int64_t weight_pitch, const T* states, int64_t state_stride,
                             int64_t k) {
  constexpr int kPieces = kStepK / kLaneK<T>, kWeightRows = NQ * kStepUnits;
  for (int i = threadIdx.x; i < (kWeightRows + kStepRows) * kPieces; i += kStepThreads) {
    const int row = i / kPieces, column = i % kPieces * kLaneK<T>;
    if (row < kWeightRows) {
      const int q = row / kStepUnits, unit = row % kStepUnits, at_row = row - unit % 16 + unit % 16 / 2 + unit % 2 * 8;
      ptx::cp_async_16(stage + at_row * kStepPitch<T> + column, weights + q * gate_stride + unit * weight_pitch + k + column);
    } else {
      ptx::cp_async_16(stage + row * kStepPitch<T> + column, states + (row - kWeightRows) * state_stride + k + column);
    }
  }
}

// sum[q][tile] for this warp's 16 units and batch tiles. `weights` and `states` point at the block's first unit and row.
template <class T, int NQ>
PYOPS_DEVICE void step_product(float (&sum)[NQ][kRowTiles][4], const T* weights, int64_t gate_stride, int64_t weight_pitch, const T* states,
                               int64_t state_stride, int64_t K) {
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int unit_row = warp % 2 * kTileUnits, batch_row = NQ * kStepUnits + warp / 2 * kRowTiles * kTileRows;
  const int chunks = static_cast<int>(K / kStepK);
  auto load = [&](int chunk) {
    if (chunk < chunks)
      load_stage<T, NQ>(shared + chunk % kStages * kStageElements<T, NQ>, weights, gate_stride, weight_pitch, states, state_stride,
                        static_cast<int64_t>(chunk) * kStepK);
    ptx::cp_async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  PYOPS_NO_UNROLL
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk has landed for all; the stage of the one before is free
    load(chunk + kStages - 1);
    const T* stage = shared + chunk % kStages * kStageElements<T, NQ>;
    PYOPS_UNROLL
    for (int block = 0; block < kStepK / kBlockK<T>; ++block) {
      StateFragment<T> h[kRowTiles];
      PYOPS_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile)
        h[tile] = load_state<T>(stage + (batch_row + tile * kTileRows) * kStepPitch<T>, kStepPitch<T>, block, lane);
      PYOPS_UNROLL
      for (int q = 0; q < NQ; ++q) {
        const T* row = stage + (q * kStepUnits + unit_row + lane / 4) * kStepPitch<T> + block * kBlockK<T> + lane_k<T>(lane);
        const WeightFragment w{*reinterpret_cast<const uint4*>(row), *reinterpret_cast<const uint4*>(row + 8 * kStepPitch<T>)};
        PYOPS_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) multiply<T>(sum[q][tile], w, h[tile]);
      }
    }
  }
  ptx::cp_async_wait<0>();
}

// The batch row and unit of cell j of batch tile `tile` of this lane.
PYOPS_DEVICE int step_row(int tile, int j) {
  return blockIdx.y * kStepRows + (threadIdx.x / kWarpSize / 2 * kRowTiles + tile) * kTileRows + tile_row(threadIdx.x % kWarpSize, j);
}
PYOPS_DEVICE int step_unit(int j) {
  return blockIdx.x * kStepUnits + threadIdx.x / kWarpSize % 2 * kTileUnits + tile_unit(threadIdx.x % kWarpSize, j);
}

// Whether any of the block's rows takes part in step s: else it skips the product. Holds a barrier.
template <class Scan>
PYOPS_DEVICE bool any_row_takes_part(const Scan& p, int s) {
  return __syncthreads_or(threadIdx.x < kStepRows && s < length_of(p, blockIdx.y * kStepRows + threadIdx.x));
}

// W_hh [G*H, H] -> packed, zero-padded rows of K. Once per call: 32 x 32 tiles through shared memory, both sides coalesced.
//   forward    packed[q][unit][k] = W[q*H + unit, k]
//   transpose  packed[unit][q][k] = W[q*H + k, unit]
struct PackParams {
  const void* weight;
  void* packed;
  int H, gates;
};

template <class Element, bool kTranspose>
PYOPS_KERNEL(kStepThreads)
pack_weights(PackParams p) {
  auto* const tile = reinterpret_cast<Element*>(dynamic_shared());  // [32][33]
  const int64_t H = p.H, padded = gridDim.x * 32;
  const int q = blockIdx.z, column0 = blockIdx.x * 32, row0 = blockIdx.y * 32, x = threadIdx.x % 32;
  for (int y = threadIdx.x / 32; y < 32; y += kStepThreads / 32) {
    const bool inside = row0 + y < H && column0 + x < H;
    tile[y * 33 + x] = inside ? static_cast<const Element*>(p.weight)[(q * H + row0 + y) * H + column0 + x] : Element(0);
  }
  __syncthreads();
  for (int y = threadIdx.x / 32; y < 32; y += kStepThreads / 32) {
    Element* packed = static_cast<Element*>(p.packed);
    if (kTranspose) packed[((column0 + y) * static_cast<int64_t>(p.gates) + q) * padded + row0 + x] = tile[x * 33 + y];
    else packed[(q * padded + row0 + y) * padded + column0 + x] = tile[y * 33 + x];
  }
}

template <class T, bool kTranspose>
void launch_pack(const void* weight, void* packed, int H, int gates, cudaStream_t stream) {
  using Element = std::conditional_t<is_16bit<T>, uint16_t, uint32_t>;
  const unsigned tiles = static_cast<unsigned>(padded_hidden(H) / 32);
  launch("pack_weights", pack_weights<Element, kTranspose>, LaunchShape{dim3(tiles, tiles, gates), kStepThreads, 32 * 33 * sizeof(Element)},
         stream, PackParams{weight, packed, H, gates});
}

inline dim3 step_grid(int64_t B, int64_t H) {
  return dim3(static_cast<unsigned>(ceil_div(H, kStepUnits)), static_cast<unsigned>(ceil_div(B, kStepRows)));
}

}  // namespace pyops::rnn
