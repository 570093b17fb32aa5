// Depthwise convolution forward on the CPU (depthwise.h says what it computes).
//
// Per item (image, band of output rows, group of channel blocks) the input passes once through a ring of staged rows, then every
// output row is: conv_row into an L1 row buffer, residual + activation + sum for the mean, stored.
// Floors: bytes of input + output (+ residual) over memory bandwidth; 2 * N*OH*OW*C*KH*KW flops.
#pragma once
#include "depthwise_cpu_pass.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

// One row of one block: out = activation(z + residual), sums ([2][16], add_compensated's) += the row's sum.
template <class S, Activation A>
void finish_row(const float* z, const S* residual, S* out, int64_t width, int64_t C, int64_t lanes, float slope, float* sums) {
  for (int v = 0; v < kBlock && v < lanes; v += kF) {
    vf sum{};
    for (int64_t x = 0; x < width; ++x) {
      vf value = load(z + x * kBlock + v);
      if (residual) value += get(residual + x * C + v, lanes - v);
      value = activate<A>(value, slope);
      put(out + x * C + v, value, lanes - v);
      sum += value;
    }
    add_compensated(sums + v, sum);
  }
}

template <class S>
struct DepthwiseForwardPass {
  const DepthwiseForward& p;
  const DepthwisePrologue& before;
  const DepthwiseShape& s;
  const DepthwisePlan plan;
  const int64_t taps;
  float *weight, *bias, *affine;
  float* partial;  // [N][bands][blocks * 16]
  struct Member {
    const float **in, **w;
    int64_t* tap;
    float *ring, *row, *sums;
  };
  char* members;
  size_t member_bytes;

  DepthwiseForwardPass(const DepthwiseForward& params, const DepthwisePrologue& prologue)
      : p(params),
        before(prologue),
        s(p.s),
        plan(plan_depthwise(s, InputRing::slots_of(s) * InputRing::width_of(s) * 64)),
        taps(int64_t{s.KH} * s.KW) {}

  // A member's own scratch is one piece: lists that are written at every row must not lie beside another member's.
  Member member(Layout& to) const {
    Member m;
    m.ring = to.take<float>(InputRing::slots_of(s) * plan.group * InputRing::width_of(s) * kBlock);
    m.in = to.take<const float*>(s.KH), m.w = to.take<const float*>(s.KH);
    m.tap = to.take<int64_t>(s.KH);
    m.row = to.take<float>((s.OW + kSlack) * kBlock);
    m.sums = to.take<float>(plan.group * 2 * kBlock);
    return m;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    return member(to);
  }
  void lay_out(Layout& at) {
    weight = at.take<float>(plan.blocks * taps * kBlock);
    bias = at.take<float>(plan.blocks * kBlock);
    affine = at.take<float>(before.affine ? 3 * plan.blocks * kBlock : 0);
    partial = at.take<float>(p.means ? s.N * plan.bands * plan.blocks * kBlock : 0);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }

  void item(const Member& me, int64_t index) {
    const int64_t group = index % plan.groups, band = index / plan.groups % plan.bands, n = index / plan.groups / plan.bands;
    const int64_t block0 = plan.first_block(group), blocks = plan.first_block(group + 1) - block0, channels = s.C - block0 * kBlock;
    const float* vectors = before.affine ? affine + block0 * kBlock : nullptr;
    InputRing ring{me.ring, 0, 0, 0, 0, {vectors, plan.blocks * kBlock, before.activation, before.slope}};
    Window window{me.in, me.tap, 0};
    const float **in = me.in, **w = me.w;
    const auto at = [&](const void* base, int64_t y, int64_t H, int64_t W) {
      return static_cast<const S*>(base) + (n * H + y) * W * s.C + block0 * kBlock;
    };
    const RowFunction convolve = pick_row(s.KW, s.stride_w, s.dilation_w);
    ring.start(s, blocks);
    zero(me.sums, 2 * blocks);
    for (int64_t y = s.OH * band / plan.bands; y < s.OH * (band + 1) / plan.bands; ++y) {
      ring.advance(s, y, at(p.input, 0, s.H, s.W), channels);
      window.find(s, ring, y);
      for (int64_t g = 0; g < blocks; ++g) {
        for (int64_t r = 0; r < window.rows; ++r) w[r] = weight + (block0 + g) * taps * kBlock + window.tap[r];
        convolve({in, w, window.rows, s.KW, s.stride_w, s.dilation_w, s.OW, bias + (block0 + g) * kBlock, me.row});
        for (int64_t r = 0; r < window.rows; ++r) in[r] += ring.width * kBlock;
        const S* residual = p.residual ? at(p.residual, y, s.OH, s.OW) + g * kBlock : nullptr;
        S* out = const_cast<S*>(at(p.output, y, s.OH, s.OW)) + g * kBlock;
        with_activation(p.activation, [&](auto a) {
          finish_row<S, decltype(a)::value>(me.row, residual, out, s.OW, s.C, channels - g * kBlock, p.slope, me.sums + g * 2 * kBlock);
        });
      }
    }
    for (int64_t g = 0; g < blocks && p.means; ++g)
      __builtin_memcpy(partial + ((n * plan.bands + band) * plan.blocks + block0 + g) * kBlock, me.sums + g * 2 * kBlock,
                       kBlock * sizeof(float));
  }

  void mean(int64_t n) {
    const float scale = 1.f / static_cast<float>(s.OH * s.OW);
    for (int64_t block = 0; block < plan.blocks; ++block)
      for (int v = 0; v < kBlock; v += kF) {
        vf sum{};
        for (int64_t band = 0; band < plan.bands; ++band)
          sum += load(partial + ((n * plan.bands + band) * plan.blocks + block) * kBlock + v);
        put(p.means + n * s.C + block * kBlock + v, sum * scale, s.C - block * kBlock - v);
      }
  }

  void run(const Team& team) {
    pack_taps(team, p.weight_dtype, p.weight, s.C, taps, weight);
    pack_bias(team, p.weight_dtype, p.bias, s.C, bias);
    pack_affine(team, before.affine, s.C, plan.blocks, affine);
    team.sync();
    const Member me = member(team.rank);
    const int64_t items = plan.blocks ? s.N * plan.bands * plan.groups : 0;
    team.deal(items, [&](int64_t i) { item(me, i); });
    if (!p.means) return;
    team.sync();
    for (int64_t n = team.rank; n < s.N; n += team.size) mean(n);
  }
};

template <class S>
void forward_as(const DepthwiseForward& p, const DepthwisePrologue& before) {
  DepthwiseForwardPass<S> pass(p, before);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<DepthwiseForwardPass<S>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
