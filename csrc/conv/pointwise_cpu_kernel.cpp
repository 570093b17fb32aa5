// 1x1 convolution on the CPU (pointwise.h says what it computes), compiled once per instruction set.
//
// Weights are packed at every call into blocks [C][16], where they do not come so. Tiles of 64 positions: the tile's rows go through what
// comes before the product into L2 (float32 rows that need nothing are read where they lie), then every panel of up to four blocks is
// multiplied into an L1 buffer [64][64], finished there and stored. bfloat16 pairs are multiplied as they are where the machine can.
// Moments: of each tile's columns in float, merged by Chan's formula in double, tile by tile and chunk by chunk.
// Floors: 2*M*C*O flops; input and output over memory bandwidth.
#include "pointwise_cpu.h"

#include "depthwise_cpu_pass.h"
#include "mbconv_cpu_gemm.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int64_t kSlice = 160;  // lanes summed apart: 384, with 1.3 times eager's error at C = 600, would miss the gate

// S: storage of images; E: what is multiplied, S itself or float.
template <class S, class E>
struct PointwisePass {
  static constexpr int64_t kTile = kPointwiseTile, kColumns = kMaxBlocks * kBlock;

  const Pointwise& p;
  const PointwisePlan plan;
  const int64_t M, lanes, blocks, ld;
  const bool staged;
  const float* weights = nullptr;  // [blocks][lanes][16]
  float* room = nullptr;           // for them
  float* bias = nullptr;           // [blocks * 16]
  double* moments = nullptr;       // [chunks][2][blocks * 16]
  char* members = nullptr;
  size_t member_bytes = 0;
  struct Member {
    E* rows;      // [tile][ld]
    float* row;   // [C], padded
    float* tile;  // [tile][columns]
  };

  explicit PointwisePass(const Pointwise& params)
      : p(params),
        plan(plan_pointwise(params)),
        M(p.N * p.P),
        lanes(lanes_of<E>(p.C)),
        blocks((p.O + kBlock - 1) / kBlock),
        ld(((p.C + 31) / 32 | 1) * 32),
        staged(!std::is_same_v<S, E> || p.rows || p.affine || p.gate || p.input_activation != Activation::none ||
               (kPair<E> > 1 && p.C % 2 != 0)) {}

  Member member(Layout& to) const {
    Member m;
    m.rows = to.take<E>(staged ? kTile * ld : 0);
    m.row = to.take<float>(ld);
    m.tile = to.take<float>(kTile * kColumns);
    return m;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    return member(to);
  }
  void lay_out(Layout& at) {
    room = at.take<float>(p.packed ? 0 : blocks * lanes * kBlock);
    weights = p.packed ? static_cast<const float*>(p.weight) : room;
    bias = at.take<float>(blocks * kBlock);
    moments = at.take<double>(p.moments ? plan.chunks * 2 * blocks * kBlock : 0);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }

  void pack(const Team& team) const {
    pack_bias(team, DType::f32, p.bias, p.O, bias);
    if (p.packed) return;
    with_storage(p.weight_dtype, [&](auto s) {
      using W = decltype(s);
      for (int64_t block = team.rank; block < blocks; block += team.size) {
        const W* rows[16];
        for (int64_t i = 0; i < 16; ++i)
          rows[i] = block * 16 + i < p.O ? static_cast<const W*>(p.weight) + (block * 16 + i) * p.C : nullptr;
        E* to = reinterpret_cast<E*>(room + block * lanes * kBlock);
        if constexpr (std::is_same_v<W, E> || sizeof(E) == 4) pack_rows<16>(rows, 0, p.C, p.C, to);
        else pack_rounded(rows, to);
      }
    });
  }
  template <class W>
  void pack_rounded(const W* const (&rows)[16], E* to) const {  // float weights of a 16-bit product
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < 16; ++i)
        for (int64_t k = 2 * lane; k < 2 * lane + 2; ++k)
          to[lane * 32 + i * 2 + k % 2] = narrow<E>(rows[i] && k < p.C ? widen(rows[i][k]) : 0.f);
  }

  const S* input_row(int64_t m) const { return static_cast<const S*>(p.input) + m * p.input_stride; }

  // What comes before the product, for `count` positions from m.
  void stage(const Member& me, int64_t m0, int64_t count) const {
    for (int64_t m = m0; m < m0 + count; ++m) {
      const S* x = input_row(m);
      const float mean = p.rows ? p.rows[m] : 0.f, inverse = p.rows ? p.rows[M + m] : 1.f;
      const float* gate = p.gate ? p.gate + m / p.P * p.C : nullptr;
      for (int64_t c = 0; c < p.C; c += kF) {
        vf a = get(x + c, p.C - c);
        if (p.rows) a = (a - mean) * inverse;
        if (p.affine) a = (a - get(p.affine + c, p.C - c)) * get(p.affine + p.C + c, p.C - c) + get(p.affine + 2 * p.C + c, p.C - c);
        store(me.row + c, a);
      }
      if (p.input_activation != Activation::none)
        with_activation(p.input_activation, [&](auto a) {
          for (int64_t c = 0; c < p.C; c += kF) store(me.row + c, activate<decltype(a)::value>(load(me.row + c), p.input_slope));
        });
      E* to = me.rows + (m - m0) * ld;
      for (int64_t c = 0; c < p.C; c += kF) {
        vf a = load(me.row + c);
        if (gate) a *= get(gate + c, p.C - c);
        put(to + c, a, p.C - c);
      }
      if (kPair<E> > 1 && p.C % 2) to[p.C] = E{};
    }
  }

  // A panel's sums: in the member's tile, or in the output itself where nothing is left to do to them.
  struct Sums {
    float* first;
    int64_t row;  // floats from one position to the next
  };
  Sums sums_of(const Member& me, int64_t m0, int64_t block0, int panel) const {
    const bool plain = !p.bias && !p.keep && !p.residual && p.activation == Activation::none;
    if (sizeof(S) == 4 && plain && (block0 + panel) * kBlock <= p.O)
      return {static_cast<float*>(p.output) + m0 * p.output_stride + block0 * kBlock, p.output_stride};
    return {me.tile, panel * kBlock};
  }

  void multiply(const Member& me, int64_t m0, int64_t count, int64_t block0, int panel, const Sums& to) const {
    const float* w = weights + block0 * lanes * kBlock;
    const int most = tile_rows(panel);
    for (int64_t k0 = 0; k0 < lanes; k0 += kSlice) {
      const int64_t k1 = k0 + kSlice < lanes ? k0 + kSlice : lanes;
      for (int64_t i = 0, n; i < count; i += n) {
        n = block_rows(count - i, most);
        const E* a[8];
        float* out[8];
        for (int64_t r = 0; r < n; ++r) {
          a[r] = staged ? me.rows + (i + r) * ld : reinterpret_cast<const E*>(input_row(m0 + i + r));
          out[r] = to.first + (i + r) * to.row;
        }
        gemm_tile(static_cast<int>(n), panel, a, w, lanes * kBlock, k0, k1, out, kBlock, k0 > 0);
      }
    }
  }

  // What comes after it; leaves what was stored in the tile.
  void finish(const Member& me, int64_t m0, int64_t count, int64_t block0, int panel) const {
    const int64_t c0 = block0 * kBlock, columns = panel * kBlock;
    for (int64_t r = 0; r < count; ++r) {
      float* y = me.tile + r * columns;
      const S* residual = p.residual ? static_cast<const S*>(p.residual) + (m0 + r) * p.residual_stride + c0 : nullptr;
      const float keep = p.keep ? p.keep[(m0 + r) / p.P] : 1.f;
      for (int64_t c = 0; c < columns; c += kF) {
        vf value = (load(y + c) + load(bias + c0 + c)) * keep;
        if (residual) value += get(residual + c, p.O - c0 - c);
        store(y + c, value);
      }
    }
    if (p.activation != Activation::none)
      with_activation(p.activation, [&](auto a) {
        for (int64_t i = 0; i < count * columns; i += kF) store(me.tile + i, activate<decltype(a)::value>(load(me.tile + i), p.slope));
      });
    for (int64_t r = 0; r < count; ++r) {
      float* y = me.tile + r * columns;
      S* out = static_cast<S*>(p.output) + (m0 + r) * p.output_stride + c0;
      for (int64_t c = 0; c < columns; c += kF) {
        put(out + c, load(y + c), p.O - c0 - c);
        if (sizeof(S) == 2 && p.moments) store(y + c, get(out + c, p.O - c0 - c));
      }
    }
  }

  void absorb(const Sums& from, int64_t before, int64_t count, int64_t block0, int panel, double* state) const {
    const int64_t columns = panel * kBlock;
    const float inverse = 1.f / static_cast<float>(count);
    const double n = static_cast<double>(before), weight = static_cast<double>(count) / static_cast<double>(before + count);
    for (int64_t c = 0; c < columns; c += kF) {
      vf sum{}, squares{};
      for (int64_t r = 0; r < count; ++r) sum += load(from.first + r * from.row + c);
      const vf mean = sum * inverse;
      for (int64_t r = 0; r < count; ++r) {
        const vf d = load(from.first + r * from.row + c) - mean;
        squares += d * d;
      }
      for (int i = 0; i < kF; ++i) {
        double *to = state + block0 * kBlock + c + i, *to_squares = to + blocks * kBlock;
        const double d = mean[i] - *to;
        *to += d * weight, *to_squares += squares[i] + d * d * n * weight;
      }
    }
  }

  void item(const Member& me, int64_t index) const {
    const int64_t chunk = index / plan.parts, part = index % plan.parts;
    const int64_t first = plan.tiles * chunk / plan.chunks, last = plan.tiles * (chunk + 1) / plan.chunks;
    const int64_t block0 = blocks * part / plan.parts, block1 = blocks * (part + 1) / plan.parts;
    const int64_t panels = (block1 - block0 + kMaxBlocks - 1) / kMaxBlocks;
    double* state = moments + chunk * 2 * blocks * kBlock;
    for (int64_t c = block0 * kBlock; p.moments && c < block1 * kBlock; ++c) state[c] = state[blocks * kBlock + c] = 0.0;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t m0 = tile * kTile, count = M - m0 < kTile ? M - m0 : kTile;
      if (staged) stage(me, m0, count);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t b0 = block0 + (block1 - block0) * i / panels;
        const int panel = static_cast<int>(block0 + (block1 - block0) * (i + 1) / panels - b0);
        const Sums sums = sums_of(me, m0, b0, panel);
        multiply(me, m0, count, b0, panel, sums);
        if (sums.first == me.tile) finish(me, m0, count, b0, panel);
        if (p.moments) absorb(sums, m0 - first * kTile, count, b0, panel, state);
      }
    }
  }

  void merge(int64_t c) const {
    double count = 0.0, mean = 0.0, squares = 0.0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t first = plan.tiles * chunk / plan.chunks * kTile, last = plan.tiles * (chunk + 1) / plan.chunks * kTile;
      const double n = static_cast<double>((last < M ? last : M) - first), *state = moments + chunk * 2 * blocks * kBlock + c;
      const double d = state[0] - mean, total = count + n;
      mean += d * n / total, squares += state[blocks * kBlock] + d * d * count * n / total, count = total;
    }
    p.moments[c] = static_cast<float>(mean), p.moments[p.O + c] = static_cast<float>(squares);
  }

  void run(const Team& team) const {
    pack(team);
    team.sync();
    const Member me = member(team.rank);
    team.deal(plan.chunks * plan.parts, [&](int64_t i) { item(me, i); });
    if (!p.moments) return;
    team.sync();
    for (int64_t c = p.O * team.rank / team.size; c < p.O * (team.rank + 1) / team.size; ++c) merge(c);
  }
};

template <class S, class E>
void pointwise_as(const Pointwise& p) {
  PointwisePass<S, E> pass(p);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<const PointwisePass<S, E>*>(pass)->run(team); }, &pass);
}

}  // namespace

void pointwise(const Pointwise& p) {
  if constexpr (kBf16Pairs) {
    if (p.dtype == DType::bf16) return pointwise_as<bf16, bf16>(p);
  }
  with_storage(p.dtype, [&](auto s) { pointwise_as<decltype(s), float>(p); });
}

}  // namespace pyops::conv::PYOPS_ISA
