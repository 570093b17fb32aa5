// Attention's forward pass for short sequences and for windows: output = dropout(softmax(scores)) value, and lse.
//
// A block has the queries of one head of a sequence or window, 16 a warp; those of several heads where they have few; or a part of one's,
// where these are more than its warps or heads are fewer than SMs. Keys and values are in shared memory as they are, copied once
// (attention_mma.cuh: no bank conflicts). A warp walks its keys 64 (or 32) at a time in tiles of 8, none beyond the last that a query
// sees: products, scores, the running maximum and sum of each row, which lie in four lanes, and exp2; the weights, in the layout of mma's
// accumulators, become the left operand of the product with the values without leaving the lane. Sums are rescaled where a maximum has
// risen, after the first keys. Rows come and go in pieces of 16 bytes, which a quad turns to operands and back by shuffles.
//
// Floors: query, key, value and output once over memory bandwidth; 4 * N * M * D flops and N * M exponentials a head.
#pragma once
#include <algorithm>

#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "attention_rows.cuh"

namespace pyops::attention {

constexpr int kMostWarps = 8;
constexpr size_t kRoomy = 48 * 1024;  // shared memory up to which a block takes several problems

template <class Place>
struct ForwardParams {
  Place place;
  Dropout dropout;
  int problems, together, parts;  // blocks have `together` problems, or one of `parts` parts of one
  int tiles;                      // of 16 queries a problem
  int chunks, key_rows;           // of keys and values in shared memory
  int problem_bytes;              // of shared memory
  float plain;                    // > 0: scores are products, this times log2(e) their factor; else Place::score tells
};

// Registers decide how many blocks share an SM. By [Place::kWindows], without spills:
// more threads than a block has, so that a thread may have the registers that as many leave it;
template <int kHead>
constexpr int kThreads[2] = {kHead == 128 ? 256 : 512, 256 * (kHead == 128) + 512 * (kHead == 64) + 640 * (kHead == 32)};
// keys at once: 64 of ViT's heads would take 160 registers, and an SM one block of 7 warps instead of two;
template <int kHead>
constexpr int kKeys[2] = {kHead == 64 ? 32 : 64, 64};
// whether a warp's queries wait in shared memory.
template <int kHead>
constexpr bool kQueriesWait[2] = {kHead == 64, kHead == 32};

// A warp's queries as left operands, steps of 16 columns each.
template <int kSteps, bool kWait>
struct Queries {
  uint32_t own[kWait ? 1 : kSteps][4];
  uint4* place;  // the lane's of step 0

  PYOPS_DEVICE void keep(const uint32_t (&q)[kSteps][4]) {
    PYOPS_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kWait) place[i * kWarpSize] = uint4{q[i][0], q[i][1], q[i][2], q[i][3]};
      else own[i][0] = q[i][0], own[i][1] = q[i][1], own[i][2] = q[i][2], own[i][3] = q[i][3];
    }
  }
  PYOPS_DEVICE void read(int step, uint32_t (&a)[4]) const {
    if constexpr (kWait) {
      const uint4 piece = place[step * kWarpSize];
      a[0] = piece.x, a[1] = piece.y, a[2] = piece.z, a[3] = piece.w;
    } else a[0] = own[step][0], a[1] = own[step][1], a[2] = own[step][2], a[3] = own[step][3];
  }
};

// Row i's 1 / max(|row|, 1e-12), of a window's keys.
template <class T>
PYOPS_DEVICE float unit_of(const Tile& tile, int row) {
  float squares = 0.f;
  for (int chunk = 0; chunk < tile.chunks; ++chunk) {
    Piece<T> piece;
    piece.raw = *tile.at(row, chunk);
    PYOPS_UNROLL
    for (int v = 0; v < 8; ++v) squares += to_float(piece.element[v]) * to_float(piece.element[v]);
  }
  return 1.f / fmaxf(sqrtf(squares), 1e-12f);
}

// The same of a warp's queries, for all its lanes.
template <class T, int kSteps>
PYOPS_DEVICE void query_units(const uint32_t (&q)[kSteps][4], int row0, float* units) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    float squares = 0.f;
    PYOPS_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      PYOPS_UNROLL
      for (int i = half; i < 4; i += 2) {
        const float low = to_float(T{static_cast<uint16_t>(q[step][i])}), high = to_float(T{static_cast<uint16_t>(q[step][i] >> 16)});
        squares += low * low + high * high;
      }
    }
    squares = quad_sum(squares);
    if (lane % 4 == 0) units[row0 + lane / 4 + 8 * half] = 1.f / fmaxf(sqrtf(squares), 1e-12f);
  }
  __syncwarp();
}

// Queries row0 .. row0 + 15 over all their keys.
template <class T, int kSteps, int kBlock, class Place, class At, class Queries>
PYOPS_DEVICE void attend(const ForwardParams<Place>& p, const At& a, const Tile& key_tile, const Tile& value_tile, int row0,
                         const Queries& queries) {
  constexpr int kTiles = kBlock / 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, steps = p.chunks / 2;
  const int own[2] = {row0 + lane / 4, row0 + lane / 4 + 8};
  const Blocks keys = blocks(key_tile, true), values = blocks(value_tile, false);
  int first[2], last[2], begin, end, unused;
  p.place.visible(a, own[0], first[0], last[0]), p.place.visible(a, own[1], first[1], last[1]);
  p.place.visible(a, row0, begin, unused), p.place.visible(a, row0 + 15 < a.n ? row0 + 15 : a.n - 1, unused, end);
  const float factor = p.plain > 0.f ? p.plain : kLog2E;

  float sum[2 * kSteps][4], most[2] = {kMinusInfinity, kMinusInfinity}, total[2] = {0.f, 0.f};
  PYOPS_UNROLL
  for (int i = 0; i < 8 * kSteps; ++i) sum[i / 4][i % 4] = 0.f;

  PYOPS_NO_UNROLL
  for (int base = begin / 16 * 16; base < end; base += kBlock) {
    const int tiles = end - base < kBlock ? ceil_div(end - base, 8) : kTiles;
    float x[kTiles][4];
    PYOPS_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][i % 4] = 0.f;
    PYOPS_UNROLL
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      if (2 * pair >= tiles) break;
      PYOPS_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        if (step >= steps) break;
        uint32_t q[4], b[4];
        queries.read(step, q);
        ptx::ldmatrix_x4(b, keys.at(base + 16 * pair, step));
        multiply<T>(x[2 * pair], q, b[0], b[1]);
        if (2 * pair + 1 < tiles) multiply<T>(x[2 * pair + 1], q, b[2], b[3]);
      }
    }

    const float before[2] = {most[0], most[1]};
    PYOPS_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) break;
      const int column = base + 8 * tile + lane % 4 * 2, columns[2] = {column, column + 1};
      if (!(p.plain > 0.f)) p.place.score(a, own, columns, x[tile]);
      PYOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (columns[e % 2] < first[e / 2] || columns[e % 2] >= last[e / 2]) x[tile][e] = kMinusInfinity;
        most[e / 2] = fmaxf(most[e / 2], x[tile][e]);
      }
    }
    float anchor[2], shrink[2];  // rows that have seen nothing yet have a finite anchor
    PYOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      most[half] = quad_max(most[half]);
      anchor[half] = most[half] == kMinusInfinity ? 0.f : most[half] * factor;
      shrink[half] = ptx::exp2(before[half] * factor - anchor[half]);
      total[half] *= shrink[half];
    }
    if (base >= kBlock && __any_sync(0xffffffffu, most[0] != before[0] || most[1] != before[1])) {
      PYOPS_UNROLL
      for (int i = 0; i < 8 * kSteps; ++i) sum[i / 4][i % 4] *= shrink[i / 2 % 2];
    }
    PYOPS_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) break;  // zeros
      PYOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        x[tile][e] = ptx::exp2(x[tile][e] * factor - anchor[e / 2]);
        total[e / 2] += x[tile][e];
      }
    }
    if (p.dropout.seed) {
      uint32_t stay = 0;  // four bits a tile
      PYOPS_NO_UNROLL
      for (int tile = 0; tile < tiles; ++tile)
        stay |= kept(p.dropout, static_cast<uint64_t>(*p.dropout.seed), a.sequence, a.head, own[0], base + 8 * tile + lane % 4 * 2)
                << 4 * tile;
      PYOPS_UNROLL
      for (int i = 0; i < 4 * kTiles; ++i)
        if ((stay >> i & 1) == 0) x[i / 4][i % 4] = 0.f;
    }
    PYOPS_UNROLL
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      if (2 * pair >= tiles) break;
      uint32_t weights[4];
      left_operand<T>(x[2 * pair], x[2 * pair + 1], weights);
      PYOPS_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        if (step >= steps) break;
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, values.at(base + 16 * pair, step));
        multiply<T>(sum[2 * step], weights, b[0], b[1]);
        multiply<T>(sum[2 * step + 1], weights, b[2], b[3]);
      }
    }
  }

  float share[2];
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(total[half]);
    share[half] = total[half] == 0.f ? 0.f : p.dropout.scale / total[half];  // rows that see nothing are zeros
    if (lane % 4 == 0 && own[half] < a.n) p.place.lse(a)[own[half]] = most[half] * factor * kLn2 + exact_log(total[half]);
  }
  store_sums<T, 2 * kSteps>(p.place.template output<T>(a), row0, a.n, p.place.D, sum, share);
}

// kHead: the most elements of a head.
template <class T, int kHead, class Place>
PYOPS_KERNEL(kThreads<kHead>[Place::kWindows])
attention_forward(ForwardParams<Place> p) {
  constexpr int kSteps = kHead / 16;
  unsigned char* const shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), warps = threads / kWarpSize;
  const int block = static_cast<int>(blockIdx.x), problem = block / p.parts * p.together, part = block % p.parts;
  const int count = p.problems - problem < p.together ? p.problems - problem : p.together;
  const auto tile = [&](int which, int value) {
    return tile_of(shared + which * p.problem_bytes + value * p.key_rows * p.chunks * static_cast<int>(sizeof(uint4)), p.chunks);
  };
  const auto at = [&](int which) {
    if constexpr (Place::kWindows) {
      unsigned char* const own = shared + which * p.problem_bytes + 2 * p.key_rows * p.chunks * static_cast<int>(sizeof(uint4));
      return p.place.at(problem + which, p.place.shared_at(own));
    } else return p.place.at(problem + which);
  };
  if constexpr (Place::kWindows) {
    for (int i = 0; i < count; ++i) p.place.prepare(at(i), thread, threads);
    __syncthreads();
  }
  for (int i = 0; i < count; ++i) {
    const auto a = at(i);
    const int rows = round_up(a.m, 16);
    stage_rows(tile(i, 0), p.place.template key<T>(a), a.m, rows, p.place.D, thread, threads);
    stage_rows(tile(i, 1), p.place.template value<T>(a), a.m, rows, p.place.D, thread, threads);
  }
  ptx::cp_async_commit();

  const int unit = part * warps + thread / kWarpSize, which = unit / p.tiles, row0 = unit % p.tiles * 16;
  const auto a = at(which < count ? which : 0);
  const bool busy = which < count && row0 < a.n;
  uint32_t q[kSteps][4];
  if (busy) load_left<T, kSteps>(p.place.template query<T>(a), row0, a.n, p.place.D, q);
  ptx::cp_async_wait<0>();
  __syncthreads();
  if constexpr (Place::kWindows) {
    if (p.place.logit_scale) {
      for (int i = thread; i < count * p.key_rows; i += threads)
        at(i / p.key_rows).shared.units[p.key_rows + i % p.key_rows] = unit_of<T>(tile(i / p.key_rows, 0), i % p.key_rows);
      __syncthreads();
      if (busy) query_units<T>(q, row0, a.shared.units);
    }
  }
  if (!busy) return;
  Queries<kSteps, kQueriesWait<kHead>[Place::kWindows]> queries;
  queries.place =
      reinterpret_cast<uint4*>(shared + p.together * p.problem_bytes) + thread / kWarpSize * kSteps * kWarpSize + thread % kWarpSize;
  queries.keep(q);
  attend<T, kSteps, kKeys<kHead>[Place::kWindows]>(p, a, tile(which, 0), tile(which, 1), row0, queries);
}

// Spreads the problems over blocks. place and dropout are set, and plain.
template <class T, int kHead, class Place>
void launch_forward(ForwardParams<Place> p, int64_t problems, int N, int M, cudaStream_t stream) {
  const DeviceLimits limits = device_limits();
  if (problems > INT32_MAX / 2) throw std::runtime_error("attention: too many heads for one launch");
  p.problems = static_cast<int>(problems), p.tiles = ceil_div(N, 16);
  p.chunks = round_up(p.place.D, 16) / 8, p.key_rows = round_up(M, 16);
  p.problem_bytes = 2 * p.key_rows * p.chunks * static_cast<int>(sizeof(uint4));
  if constexpr (Place::kWindows) p.problem_bytes += p.place.shared_bytes();
  if (p.problem_bytes > limits.shared_bytes)
    throw std::runtime_error("attention: keys and values need " + std::to_string(p.problem_bytes) +
                             " bytes of shared memory, this GPU has " + std::to_string(limits.shared_bytes));
  const int fitting = p.problem_bytes ? static_cast<int>(kRoomy) / p.problem_bytes : 4;
  p.together = std::max(1, std::min({4 / p.tiles, fitting, p.problems / limits.sm_count}));
  const int blocks = ceil_div(p.problems, p.together), units = p.together * p.tiles;
  // A warp has 16 queries; no more than needed to fill the SMs read the same keys.
  p.parts = std::max(ceil_div(units, kMostWarps), p.together == 1 ? std::clamp(limits.sm_count / blocks, 1, ceil_div(units, 4)) : 1);
  const int warps = ceil_div(units, p.parts);
  const int64_t grid = int64_t{blocks} * p.parts;
  if (grid > INT32_MAX) throw std::runtime_error("attention: too many heads for one launch");
  size_t bytes = static_cast<size_t>(p.together) * p.problem_bytes;
  if (kQueriesWait<kHead>[Place::kWindows]) bytes += sizeof(uint4) * (kHead / 16) * kWarpSize * warps;
  const LaunchShape shape{dim3(static_cast<unsigned>(grid)), warps * kWarpSize, bytes};
  launch("attention_forward", attention_forward<T, kHead, Place>, shape, stream, p);
}

template <class T, class Place>
void launch_forward_of_head(const ForwardParams<Place>& p, int64_t problems, int N, int M, cudaStream_t stream) {
  if (p.place.D <= 32) launch_forward<T, 32>(p, problems, N, M, stream);
  else if (p.place.D <= 64) launch_forward<T, 64>(p, problems, N, M, stream);
  else launch_forward<T, 128>(p, problems, N, M, stream);
}

#define PYOPS_ATTENTION_FORWARD_KERNELS(T, Place)                                                         \
  PYOPS_KERNEL_INFO(attention_forward, T, 32, Place), PYOPS_KERNEL_INFO(attention_forward, T, 64, Place), \
      PYOPS_KERNEL_INFO(attention_forward, T, 128, Place)

}  // namespace pyops::attention
