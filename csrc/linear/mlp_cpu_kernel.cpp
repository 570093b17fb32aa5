// The fused MLP on the CPU (mlp.h says what it computes), compiled once per instruction set.
//
// A member takes an even share of the rows, up to 48 at a time: they are normalised into L2, then for every 64 hidden columns the first
// product goes to an L1 buffer, is activated there, and is multiplied into the rows' outputs [48][O] in L2, which are stored once.
// Weights are read once for every 48 rows, from L2 or L3.
#include "../conv/depthwise_cpu_pass.h"
#include "../conv/mbconv_cpu_gemm.h"
#include "mlp_cpu.h"

namespace pyops::linear::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::gemm_tile;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::kBlock;
using conv::PYOPS_ISA::kMaxBlocks;
using conv::PYOPS_ISA::put;
using conv::PYOPS_ISA::tile_rows;
using cpu::Layout;
using cpu::Team;

constexpr int64_t kTile = 48;    // rows
constexpr int64_t kSlice = 160;  // lanes summed apart, as in pointwise_cpu_kernel.cpp
constexpr int64_t kColumns = kMaxBlocks * kBlock;

// S: storage of rows; E: what is multiplied, S itself or float.
template <class S, class E>
struct MlpPass {
  const Mlp& p;
  const MlpSizes& s;
  const MlpLayout at;
  const int64_t ldx, ldo;
  int threads;
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
        threads(team) {}

  Member member(Layout& to) const {
    Member me;
    me.x = to.take<E>(kTile * ldx);
    me.hidden = to.take<E>(kTile * kColumns);
    me.row = to.take<float>(ldx);
    me.sums = to.take<float>(kTile * kColumns);
    me.out = to.take<float>(kTile * ldo);
    return me;
  }
  void lay_out(Layout& to) {
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = to.take<char>(threads * static_cast<int64_t>(member_bytes));
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

  void tile(const Member& me, int64_t m0, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) stage(me, m0 + r, me.x + r * ldx);
    for (int64_t b0 = 0; b0 < at.hidden_blocks; b0 += kMaxBlocks) {
      const int blocks = static_cast<int>(at.hidden_blocks - b0 < kMaxBlocks ? at.hidden_blocks - b0 : kMaxBlocks);
      const int64_t columns = blocks * kBlock, hidden = columns / kPair<E>;
      multiply(me.x, ldx, count, p.packed + at.first + b0 * at.lanes * kBlock, at.lanes * kBlock, blocks, at.lanes, me.sums, kColumns,
               false);
      const float* bias = p.packed + at.first_bias + b0 * kBlock;
      conv::PYOPS_ISA::with_activation(p.activation, [&](auto a) {
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < columns; c += kF) {
            const vf z = load(me.sums + r * kColumns + c) + load(bias + c);
            store_as(me.hidden + r * kColumns + c, conv::PYOPS_ISA::activate<decltype(a)::value>(z, p.slope));
          }
      });
      const float* second = p.packed + at.second + b0 * kBlock / kPair<E> * kBlock;
      for (int64_t o0 = 0; o0 < at.out_blocks; o0 += kMaxBlocks) {
        const int outs = static_cast<int>(at.out_blocks - o0 < kMaxBlocks ? at.out_blocks - o0 : kMaxBlocks);
        multiply(me.hidden, kColumns, count, second + o0 * at.hidden_lanes * kBlock, at.hidden_lanes * kBlock, outs, hidden,
                 me.out + o0 * kBlock, ldo, b0 > 0);
      }
    }
    const float* bias = p.packed + at.second_bias;
    for (int64_t r = 0; r < count; ++r) {
      const S* residual = p.residual ? static_cast<const S*>(p.residual) + (m0 + r) * s.O : nullptr;
      S* to = static_cast<S*>(p.output) + (m0 + r) * s.O;
      for (int64_t o = 0; o < s.O; o += kF) {
        vf y = load(me.out + r * ldo + o) + load(bias + o);
        if (residual) y += get(residual + o, s.O - o);
        put(to + o, y, s.O - o);
      }
    }
  }

  void run(const Team& team) const {
    Layout to{members + team.rank * member_bytes};
    const Member me = member(to);
    const int64_t begin = p.M * team.rank / team.size, end = p.M * (team.rank + 1) / team.size;
    for (int64_t m = begin, n; m < end; m += n) {
      n = block_rows(end - m, kTile);
      tile(me, m, n);
    }
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
