// The fused MLP on the CPU (mlp.h says what it computes), compiled once per instruction set.
//
// Small weights: members take up to 48 rows as they are free: they are normalised into L2, then for every 64 hidden
// columns the first product goes to an L1 buffer, is activated there, and is multiplied into the rows' outputs [48][O] in L2, which are
// stored once. Weights are read once for every 48 rows, from L2.
// Large weights, which would come from L3 or memory: all members take the same rows, up to 240, and as they are free columns of the
// hidden rows, then of the outputs. Weights are read once for all of those rows, by whoever multiplies them.
#include "../conv/depthwise_cpu_pass.h"
#include "../conv/mbconv_cpu_gemm.h"
#include "mlp_cpu.h"

namespace pyops::linear::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::gemm_tile;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::interleave_rows;
using conv::PYOPS_ISA::kBlock;
using conv::PYOPS_ISA::kInterleavedBlocks;
using conv::PYOPS_ISA::kMaxBlocks;
using conv::PYOPS_ISA::put;
using conv::PYOPS_ISA::tile_rows;
using cpu::Layout;
using cpu::Team;

constexpr int64_t kTile = 48;  // rows of a member
constexpr int kRows = conv::PYOPS_ISA::kInterleavedRows;
constexpr int64_t kTogether = 240;   // rows of all members
constexpr int64_t kLarge = 1 << 18;  // floats of weights that no longer stay in a core's cache: 1 MiB
constexpr int64_t kSlice = 96;       // lanes summed apart: four blocks of weights take 24 KiB and stay in L1
constexpr int64_t kColumns = kMaxBlocks * kBlock;

// S: storage of rows; E: what is multiplied, S itself or float.
template <class S, class E>
struct MlpPass {
  const Mlp& p;
  const MlpSizes& s;
  const MlpLayout at;
  const int64_t ldx, ldo;
  const bool together;
  int threads;
  E *rows = nullptr, *hidden = nullptr;  // of all members, interleaved by tiles of up to kRows: [rows' lanes], [hidden lanes] of each
  char* members = nullptr;
  size_t member_bytes = 0;
  struct Member {
    E *x, *hidden;            // [tile][ldx], [tile][columns]
    float *row, *sums, *out;  // [ldx], [tile][columns], [tile][ldo]
  };

  MlpPass(const Mlp& params, int team)
      : p(params),
        s(p.sizes),
        at(s, sizeof(E) == 2),
        ldx(((s.C + 31) / 32 | 1) * 32),
        ldo(at.out_blocks * kBlock + kBlock),
        together(at.floats > kLarge),
        threads(team) {}

  Member member(Layout& to) const {
    Member me;
    me.x = to.take<E>((together ? kRows : kTile) * ldx);
    me.hidden = to.take<E>((together ? kRows : kTile) * kColumns);
    me.row = to.take<float>(ldx);
    me.sums = to.take<float>((together ? kTogether : kTile) * kColumns);
    me.out = to.take<float>(together ? 0 : kTile * ldo);
    return me;
  }
  void lay_out(Layout& to) {
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = to.take<char>(threads * static_cast<int64_t>(member_bytes));
    rows = to.take<E>(together ? kTogether * at.lanes * kPair<E> : 0);
    hidden = to.take<E>(together ? kTogether * at.hidden_lanes * kPair<E> : 0);
  }

  void stage(const Member& me, int64_t m, E* to) const {
    const S* from = static_cast<const S*>(p.input) + m * s.C;
    vf sum{};
    for (int64_t c = 0; c < s.C; c += kF) {
      const vf x = get(from + c, s.C - c);
      store(me.row + c, x), sum += x;
    }
    float mean = 0.f, scale = 1.f;
    if (p.norm) {
      float total = 0.f, squares = 0.f;
      for (int i = 0; i < kF; ++i) total += sum[i];
      mean = total / static_cast<float>(s.C);
      vf deviations{};
      for (int64_t c = 0; c < s.C; c += kF) {
        vf d = load(me.row + c) - mean;
        if (c + kF > s.C)
          for (int i = 0; i < kF; ++i) d[i] = c + i < s.C ? d[i] : 0.f;
        deviations += d * d;
      }
      for (int i = 0; i < kF; ++i) squares += deviations[i];
      scale = 1.f / __builtin_sqrtf(squares / static_cast<float>(s.C) + p.eps);
    }
    for (int64_t c = 0; c < s.C; c += kF) put(to + c, (load(me.row + c) - mean) * scale, s.C - c);
    if (kPair<E> > 1 && s.C % 2) to[s.C] = E{};
  }

  // f(first row, rows) for each tile of interleaved rows.
  template <class F>
  static void each_tile(int64_t count, F&& f) {
    for (int64_t i = 0, n; i < count; i += n) n = block_rows(count - i, kRows), f(i, n);
  }
  // [lanes][n] from n rows `ld` apart.
  static void interleave(const E* from, int64_t ld, int64_t n, int64_t lanes, E* to) {
    const float* tile[kRows];
    for (int64_t r = 0; r < n; ++r) tile[r] = reinterpret_cast<const float*>(from + r * ld);
    interleave_rows(tile, static_cast<int>(n), lanes, reinterpret_cast<float*>(to));
  }
  // sums[r] = a[r] * w for interleaved rows of so many lanes, [count][kColumns].
  void multiply_interleaved(const E* a, int64_t count, const float* w, int blocks, int64_t lanes, float* sums) const {
    for (int64_t k0 = 0; k0 < lanes; k0 += kSlice) {
      const int64_t k1 = k0 + kSlice < lanes ? k0 + kSlice : lanes;
      each_tile(count, [&](int64_t i, int64_t n) {
        const E* from[kRows];
        float* to[kRows];
        for (int64_t r = 0; r < n; ++r) from[r] = a + (i * lanes + r) * kPair<E>, to[r] = sums + (i + r) * kColumns;
        gemm_tile<true>(static_cast<int>(n), blocks, from, w, lanes * kBlock, k0, k1, to, kBlock, k0 > 0);
      });
    }
  }

  // sums[r][block0 ..] (+)= a[r] * w for `count` rows, `a` rows lda apart.
  void multiply(const E* a, int64_t lda, int64_t count, const float* w, int64_t block_stride, int blocks, int64_t lanes, float* out,
                int64_t ld, bool add) const {
    const int most = tile_rows(blocks);
    for (int64_t k0 = 0; k0 < lanes; k0 += kSlice) {
      const int64_t k1 = k0 + kSlice < lanes ? k0 + kSlice : lanes;
      for (int64_t i = 0, n; i < count; i += n) {
        n = block_rows(count - i, most);
        const E* rows[8];
        float* to[8];
        for (int64_t r = 0; r < n; ++r) rows[r] = a + (i + r) * lda, to[r] = out + (i + r) * ld;
        gemm_tile(static_cast<int>(n), blocks, rows, w, block_stride, k0, k1, to, kBlock, add || k0 > 0);
      }
    }
  }

  // Hidden columns of blocks from b0 on, from their sums.
  void activate(const float* sums, int64_t b0, int64_t columns, int64_t count, E* to, int64_t ld) const {
    const float* bias = p.packed + at.first_bias + b0 * kBlock;
    conv::PYOPS_ISA::with_activation(p.activation, [&](auto a) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < columns; c += kF) {
          const vf z = load(sums + r * kColumns + c) + load(bias + c);
          store_as(to + r * ld + c, conv::PYOPS_ISA::activate<decltype(a)::value>(z, p.slope));
        }
    });
  }

  // Outputs o0 to o1 of rows from m0 on, from their sums without bias.
  void finish(const float* sums, int64_t ld, int64_t m0, int64_t count, int64_t o0, int64_t o1) const {
    const float* bias = p.packed + at.second_bias;
    for (int64_t r = 0; r < count; ++r) {
      const S* residual = p.residual ? static_cast<const S*>(p.residual) + (m0 + r) * s.O : nullptr;
      S* to = static_cast<S*>(p.output) + (m0 + r) * s.O;
      for (int64_t o = o0; o < o1; o += kF) {
        vf y = load(sums + r * ld + o - o0) + load(bias + o);
        if (residual) y += get(residual + o, s.O - o);
        put(to + o, y, s.O - o);
      }
    }
  }

  void tile(const Member& me, int64_t m0, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) stage(me, m0 + r, me.x + r * ldx);
    for (int64_t b0 = 0; b0 < at.hidden_blocks; b0 += kMaxBlocks) {
      const int blocks = static_cast<int>(at.hidden_blocks - b0 < kMaxBlocks ? at.hidden_blocks - b0 : kMaxBlocks);
      const int64_t columns = blocks * kBlock, hidden = columns / kPair<E>;
      multiply(me.x, ldx, count, p.packed + at.first + b0 * at.lanes * kBlock, at.lanes * kBlock, blocks, at.lanes, me.sums, kColumns,
               false);
      activate(me.sums, b0, columns, count, me.hidden, kColumns);
      const float* second = p.packed + at.second + b0 * kBlock / kPair<E> * kBlock;
      for (int64_t o0 = 0; o0 < at.out_blocks; o0 += kMaxBlocks) {
        const int outs = static_cast<int>(at.out_blocks - o0 < kMaxBlocks ? at.out_blocks - o0 : kMaxBlocks);
        multiply(me.hidden, kColumns, count, second + o0 * at.hidden_lanes * kBlock, at.hidden_lanes * kBlock, outs, hidden,
                 me.out + o0 * kBlock, ldo, b0 > 0);
      }
    }
    finish(me.out, ldo, m0, count, 0, s.O);
  }

  // The same by all members, who take columns of either product as they are free.
  void tile_together(const Team& team, const Member& me, int64_t m0, int64_t count) const {
    const auto deal = [&](int64_t blocks, const auto& f) {
      const int64_t groups = (blocks + kInterleavedBlocks - 1) / kInterleavedBlocks;
      team.deal(groups, [&](int64_t g) { f(blocks * g / groups, static_cast<int>(blocks * (g + 1) / groups - blocks * g / groups)); });
    };
    int64_t tiles = 0, tile = 0;
    each_tile(count, [&](int64_t, int64_t) { ++tiles; });
    each_tile(count, [&](int64_t i, int64_t n) {
      if (tile++ * team.size / tiles != team.rank) return;
      for (int64_t r = 0; r < n; ++r) stage(me, m0 + i + r, me.x + r * ldx);
      interleave(me.x, ldx, n, at.lanes, rows + i * at.lanes * kPair<E>);
    });
    team.sync();
    deal(at.hidden_blocks, [&](int64_t b0, int blocks) {
      multiply_interleaved(rows, count, p.packed + at.first + b0 * at.lanes * kBlock, blocks, at.lanes, me.sums);
      const int64_t columns = blocks * kBlock, lanes = columns / kPair<E>, lane0 = b0 * kBlock / kPair<E>;
      each_tile(count, [&](int64_t i, int64_t n) {
        activate(me.sums + i * kColumns, b0, columns, n, me.hidden, kColumns);
        interleave(me.hidden, kColumns, n, lanes, hidden + (i * at.hidden_lanes + lane0 * n) * kPair<E>);
      });
    });
    team.sync();
    deal(at.out_blocks, [&](int64_t b0, int blocks) {
      multiply_interleaved(hidden, count, p.packed + at.second + b0 * at.hidden_lanes * kBlock, blocks, at.hidden_lanes, me.sums);
      const int64_t o0 = b0 * kBlock, o1 = o0 + blocks * kBlock;
      finish(me.sums, kColumns, m0, count, o0, o1 < s.O ? o1 : s.O);
    });
    team.sync();  // the rows are free again
  }

  void run(const Team& team) const {
    Layout to{members + team.rank * member_bytes};
    const Member me = member(to);
    if (together) {
      for (int64_t m = 0, n; m < p.M; m += n) n = block_rows(p.M - m, kTogether), tile_together(team, me, m, n);
      return;
    }
    const int64_t fewest = (p.M + kTile - 1) / kTile, wanted = p.M / 16 < 4 * team.size ? p.M / 16 : 4 * team.size;
    const int64_t pieces = team.size == 1 || fewest > wanted ? fewest : wanted;
    team.deal(pieces, [&](int64_t i) { tile(me, p.M * i / pieces, p.M * (i + 1) / pieces - p.M * i / pieces); });
  }
};

template <class S, class E>
void mlp_as(const Mlp& p, int threads) {
  MlpPass<S, E> pass(p, threads);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(threads, [](const Team& team, void* pass) { static_cast<const MlpPass<S, E>*>(pass)->run(team); }, &pass);
}

// weight [rows, K] -> [rows/16][lanes][16]
template <class E, class W>
void pack_matrix(const W* weight, int64_t rows, int64_t K, int64_t lanes, float* to) {
  for (int64_t block = 0; block * kBlock < rows; ++block) {
    const W* from[16];
    for (int64_t i = 0; i < 16; ++i) from[i] = block * 16 + i < rows ? weight + (block * 16 + i) * K : nullptr;
    float* const at = to + block * lanes * kBlock;
    __builtin_memset(at, 0, lanes * kBlock * sizeof(float));
    pack_rows<16>(from, 0, K, K, reinterpret_cast<E*>(at));
  }
}

template <class E, class W>
void pack_as(const MlpSizes& s, const MlpWeights& w, const MlpLayout& at, float* packed) {
  pack_matrix<E>(static_cast<const W*>(w.first), s.H, s.C, at.lanes, packed + at.first);
  pack_matrix<E>(static_cast<const W*>(w.second), s.O, s.H, at.hidden_lanes, packed + at.second);
}

}  // namespace

void mlp(const Mlp& p, int threads) {
  if constexpr (kBf16Pairs) {
    if (p.pairs) return mlp_as<bf16, bf16>(p, threads);
  }
  conv::PYOPS_ISA::with_storage(p.dtype, [&](auto s) { mlp_as<decltype(s), float>(p, threads); });
}

void mlp_weights(const MlpSizes& s, const MlpWeights& w, bool pairs, float* packed) {
  const MlpLayout at(s, pairs);
  if constexpr (kBf16Pairs) {
    if (pairs) pack_as<bf16, bf16>(s, w, at, packed);
  }
  if (!pairs) {
    if (w.dtype == DType::f32) pack_as<float, float>(s, w, at, packed);
    else pack_as<float, bf16>(s, w, at, packed);
  }
  __builtin_memset(packed + at.first_bias, 0, at.hidden_blocks * kBlock * sizeof(float));
  __builtin_memset(packed + at.second_bias, 0, at.out_blocks * kBlock * sizeof(float));
  __builtin_memcpy(packed + at.first_bias, w.first_bias, s.H * sizeof(float));
  __builtin_memcpy(packed + at.second_bias, w.second_bias, s.O * sizeof(float));
}

}  // namespace pyops::linear::PYOPS_ISA
