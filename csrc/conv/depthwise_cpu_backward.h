// Depthwise convolution backward on the CPU: one pass over grad_output and input.
//
// dz = (grad_output + grad_means / (OH*OW)) * activation'(z), z recomputed. Per item (image, band, group of channel blocks) and output row:
// z by conv_row (not for activation none), dz into a ring of rows, weight_row, and every input row whose last dz row this was:
//   grad_input[iy, ix] = sum over ky, kx of w[ky, kx] * D[iy + pad - ky*dilation, ix + pad - kx*dilation],   D[oy*stride] = dz[oy], else 0
// which is conv_row with w flipped, stride 1, over dz rows that hold zeros between the positions of a strided convolution.
// A band owns rows of grad_input and of dz; the dz rows that its neighbours own it computes again.
// Sums of grad_weight: 64 positions, rows of an item, items of a thread, threads, in that order.
// Floors: bytes of grad_output + input + grad_input; 4 * N*OH*OW*C*KH*KW flops (6 with an activation).
#pragma once
#include "depthwise_cpu_pass.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

// dz of one row of one block, `step` positions apart; sums += the row's sum.
template <class S>
struct GradRow {
  const float *z, *grad_mean;       // [16]: the share of each position
  const S *residual, *grad_output;  // or null
  S* grad_residual;                 // or null
  float *dz, *sums;                 // [16]
  int64_t width, step, C, lanes;
  float slope;
};
template <Activation A, class S>
void grad_row(const GradRow<S>& g) {
  for (int v = 0; v < kBlock; v += kF) {
    const vf mean = load(g.grad_mean + v);
    vf sum{};
    for (int64_t x = 0; x < g.width; ++x) {
      vf d = mean;
      if (g.grad_output) d += get(g.grad_output + x * g.C + v, g.lanes - v);
      if constexpr (A != Activation::none) {
        vf z = load(g.z + x * kBlock + v);
        if (g.residual) z += get(g.residual + x * g.C + v, g.lanes - v);
        d = activation_gradient<A>(z, d, g.slope);
      }
      store(g.dz + x * g.step * kBlock + v, d);
      if (g.grad_residual) put(g.grad_residual + x * g.C + v, d, g.lanes - v);
      sum += d;
    }
    store(g.sums + v, load(g.sums + v) + sum);
  }
}

template <class S>
struct DepthwiseBackwardPass {
  const DepthwiseBackward& p;
  const DepthwisePrologue& before;
  const DepthwiseShape& s;
  const int64_t taps, step, dz_slots, flip_pad, margin, dz_width;
  const bool recompute, weights, input_seen;
  const DepthwisePlan plan;
  float *weight, *flipped, *bias, *affine;
  struct Member {
    float *ring, *dz, *row, *mean, *item_weight, *item_bias, *weight, *bias;
    const float **in, **w;
    float** grad;
    int64_t *tap, *dz_tap;
  };
  char* members;
  size_t member_bytes;

  // step: of dz positions in its ring. flip_pad: padding of the flipped convolution, negative where input columns were never seen.
  DepthwiseBackwardPass(const DepthwiseBackward& params, const DepthwisePrologue& prologue)
      : p(params),
        before(prologue),
        s(p.s),
        taps(int64_t{s.KH} * s.KW),
        step(p.grad_input ? s.stride_w : 1),
        dz_slots(p.grad_input ? (s.KH - 1) * s.dilation_h / s.stride_h + 2 : 1),
        flip_pad(int64_t{s.KW - 1} * s.dilation_w - s.pad_w),
        margin(p.grad_input && flip_pad > 0 ? flip_pad : 0),
        dz_width(width_of_dz()),
        recompute(p.activation != Activation::none),
        weights(p.grad_weight || p.grad_bias),
        input_seen(recompute || p.grad_weight),
        plan(plan_depthwise(s, ring_positions() * 64)) {}

  int64_t width_of_dz() const {
    const int64_t held = margin + (s.OW - 1) * step + 1;
    const int64_t read = p.grad_input ? margin - flip_pad + s.W - 1 + kSlack + int64_t{s.KW - 1} * s.dilation_w + 1 : 0;
    return held > read ? held : read;
  }
  int64_t ring_positions() const {  // of one block
    return dz_slots * dz_width + (input_seen ? InputRing::slots_of(s) * InputRing::width_of(s) : 0);
  }

  // A member's own scratch is one piece: lists that are written at every row must not lie beside another member's.
  Member member(Layout& to) const {
    Member m;
    m.ring = to.take<float>(input_seen ? InputRing::slots_of(s) * plan.group * InputRing::width_of(s) * kBlock : 0);
    m.dz = to.take<float>(dz_slots * plan.group * dz_width * kBlock);
    m.in = to.take<const float*>(s.KH), m.w = to.take<const float*>(s.KH);
    m.grad = to.take<float*>(s.KH);
    m.tap = to.take<int64_t>(s.KH), m.dz_tap = to.take<int64_t>(s.KH);
    m.row = to.take<float>(((s.OW > s.W ? s.OW : s.W) + kSlack) * kBlock);
    m.mean = to.take<float>(plan.group * kBlock);
    m.item_weight = to.take<float>(plan.group * taps * kBlock), m.item_bias = to.take<float>(plan.group * kBlock);
    m.weight = to.take<float>(plan.blocks * taps * kBlock), m.bias = to.take<float>(plan.blocks * kBlock);
    return m;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    return member(to);
  }
  void lay_out(Layout& at) {
    weight = at.take<float>(plan.blocks * taps * kBlock);
    flipped = at.take<float>(p.grad_input ? plan.blocks * taps * kBlock : 0);
    bias = at.take<float>((plan.blocks + 1) * kBlock);  // and a block of zeros
    affine = at.take<float>(before.affine ? 3 * plan.blocks * kBlock : 0);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }

  void pack(const Team& team) {
    pack_taps(team, p.weight_dtype, p.weight, s.C, taps, weight);
    pack_bias(team, p.weight_dtype, p.bias, s.C, bias);
    pack_affine(team, before.affine, s.C, plan.blocks, affine);
    if (team.rank == 0) zero(bias + plan.blocks * kBlock, 1);
    for (int64_t block = team.rank; block < plan.blocks && p.grad_input; block += team.size)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t mirror = tap / s.KW * s.KW + s.KW - 1 - tap % s.KW;
        __builtin_memcpy(flipped + (block * taps + mirror) * kBlock, weight + (block * taps + tap) * kBlock, kBlock * sizeof(float));
      }
  }

  // One item's place in the tensors.
  struct Item {
    int64_t n, block0, blocks, channels;
    InputRing ring;
  };
  template <class P>
  P* at(P* base, const Item& item, int64_t y, int64_t H, int64_t W) const {
    return base ? base + (item.n * H + y) * W * s.C + item.block0 * kBlock : nullptr;
  }
  float* dz_row(const Member& me, const Item& item, int64_t oy, int64_t g) const {
    return me.dz + (oy % dz_slots * item.blocks + g) * dz_width * kBlock;
  }

  // z, dz and the weight gradient's share of output row oy.
  void output_row(const Member& me, Item& item, int64_t oy, bool owned) {
    Window window{me.in, me.tap, 0};
    if (input_seen) {
      item.ring.advance(s, oy, at(static_cast<const S*>(p.input), item, 0, s.H, s.W), item.channels);
      window.find(s, item.ring, oy);
    }
    const RowFunction convolve = pick_row(s.KW, s.stride_w, s.dilation_w);
    const GradFunction weigh = pick_grad(s.KW, s.dilation_w);
    float unowned[kBlock] = {};
    for (int64_t g = 0; g < item.blocks; ++g) {
      if (recompute) {
        for (int64_t r = 0; r < window.rows; ++r) me.w[r] = weight + (item.block0 + g) * taps * kBlock + window.tap[r];
        convolve({me.in, me.w, window.rows, s.KW, s.stride_w, s.dilation_w, s.OW, bias + (item.block0 + g) * kBlock, me.row});
      }
      float* dz = dz_row(me, item, oy, g) + margin * kBlock;
      const auto shifted = [&](const S* row) { return row ? row + g * kBlock : nullptr; };
      GradRow<S> row{
          me.row, me.mean + g * kBlock,       nullptr, nullptr, nullptr, dz, owned ? me.item_bias + g * kBlock : unowned, s.OW, step,
          s.C,    item.channels - g * kBlock, p.slope};
      row.residual = shifted(at(static_cast<const S*>(p.residual), item, oy, s.OH, s.OW));
      row.grad_output = shifted(at(static_cast<const S*>(p.grad_output), item, oy, s.OH, s.OW));
      if (owned) row.grad_residual = const_cast<S*>(shifted(at(static_cast<const S*>(p.grad_residual), item, oy, s.OH, s.OW)));
      with_activation(p.activation, [&](auto a) { grad_row<decltype(a)::value>(row); });
      if (owned && p.grad_weight) {
        for (int64_t r = 0; r < window.rows; ++r) me.grad[r] = me.item_weight + g * taps * kBlock + window.tap[r];
        weigh({me.in, me.grad, window.rows, s.KW, s.stride_w, s.dilation_w, s.OW, dz, step});
      }
      for (int64_t r = 0; r < window.rows; ++r) me.in[r] += item.ring.width * kBlock;
    }
  }

  void input_row(const Member& me, const Item& item, int64_t iy) {
    int64_t rows = 0;
    for (int64_t ky = s.KH - 1; ky >= 0; --ky) {
      const int64_t y = iy + s.pad_h - ky * s.dilation_h;
      if (y < 0 || y % s.stride_h || y / s.stride_h >= s.OH) continue;
      me.dz_tap[rows] = ky * s.KW * kBlock;
      me.in[rows++] = dz_row(me, item, y / s.stride_h, 0) + (margin - flip_pad) * kBlock;
    }
    const RowFunction convolve = pick_row(s.KW, 1, s.dilation_w);
    for (int64_t g = 0; g < item.blocks; ++g) {
      for (int64_t r = 0; r < rows; ++r) me.w[r] = flipped + (item.block0 + g) * taps * kBlock + me.dz_tap[r];
      convolve({me.in, me.w, rows, s.KW, 1, s.dilation_w, s.W, bias + plan.blocks * kBlock, me.row});
      for (int64_t r = 0; r < rows; ++r) me.in[r] += dz_width * kBlock;
      S* out = at(static_cast<S*>(p.grad_input), item, iy, s.H, s.W) + g * kBlock;
      const int64_t lanes = item.channels - g * kBlock;
      for (int v = 0; v < kBlock && v < lanes; v += kF)
        for (int64_t x = 0; x < s.W; ++x) put(out + x * s.C + v, load(me.row + x * kBlock + v), lanes - v);
    }
  }

  void run_item(const Member& me, int64_t index) {
    const int64_t group = index % plan.groups, band = index / plan.groups % plan.bands;
    Item item{index / plan.groups / plan.bands, plan.first_block(group), 0, 0, {me.ring, 0, 0, 0, 0, {}}};
    const float* vectors = before.affine ? affine + item.block0 * kBlock : nullptr;
    item.ring.staging = {vectors, plan.blocks * kBlock, before.activation, before.slope};
    item.blocks = plan.first_block(group + 1) - item.block0, item.channels = s.C - item.block0 * kBlock;
    if (input_seen) item.ring.start(s, item.blocks);
    zero(me.dz, dz_slots * item.blocks * dz_width);
    zero(me.item_weight, item.blocks * taps), zero(me.item_bias, item.blocks), zero(me.mean, item.blocks);
    if (p.grad_means) {
      const float scale = 1.f / static_cast<float>(s.OH * s.OW);
      for (int64_t c = 0; c < item.blocks * kBlock && c < item.channels; ++c)
        me.mean[c] = p.grad_means[item.n * s.C + item.block0 * kBlock + c] * scale;
    }
    const int64_t first = s.OH * band / plan.bands, end = s.OH * (band + 1) / plan.bands;  // dz rows it owns
    int64_t iy = p.grad_input ? s.H * band / plan.bands : 0;
    const int64_t iy_end = p.grad_input ? s.H * (band + 1) / plan.bands : 0;
    int64_t oy = first, oy_end = end;
    if (iy < iy_end) {  // dz rows that its input rows see
      const int64_t above = iy + s.pad_h - int64_t{s.KH - 1} * s.dilation_h, below = (iy_end - 1 + s.pad_h) / s.stride_h + 1;
      const int64_t seen = above <= 0 ? 0 : (above + s.stride_h - 1) / s.stride_h;
      oy = seen < oy ? seen : oy;
      oy_end = below > oy_end ? below : oy_end;
      oy_end = oy_end < s.OH ? oy_end : s.OH;
    }
    for (; oy < oy_end; ++oy) {
      output_row(me, item, oy, oy >= first && oy < end);
      for (; iy < iy_end && iy + s.pad_h < (oy + 1) * s.stride_h; ++iy) input_row(me, item, iy);
    }
    for (; iy < iy_end; ++iy) input_row(me, item, iy);
    const auto add = [](float* to, const float* from, int64_t floats) {
      for (int64_t i = 0; i < floats; i += kF) store(to + i, load(to + i) + load(from + i));
    };
    add(me.weight + item.block0 * taps * kBlock, me.item_weight, item.blocks * taps * kBlock);
    add(me.bias + item.block0 * kBlock, me.item_bias, item.blocks * kBlock);
  }

  // Sums of all members for one block, [taps][16] -> [16][taps].
  void reduce(int size, int64_t block) {
    const Member first = member(0);
    const int64_t lanes = s.C - block * kBlock < kBlock ? s.C - block * kBlock : kBlock;
    const auto total = [&](int64_t at, bool of_bias) {
      float* to = (of_bias ? first.bias : first.weight) + at * kBlock;
      for (int rank = 1; rank < size; ++rank) {
        const Member me = member(rank);
        const float* from = (of_bias ? me.bias : me.weight) + at * kBlock;
        for (int v = 0; v < kBlock; v += kF) store(to + v, load(to + v) + load(from + v));
      }
      return to;
    };
    for (int64_t tap = 0; tap < taps && p.grad_weight; ++tap) {
      const float* sum = total(block * taps + tap, false);
      for (int64_t c = 0; c < lanes; ++c) p.grad_weight[(block * kBlock + c) * taps + tap] = sum[c];
    }
    if (p.grad_bias) __builtin_memcpy(p.grad_bias + block * kBlock, total(block, true), lanes * sizeof(float));
  }

  void run(const Team& team) {
    const Member me = member(team.rank);
    pack(team);
    zero(me.weight, plan.blocks * taps), zero(me.bias, plan.blocks);
    team.sync();
    const int64_t items = plan.blocks ? s.N * plan.bands * plan.groups : 0;
    for (int64_t i = items * team.rank / team.size; i < items * (team.rank + 1) / team.size; ++i) run_item(me, i);
    if (!weights) return;
    team.sync();
    for (int64_t block = team.rank; block < plan.blocks; block += team.size) reduce(team.size, block);
  }
};

template <class S>
void backward_as(const DepthwiseBackward& p, const DepthwisePrologue& before) {
  DepthwiseBackwardPass<S> pass(p, before);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<DepthwiseBackwardPass<S>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
