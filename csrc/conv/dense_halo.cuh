// The dense convolution of few channels: its tile of the input with its halo, in shared memory once for all taps.
//
// A block computes 8 x 16 (16 x 8, 4 x 32) output positions of one image x 64 output channels. The input positions that they read lie in
// shared memory as records, a row of them an input row. K, the product's depth, goes in pieces of 16 bytes; a record is one or more of
// them:
//   C of 5 (floats: 3) or more   the channels of a position, zeros up to a whole piece
//   C of 4 or fewer (stems)      `folded` neighbouring positions of a row, of 1, 2 or 4 channels each: a piece is as many taps of a filter
//                                row. Past the row's last tap the piece is cut off, for zero filters do not make zeros of NaN
// By each tap the 128 positions read records at the same distance from their own, so that ldmatrix, which takes an address a lane, finds
// the product's rows where they lie. For a stride the columns of each residue are neighbours. The tile's rows are 2x2 windows: 8 of them
// are 4 columns of 2 rows, in as many groups of banks where a record is an odd number of pieces long and a row's records times the
// stride leave 4 of 8.
#pragma once
#include "dense_conv.cuh"
#include "dense_cuda.h"
#include "dense_pack.cuh"

namespace pyops::conv {

constexpr int kHaloM = 128;

struct HaloShape {
  int log_windows;          // 2x2 windows beside one another in a tile: 4, 8 or 16
  int folded, channels;     // positions in a record, and channels of each; folded 1: channels are whole pieces
  int pieces, pitch;        // of a record: pieces, bytes from one to the next
  int columns, groups;      // taps of a filter row with zeros up to whole records; records of them
  int rows, residues, run;  // input rows; of a row: residues of the column by the stride, records of each
  int row_records;          // from one row to the next
  int last_words;           // of a row's last piece, 4 bytes each
};

struct HaloParams : DenseParams {
  HaloShape halo;
  int y_tiles, x_tiles;
};

PYOPS_HOST_DEVICE inline int tile_columns(const HaloShape& h) { return 2 << h.log_windows; }
PYOPS_HOST_DEVICE inline int tile_rows(const HaloShape& h) { return kHaloM / 2 >> h.log_windows; }

inline size_t halo_tile_bytes(const HaloShape& h) { return static_cast<size_t>(h.rows) * h.row_records * h.pitch; }

// Behind the stages of filters: the tile, a piece of zeros, where each piece of K lies.
inline size_t halo_shared_bytes(const HaloShape& h, int K_pieces) {
  const size_t stages = size_t{kDenseStages} * kTileO * kRowBytes, sums = sizeof(float) * kHaloM * kSumsPitch;
  const size_t all = stages + halo_tile_bytes(h) + 16 + sizeof(int) * round_up(K_pieces, kStepPieces);
  return all > sums ? all : sums;
}

inline HaloShape halo_shape(const Dense& p, int log_windows) {
  const int element = static_cast<int>(element_size(p.dtype)), piece = 16 / element, C = static_cast<int>(p.s.C);
  const int least = 4 / element;  // channels: words of 4 bytes are cut off whole
  HaloShape h{};
  h.log_windows = log_windows;
  h.channels = C > 4 ? round_up(C, piece) : C > 2 ? 4 : C > least ? 2 : least;
  h.folded = h.channels < piece ? piece / h.channels : 1;
  h.pieces = ceil_div(h.channels, piece), h.pitch = (h.pieces | 1) * 16;
  h.columns = round_up(p.s.KW, h.folded), h.groups = h.columns / h.folded;
  h.last_words = (p.s.KW - (h.groups - 1) * h.folded) * h.channels * element / 4;
  h.rows = (tile_rows(h) - 1) * p.s.stride_h + p.s.KH;
  h.residues = h.folded % p.s.stride_w == 0 ? 1 : p.s.stride_w;
  h.run = tile_columns(h) + (h.columns - h.folded) / p.s.stride_w;
  h.row_records = h.residues * h.run;
  for (int tries = 0; tries < 8 && h.row_records * p.s.stride_h % 8 != 4; ++tries) ++h.row_records;
  return h;
}

// How the tile lies, where this kernel is to be taken: `vectors` tells whether the input comes in whole pieces.
std::optional<HaloShape> plan_halo(const Dense& p, bool vectors, std::optional<DensePath> path);

// Queues the kernel; `params` as for dense_tile, weight [O, weight_pitch]: KH x columns x channels.
void launch_halo(const Dense& p, const HaloShape& shape, bool vectors, const DenseParams& params, cudaStream_t stream);

// A block's positions. Row m of its tile is a position of window m / 4.
struct HaloBlock {
  static constexpr bool kHoles = true;
  static constexpr int positions = kHaloM;
  static constexpr int64_t k0 = 0;
  int o0, end, K;
  int n, y, x;  // image, first output position
  int log_windows;

  PYOPS_DEVICE explicit HaloBlock(const HaloParams& p) {
    int block = static_cast<int>(blockIdx.x);
    o0 = block % p.o_tiles * kTileO, block /= p.o_tiles;
    x = block % p.x_tiles * tile_columns(p.halo), block /= p.x_tiles;
    y = block % p.y_tiles * tile_rows(p.halo), n = block / p.y_tiles;
    log_windows = p.halo.log_windows;
    end = p.O, K = p.y.taps * p.halo.columns * p.halo.channels;
  }
  PYOPS_DEVICE int row_of(int m) const { return (m / 4 >> log_windows) * 2 + m % 4 / 2; }
  PYOPS_DEVICE int column_of(int m) const { return (m / 4 & ((1 << log_windows) - 1)) * 2 + m % 2; }

  PYOPS_DEVICE int place(const DenseParams& p, int m) const {
    const int row = y + row_of(m), column = x + column_of(m);
    return row < p.y.out && column < p.x.out ? (n * p.y.out + row) * p.x.out + column : -1;
  }
  PYOPS_DEVICE int pooled_place(const DenseParams& p, int m) const {
    const int rows = p.y.out / 2, columns = p.x.out / 2, row = (y + row_of(m)) / 2, column = (x + column_of(m)) / 2;
    return row < rows && column < columns ? (n * rows + row) * columns + column : -1;
  }
};

// The block's share of the input, piece by piece: each(record's row, its first column, piece of the record, where it goes).
template <class Each>
PYOPS_DEVICE void for_each_piece(const HaloParams& p, const HaloBlock& block, unsigned char* tile, Each&& each) {
  const HaloShape& h = p.halo;
  const int used = h.residues * h.run, y0 = block.y * p.y.in_step + p.y.offset, x0 = block.x * p.x.in_step + p.x.offset;
  PYOPS_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < h.rows * used * h.pieces; i += kTileThreads<kHaloM>) {
    const int piece = i % h.pieces, record = i / h.pieces % used, row = i / h.pieces / used;
    each(y0 + row, x0 + record / h.run + record % h.run * p.x.in_step, piece,
         reinterpret_cast<uint4*>(tile + (row * h.row_records + record) * h.pitch + piece * 16));
  }
}

PYOPS_DEVICE bool is_inside(const Axis& axis, int at) { return static_cast<unsigned>(at) < static_cast<unsigned>(axis.in); }

// Element by element, zeros where there is nothing; floats rounded to tf32.
template <class T>
PYOPS_DEVICE uint4 gathered(const HaloParams& p, int n, int y, int x, int piece) {
  Piece<T> value;
  value.raw = uint4{0, 0, 0, 0};
  int c = piece * kPiece<T>;
  PYOPS_UNROLL
  for (int v = 0; v < kPiece<T>; ++v, ++c) {
    if (c == p.halo.channels) c = 0, ++x;
    if (c < p.C && is_inside(p.y, y) && is_inside(p.x, x))
      value.element[v] = static_cast<const T*>(p.input)[static_cast<int64_t>((n * p.y.in + y) * p.x.in + x) * p.input_stride + c];
  }
  return value.raw;
}

PYOPS_DEVICE uint4 rounded_to_tf32(uint4 value) {
  value.x = ptx::float_to_tf32(bits_to_float(value.x)), value.y = ptx::float_to_tf32(bits_to_float(value.y));
  value.z = ptx::float_to_tf32(bits_to_float(value.z)), value.w = ptx::float_to_tf32(bits_to_float(value.w));
  return value;
}

}  // namespace pyops::conv
