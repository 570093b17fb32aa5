// Backward of the 1x1 convolution on the CPU (pointwise_cpu.h says what it computes), compiled once per instruction set.
//
// One pass: of each tile of up to 64 positions a is computed again, into blocks [C/16][64][16]; then every panel of up to four blocks of
// grad_a is multiplied into an L1 buffer, added to the sums and stored; then the tile's share of grad_weight, grad transposed [O][64] times
// those blocks, goes to the member's own [O][C], which the members add up in the end.
// Floors: 4*M*C*O flops; grad and input read once, grad_a written once.
#include "depthwise_cpu_pass.h"
#include "mbconv_cpu_gemm.h"
#include "pointwise_cpu.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int64_t kBackwardSlice = 160;  // outputs summed apart, as in the forward pass

struct PointwiseBackwardPass {
  static constexpr int64_t kTile = kPointwiseTile;

  const PointwiseBackward& p;
  const PointwiseBackwardPlan plan;
  const int64_t blocks, padded;
  float *weights, *affine, *partial;  // [blocks][O][16], [3][padded], [items][padded]
  char* members;
  size_t member_bytes;
  struct Member {
    float *a, *grad, *tile, *gate, *weight;  // [blocks][tile][16], [O][tile], [tile][64], [padded], [O][padded]
  };

  explicit PointwiseBackwardPass(const PointwiseBackward& params)
      : p(params), plan(plan_pointwise_backward(params)), blocks((p.C + kBlock - 1) / kBlock), padded(blocks * kBlock) {}

  Member member(Layout& to) const {
    Member m;
    m.a = to.take<float>(padded * kTile), m.grad = to.take<float>(p.O * kTile), m.tile = to.take<float>(kTile * kMaxBlocks * kBlock);
    m.gate = to.take<float>(padded), m.weight = to.take<float>(p.O * padded);
    return m;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    return member(to);
  }
  void lay_out(Layout& at) {
    weights = at.take<float>(p.grad_a ? padded * p.O : 0);
    affine = at.take<float>(p.affine ? 3 * padded : 0);
    partial = at.take<float>(p.sums ? p.N * plan.shares * padded : 0);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }

  void stage(const Member& me, int64_t m0, int64_t count) const {
    stage_row(me.a, kTile * kBlock, p.input + m0 * p.C, count, p.C, p.C, blocks);
    if (p.affine) return Staging{affine, padded, p.activation, p.slope}(me.a, kTile * kBlock, count, blocks);
    if (p.activation == Activation::none) return;
    with_activation(p.activation, [&](auto a) {
      for (int64_t g = 0; g < blocks; ++g)
        for (int64_t i = 0; i < count * kBlock; i += kF) {
          float* at = me.a + g * kTile * kBlock + i;
          store(at, activate<decltype(a)::value>(load(at), p.slope));
        }
    });
  }

  void input_panel(const Member& me, int64_t m0, int64_t count, int64_t block0, int panel, float* sums) const {
    const int64_t columns = panel * kBlock, c0 = block0 * kBlock;
    const int most = tile_rows(panel);
    for (int64_t k0 = 0; k0 < p.O; k0 += kBackwardSlice) {
      const int64_t k1 = k0 + kBackwardSlice < p.O ? k0 + kBackwardSlice : p.O;
      for (int64_t i = 0, n; i < count; i += n) {
        n = block_rows(count - i, most);
        const float* rows[8];
        float* out[8];
        for (int64_t r = 0; r < n; ++r) rows[r] = p.grad + (m0 + i + r) * p.O, out[r] = me.tile + (i + r) * columns;
        gemm_tile(static_cast<int>(n), panel, rows, weights + block0 * p.O * kBlock, p.O * kBlock, k0, k1, out, kBlock, k0 > 0);
      }
    }
    for (int64_t c = 0; c < columns; c += kF) {
      const float* a = me.a + (block0 + c / kBlock) * kTile * kBlock + c % kBlock;
      vf sum{};
      for (int64_t r = 0; r < count; ++r) {
        const vf value = load(me.tile + r * columns + c);
        if (sums) sum += value * load(a + r * kBlock);
        put(p.grad_a + (m0 + r) * p.C + c0 + c, value, p.C - c0 - c);
      }
      if (sums) store(sums + c0 + c, sum);
    }
  }

  void gate_rows(const Member& me, int64_t count) const {
    for (int64_t g = 0; g < blocks; ++g)
      for (int v = 0; v < kBlock; v += kF) {
        const vf gate = load(me.gate + g * kBlock + v);
        float* at = me.a + g * kTile * kBlock + v;
        for (int64_t r = 0; r < count; ++r) store(at + r * kBlock, load(at + r * kBlock) * gate);
      }
  }

  void weight_share(const Member& me, int64_t m0, int64_t count) const {
    for (int64_t r = 0; r < count; r += 16) {
      const float* rows[16];
      for (int64_t i = 0; i < 16; ++i) rows[i] = r + i < count ? p.grad + (m0 + r + i) * p.O : nullptr;
      pack_rows<kTile>(rows, 0, p.O, p.O, me.grad + r);
    }
    const int64_t panels = (blocks + kMaxBlocks - 1) / kMaxBlocks;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t b0 = blocks * i / panels;
      const int panel = static_cast<int>(blocks * (i + 1) / panels - b0), most = tile_rows(panel);
      for (int64_t o = 0, n; o < p.O; o += n) {
        n = block_rows(p.O - o, most);
        const float* rows[8];
        float* out[8];
        for (int64_t r = 0; r < n; ++r) rows[r] = me.grad + (o + r) * kTile, out[r] = me.weight + (o + r) * padded + b0 * kBlock;
        gemm_tile(static_cast<int>(n), panel, rows, me.a + b0 * kTile * kBlock, kTile * kBlock, 0, count, out, kBlock, true);
      }
    }
  }

  void item(const Member& me, int64_t index) const {
    const int64_t n = index / plan.shares, share = index % plan.shares;
    const int64_t p0 = p.P * share / plan.shares, count = p.P * (share + 1) / plan.shares - p0, m0 = n * p.P + p0;
    stage(me, m0, count);
    const int64_t panels = (blocks + kMaxBlocks - 1) / kMaxBlocks;
    for (int64_t i = 0; i < panels && p.grad_a; ++i) {
      const int64_t b0 = blocks * i / panels;
      input_panel(me, m0, count, b0, static_cast<int>(blocks * (i + 1) / panels - b0), p.sums ? partial + index * padded : nullptr);
    }
    if (p.gate) {
      load_row(me.gate, p.gate + n * p.C, p.C);
      gate_rows(me, count);
    }
    weight_share(me, m0, count);
  }

  void run(const Team& team) const {
    for (int64_t block = team.rank; block < blocks && p.grad_a; block += team.size)
      for (int64_t o = 0; o < p.O; ++o)
        for (int v = 0; v < kBlock; v += kF) {
          const int64_t c = block * kBlock + v;
          store(weights + (block * p.O + o) * kBlock + v, get(p.weight + o * p.C + c, p.C - c));
        }
    pack_affine(team, p.affine, p.C, blocks, affine);
    const Member me = member(team.rank);
    zero(me.weight, p.O * blocks), zero(me.gate, blocks);
    team.sync();
    const int64_t items = p.P ? p.N * plan.shares : 0;
    for (int64_t i = items * team.rank / team.size; i < items * (team.rank + 1) / team.size; ++i) item(me, i);
    team.sync();
    for (int64_t o = p.O * team.rank / team.size; o < p.O * (team.rank + 1) / team.size; ++o)
      for (int64_t c = 0; c < p.C; c += kF) {
        vf sum{};
        for (int rank = 0; rank < team.size; ++rank) sum += load(member(rank).weight + o * padded + c);
        put(p.grad_weight + o * p.C + c, sum, p.C - c);
      }
    for (int64_t n = team.rank; n < p.N && p.sums; n += team.size)
      for (int64_t c = 0; c < p.C; c += kF) {
        vf sum{};
        for (int64_t i = n * plan.shares; i < (n + 1) * plan.shares && items; ++i) sum += load(partial + i * padded + c);
        put(p.sums + n * p.C + c, sum, p.C - c);
      }
  }
};

}  // namespace

void pointwise_backward(const PointwiseBackward& p) {
  PointwiseBackwardPass pass(p);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<const PointwiseBackwardPass*>(pass)->run(team); }, &pass);
}

}  // namespace pyops::conv::PYOPS_ISA
