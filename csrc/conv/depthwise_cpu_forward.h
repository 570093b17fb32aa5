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
  const DepthwiseShape& s;
  const DepthwisePlan plan;
  const int64_t taps;
  float *weight, *bias, *rings, *rows, *sums;
  float* partial;  // [N][bands][blocks * 16]
  const float** pointers;
  int64_t* places;

  explicit DepthwiseForwardPass(const DepthwiseForward& params)
      : p(params), s(p.s), plan(plan_depthwise(s, InputRing::slots_of(s) * InputRing::width_of(s) * 64)), taps(int64_t{s.KH} * s.KW) {}

  int64_t ring_floats() const { return InputRing::slots_of(s) * plan.group * InputRing::width_of(s) * kBlock; }
  int64_t list() const { return (s.KH + 7) / 8 * 8; }  // whole cache lines: members write their own at every row
  int64_t row_floats() const { return (s.OW + kSlack) * kBlock; }

  void lay_out(Layout& at) {
    weight = at.take<float>(plan.blocks * taps * kBlock);
    bias = at.take<float>(plan.blocks * kBlock);
    rings = at.take<float>(plan.threads * ring_floats());
    rows = at.take<float>(plan.threads * row_floats());
    sums = at.take<float>(plan.threads * plan.group * 2 * kBlock);
    partial = at.take<float>(p.means ? s.N * plan.bands * plan.blocks * kBlock : 0);
    pointers = at.take<const float*>(plan.threads * 2 * list());
    places = at.take<int64_t>(plan.threads * list());
  }

  void item(int64_t index, int rank) {
    const int64_t group = index % plan.groups, band = index / plan.groups % plan.bands, n = index / plan.groups / plan.bands;
    const int64_t block0 = plan.first_block(group), blocks = plan.first_block(group + 1) - block0, channels = s.C - block0 * kBlock;
    InputRing ring{rings + rank * ring_floats(), 0, 0, 0, 0};
    Window window{pointers + rank * 2 * list(), places + rank * list(), 0};
    const float **in = window.in, **w = in + list();
    float *z = rows + rank * row_floats(), *sum = sums + rank * plan.group * 2 * kBlock;
    const auto at = [&](const void* base, int64_t y, int64_t H, int64_t W) {
      return static_cast<const S*>(base) + (n * H + y) * W * s.C + block0 * kBlock;
    };
    const RowFunction convolve = pick_row(s.KW, s.stride_w, s.dilation_w);
    ring.start(s, blocks);
    zero(sum, 2 * blocks);
    for (int64_t y = s.OH * band / plan.bands; y < s.OH * (band + 1) / plan.bands; ++y) {
      ring.advance(s, y, at(p.input, 0, s.H, s.W), channels);
      window.find(s, ring, y);
      for (int64_t g = 0; g < blocks; ++g) {
        for (int64_t r = 0; r < window.rows; ++r) w[r] = weight + (block0 + g) * taps * kBlock + window.tap[r];
        convolve({in, w, window.rows, s.KW, s.stride_w, s.dilation_w, s.OW, bias + (block0 + g) * kBlock, z});
        for (int64_t r = 0; r < window.rows; ++r) in[r] += ring.width * kBlock;
        const S* residual = p.residual ? at(p.residual, y, s.OH, s.OW) + g * kBlock : nullptr;
        S* out = const_cast<S*>(at(p.output, y, s.OH, s.OW)) + g * kBlock;
        with_activation(p.activation, [&](auto a) {
          finish_row<S, decltype(a)::value>(z, residual, out, s.OW, s.C, channels - g * kBlock, p.slope, sum + g * 2 * kBlock);
        });
      }
    }
    for (int64_t g = 0; g < blocks && p.means; ++g)
      __builtin_memcpy(partial + ((n * plan.bands + band) * plan.blocks + block0 + g) * kBlock, sum + g * 2 * kBlock,
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
    team.sync();
    const int64_t items = plan.blocks ? s.N * plan.bands * plan.groups : 0;
    for (int64_t i = items * team.rank / team.size; i < items * (team.rank + 1) / team.size; ++i) item(i, team.rank);
    if (!p.means) return;
    team.sync();
    for (int64_t n = team.rank; n < s.N; n += team.size) mean(n);
  }
};

template <class S>
void forward_as(const DepthwiseForward& p) {
  DepthwiseForwardPass<S> pass(p);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<DepthwiseForwardPass<S>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
