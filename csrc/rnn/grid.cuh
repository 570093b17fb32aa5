// What the two grid kernels share: their workspace, the exchange between blocks and the sum over a block's warps.
//
// A block owns 16 hidden units of one batch slice. Its 8 warps cut K between them, each holding its part of the weights, so
// every weight is read once per step and from where it rests. What the next step multiplies (h, or the gates' gradients) goes
// through global memory, double-buffered, behind one flag per block: a block raises its flag when its 16 columns are written,
// a warp waits only for the blocks whose columns it is about to read. All warps of a block together wait for every block of
// the slice, and a block overwrites a buffer only after that: nobody can still be reading it.
#pragma once
#include "paths.cuh"

namespace pyops::rnn {

constexpr int kGridWarps = kGridThreads / kWarpSize;
// Blocks of K per warp and tile in registers, at 8 registers each; 8 warps leave a thread 255.
template <Kind K>
constexpr int kGridRegisterBlocks = K == Kind::rnn ? 8 : 4;
constexpr int kCellThreads = kTileUnits * kTileRows;  // threads that do the pointwise math of one batch tile
// A warp's sum of one tile at rest: float4 per lane, a gap after every fourth, so that both sides are free of bank conflicts.
constexpr int kPartialFloats = 8 * 20;

struct GridWorkspace {
  void* exchange;        // [2][row_slices*rows][width] of T
  void* exchange2;       // gru_before forward: r*h, [row_slices*rows][width] of T
  unsigned* flags;       // [row_slices][unit_slices], counts this block's finished exchanges
  float* state;          // [B, H] carried state
  float* aux;            // gru_before forward: z, [B, H]
  size_t zeroed, bytes;  // the exchanges and flags must start as zeros
};

inline GridWorkspace carve_grid(void* base, Kind kind, size_t element, const GridShape& shape, int64_t B, int64_t H, bool backward) {
  const int64_t width = padded_hidden(H) * (backward ? gates_of(kind) : 1);
  const int64_t rows = static_cast<int64_t>(shape.row_slices) * shape.rows;
  const bool two_phases = kind == Kind::gru_before && !backward;
  Carver carve(base);
  GridWorkspace w{};
  w.exchange = carve.take<char>(2 * rows * width * element);
  w.exchange2 = carve.take<char>(two_phases ? rows * width * element : 0);
  w.flags = carve.take<unsigned>(shape.row_slices * shape.unit_slices);
  w.zeroed = carve.size();
  w.state = carve.take<float>(B * H);
  w.aux = carve.take<float>(two_phases ? B * H : 0);
  w.bytes = carve.size();
  return w;
}

template <class Scan>
struct GridParams {
  Scan scan;
  GridWorkspace workspace;
  int rows;  // batch rows per slice
};

// This warp's share of K: blocks [first, first + count).
struct KRange {
  int first, count;
};
template <class T>
PYOPS_HOST_DEVICE constexpr int blocks_per_warp(int H) {
  return ceil_div(ceil_div(H, kBlockK<T>), kGridWarps);
}
template <class T>
PYOPS_DEVICE KRange k_range(int H, int warp) {
  const int total = ceil_div(H, kBlockK<T>), each = blocks_per_warp<T>(H), first = warp * each;
  const int left = total - first;
  return {first, left < 0 ? 0 : left < each ? left : each};
}

// Waits until the blocks that own this warp's k have finished `epoch` exchanges. `flags` is the slice's.
template <class T>
PYOPS_DEVICE void wait_for_owners(const unsigned* flags, KRange range, int unit_slices, unsigned epoch, int lane) {
  const int first = range.first * kBlockK<T> / kTileUnits, last_k = (range.first + range.count) * kBlockK<T>;
  int last = range.count ? ceil_div(last_k, kTileUnits) : first;
  last = last < unit_slices ? last : unit_slices;
  for (int owner = first + lane; owner < last; owner += kWarpSize) ptx::wait_at_least(flags + owner, epoch);
  __syncwarp();  // what one lane has seen, the warp has
}

// After every thread's writes to the exchange. The barrier also ends all reads of the partial sums.
PYOPS_DEVICE void publish(unsigned* flag, unsigned epoch) {
  __syncthreads();
  if (threadIdx.x == 0) ptx::store_release(flag, epoch);
}

template <int G>
PYOPS_DEVICE void store_partial(float* partial, int warp, int lane, const float (&sum)[G][4], int begin, int end) {
  PYOPS_UNROLL
  for (int q = 0; q < G; ++q)
    if (q >= begin && q < end)
      *reinterpret_cast<float4*>(partial + (warp * G + q) * kPartialFloats + (lane + lane / 4) * 4) =
          float4{sum[q][0], sum[q][1], sum[q][2], sum[q][3]};
}

// The sum over warps, in warp order, for the cell (unit, row) of tile q.
template <int G>
PYOPS_DEVICE float collect_partial(const float* partial, int q, int unit, int row) {
  const int lane = unit / 2 * 4 + row / 2, within = (lane + lane / 4) * 4 + unit % 2 * 2 + row % 2;
  float total = 0.f;
  PYOPS_UNROLL
  for (int warp = 0; warp < kGridWarps; ++warp) total += partial[(warp * G + q) * kPartialFloats + within];
  return total;
}

template <Kind K, class T>
constexpr size_t grid_shared(int H) {  // forward and backward: the transposed slice is as large
  using Weights = ResidentWeights<T, gates_of(K), kGridRegisterBlocks<K>, false>;
  return kGridWarps * (gates_of(K) * kPartialFloats * sizeof(float) + Weights::shared_bytes(blocks_per_warp<T>(H)));
}

// Zeros the exchanges and flags, puts h0 (forward) into the first buffer, launches.
template <class T, class Scan>
void launch_grid(const char* name, void (*kernel)(GridParams<Scan>), const Scan& p, Kind kind, bool backward, size_t shared_bytes,
                 const void* first_states, cudaStream_t stream) {
  const GridShape shape = grid_shape(p.B, p.H, device_limits().sm_count);
  const GridWorkspace workspace = carve_grid(p.workspace, kind, sizeof(T), shape, p.B, p.H, backward);
  zero_async(p.workspace, workspace.zeroed, stream);
  if (first_states)
    copy_rows_async(workspace.exchange, padded_hidden(p.H) * sizeof(T), first_states, p.H * sizeof(T), p.H * sizeof(T), p.B, stream);
  const LaunchShape launch_shape{dim3(shape.unit_slices, shape.row_slices), kGridThreads, shared_bytes, true};
  launch(name, kernel, launch_shape, stream, GridParams<Scan>{p, workspace, shape.rows});
}

}  // namespace pyops::rnn
