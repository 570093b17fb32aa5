// The product every path is made of: a tile of 16 hidden units x 8 batch rows, reduced over blocks of K.
//
// The weights are mma's A operand (M = units), the states its B operand (N = batch): small batches waste nothing.
// Which row of A is which unit, and which k is which column, is free as long as A and B agree. Here
//   units: A row g is unit 2g, row g+8 is unit 2g+1, so that a lane's cells are two neighbouring units;
//   K:     a lane's 16 bytes of a row are its share of one block, one 128-bit load per row: 16-bit types take blocks of 32
//          (lane t has k = 8t..8t+7, two mma deep), float blocks of 4 (every lane has k = 0..3, plain FMA).
// A lane (g = lane/4, t = lane%4) ends with cell j = 0..3: unit 2g + j/2, batch row 2t + j%2.
#pragma once
#include "../common/convert.cuh"

namespace pyops::rnn {

constexpr int kTileUnits = 16, kTileRows = 8;

template <class T>
constexpr int kBlockK = is_16bit<T> ? 32 : 4;
template <class T>
constexpr int kLaneK = is_16bit<T> ? 8 : 4;  // elements in 16 bytes
// A 16 x kBlockK weight fragment at rest, in 16-byte pieces in the order lanes read them: conflict-free.
template <class T>
constexpr int kFragmentPieces = is_16bit<T> ? 64 : 16;

struct WeightFragment {
  uint4 row[2];
};  // units 2g and 2g+1
template <class T>
struct StateFragment {
  uint4 row[is_16bit<T> ? 1 : 2];
};  // batch row g; float: rows 2t and 2t+1

PYOPS_DEVICE int tile_unit(int lane, int j) { return lane / 4 * 2 + j / 2; }
PYOPS_DEVICE int tile_row(int lane, int j) { return lane % 4 * 2 + j % 2; }

// First element, within a block of K, of this lane's 16 bytes.
template <class T>
PYOPS_DEVICE int lane_k(int lane) {
  return is_16bit<T> ? lane % 4 * 8 : 0;
}

// The batch row of this lane's piece i of a StateFragment.
template <class T>
PYOPS_DEVICE int state_row(int lane, int i) {
  return is_16bit<T> ? lane / 4 : lane % 4 * 2 + i;
}

template <class T>
PYOPS_DEVICE void multiply(float (&sum)[4], const WeightFragment& w, const StateFragment<T>& h) {
  if constexpr (is_16bit<T>) {
    const uint4 a = w.row[0], b = w.row[1], x = h.row[0];
    ptx::mma_m16n8k16(T{}, sum, a.x, b.x, a.y, b.y, x.x, x.y);
    ptx::mma_m16n8k16(T{}, sum, a.z, b.z, a.w, b.w, x.z, x.w);
  } else {
    PYOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint4 a = w.row[j / 2], x = h.row[j % 2];
      // Four products first, then one addition to the long sum: a quarter of the roundings at the sum's size.
      float part = bits_to_float(a.x) * bits_to_float(x.x);
      part = fmaf(bits_to_float(a.y), bits_to_float(x.y), part);
      part = fmaf(bits_to_float(a.z), bits_to_float(x.z), part);
      sum[j] += fmaf(bits_to_float(a.w), bits_to_float(x.w), part);
    }
  }
}

// Elements per row of a [rows, n] array of states in shared memory, so that StateFragment loads are free of bank conflicts:
// 16-bit rows 64 bytes past a multiple of 128, float rows an odd number of 16-byte pieces. n is a multiple of kBlockK.
template <class T>
PYOPS_HOST_DEVICE constexpr int state_pitch(int n) {
  return is_16bit<T> ? (n % 64 == 0 ? n + 32 : n) : (n / 4 % 2 == 0 ? n + 4 : n);
}

template <class T>
PYOPS_DEVICE StateFragment<T> load_state(const T* rows, int pitch, int k_block, int lane) {
  StateFragment<T> fragment;
  constexpr int kPieces = is_16bit<T> ? 1 : 2;
  PYOPS_UNROLL
  for (int i = 0; i < kPieces; ++i)
    fragment.row[i] = *reinterpret_cast<const uint4*>(rows + state_row<T>(lane, i) * pitch + k_block * kBlockK<T> + lane_k<T>(lane));
  return fragment;
}

// The same from rows other blocks wrote during this launch.
template <class T>
PYOPS_DEVICE StateFragment<T> load_state_l2(const T* rows, int64_t pitch, int k_block, int lane) {
  StateFragment<T> fragment;
  constexpr int kPieces = is_16bit<T> ? 1 : 2;
  PYOPS_UNROLL
  for (int i = 0; i < kPieces; ++i)
    fragment.row[i] =
        ptx::load_l2(reinterpret_cast<const uint4*>(rows + state_row<T>(lane, i) * pitch + k_block * kBlockK<T> + lane_k<T>(lane)));
  return fragment;
}

// W_hh's share of one warp: G tiles (one per gate) of 16 units by `count` blocks of K from block `first`, loaded once and
// kept for the whole sequence. The first kRegisterBlocks blocks stay in registers (16-bit only: a float fragment is held
// by four lanes at once, which registers cannot afford), the rest in shared memory.
//   forward   tile q = W[q*H + unit, k]       reduces h over k
//   transpose tile q = W[q*H + k, unit]       reduces the gradient of gate q over k
template <class T, int G, int kRegisterBlocks, bool kTranspose>
struct ResidentWeights {
  static constexpr int kRegisters = is_16bit<T> ? kRegisterBlocks : 0;
  WeightFragment fragments[G][kRegisters > 0 ? kRegisters : 1];
  uint4* shared;
  int first, count;

  PYOPS_HOST_DEVICE static constexpr size_t shared_bytes(int count) {
    return count > kRegisters ? static_cast<size_t>(count - kRegisters) * G * kFragmentPieces<T> * sizeof(uint4) : 0;
  }

  PYOPS_DEVICE static uint4 gather(const T* weight, int H, int q, int unit, int k) {  // zeros outside the matrix
    union {
      uint4 piece;
      T element[kLaneK<T>];
    } value;
    value.piece = uint4{0, 0, 0, 0};
    PYOPS_UNROLL
    for (int e = 0; e < kLaneK<T>; ++e)
      if (unit < H && k + e < H) {
        const int64_t row = static_cast<int64_t>(q) * H + (kTranspose ? k + e : unit);
        value.element[e] = weight[row * H + (kTranspose ? unit : k + e)];
      }
    return value.piece;
  }

  PYOPS_DEVICE uint4* piece(int q, int block, int i, int lane) const {
    const int within = is_16bit<T> ? i * 32 + lane : i * 8 + lane / 4;
    return shared + (static_cast<int64_t>(block - kRegisters) * G + q) * kFragmentPieces<T> + within;
  }

  PYOPS_DEVICE void load(const T* weight, int H, int unit0, int first_block, int blocks, uint4* own_shared, int lane) {
    shared = own_shared, first = first_block, count = blocks;
    const int unit = unit0 + tile_unit(lane, 0), k0 = first * kBlockK<T> + lane_k<T>(lane);
    PYOPS_UNROLL
    for (int block = 0; block < kRegisters; ++block) PYOPS_UNROLL
    for (int q = 0; q < G; ++q) PYOPS_UNROLL
    for (int i = 0; i < 2; ++i)
      fragments[q][block].row[i] = block < count ? gather(weight, H, q, unit + i, k0 + block * kBlockK<T>) : uint4{0, 0, 0, 0};
    PYOPS_NO_UNROLL
    for (int block = kRegisters; block < count; ++block) PYOPS_NO_UNROLL
    for (int q = 0; q < G; ++q)
      if (is_16bit<T> || lane % 4 == 0) {
        *piece(q, block, 0, lane) = gather(weight, H, q, unit, k0 + block * kBlockK<T>);
        *piece(q, block, 1, lane) = gather(weight, H, q, unit + 1, k0 + block * kBlockK<T>);
      }
    __syncwarp();  // a warp reads only what it wrote
  }

  // sum[q] += tile q times its states, q in [kBegin, kEnd). `load_states(q, block)` gives block `block` (counted over all of
  // K) of what tile q multiplies; forward multiplies the same h in every tile and asks once, for q = 0.
  template <int kBegin, int kEnd, class LoadStates>
  PYOPS_DEVICE void multiply_all(float (&sum)[G][4], int lane, LoadStates&& load_states) const {
    StateFragment<T> h;
    PYOPS_UNROLL
    for (int block = 0; block < kRegisters; ++block)
      if (block < count)  // the same for the whole warp
        PYOPS_UNROLL
    for (int q = kBegin; q < kEnd; ++q) {
      if (kTranspose || q == kBegin) h = load_states(kTranspose ? q : 0, first + block);
      multiply<T>(sum[q], fragments[q][block], h);
    }
    PYOPS_NO_UNROLL
    for (int block = kRegisters; block < count; ++block) PYOPS_UNROLL
    for (int q = kBegin; q < kEnd; ++q) {
      if (kTranspose || q == kBegin) h = load_states(kTranspose ? q : 0, first + block);
      multiply<T>(sum[q], WeightFragment{*piece(q, block, 0, lane), *piece(q, block, 1, lane)}, h);
    }
  }
};

}  // namespace pyops::rnn
