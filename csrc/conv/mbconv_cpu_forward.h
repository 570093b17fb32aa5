// MBConv inference on the CPU (mbconv.h says what it computes): one parallel region.
//
// A crew of members shares an image; images that every member gets one of go by crews of one, the rest by larger crews.
// 1. Produce. For every group of up to four blocks of 16 channels: rows of x are expanded, a few at a time, into a ring of padded rows
//    [slot][block][width][16] in L2, and every row of y is convolved out of it while it is there. y, [pixel][E], is stored once, its
//    means are summed on the way. Members take groups as they are free; where those are few they split blocks and rows (split_mbconv).
// 2. Gates, folded into the smaller of y and a copy of the project weights.
// 3. Project: tiles of up to 64 pixels x 64 channels, members take pixels, or channels where weights outweigh y, as they are free.
// Small feature maps take several images through 1 to 3 at once, so that weights, which then outweigh y, come from L3 less often.
// Floors: flops 2*N*(H*W*C*E + OH*OW*E*(K*K + O)) and one activation for every element of E, twice, about 12 cycles for 16.
#pragma once
#include "depthwise_cpu_pass.h"
#include "mbconv_cpu.h"
#include "mbconv_cpu_gemm.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

template <class S, class E>
struct MBConvPass {
  static constexpr int64_t kTile = 64;        // pixels of a project tile, at most
  static constexpr int64_t kExpandTile = 48;  // pixels expanded at once, at least
  static constexpr bool kPairs = sizeof(E) == 2;

  const MBConvForward& p;
  const MBConvSizes& s;
  const PackedLayout at;
  const float* weights;
  const int threads;
  const int64_t K, pad, OH, OW, pixels, channels, ldc, ldy, step, slots, width, group, batch;
  const bool staged, scale_weights;

  struct Member {
    float *ring, *row, *tile, *gates, *squeezed;
    const float** rows;
    float *pool, *scaled;  // these four: of a crew, in its first member's part
    E *staged, *y;
  };
  char* base = nullptr;
  size_t member_bytes = 0;

  static int64_t even_stride(int64_t elements) {  // rows of whole lines, an odd number of them: no two rows share all cache sets
    const int64_t line = 64 / sizeof(E), lines = (elements + line - 1) / line;
    return (lines | 1) * line;
  }

  MBConvPass(const MBConvForward& params, bool pairs)
      : p(params),
        s(p.sizes),
        at(s, pairs),
        weights(reinterpret_cast<const float*>(static_cast<const char*>(p.packed) + kPackedHeaderBytes)),
        threads(pick_threads()),
        K(s.K),
        pad(K / 2),
        OH((p.H - 1) / p.stride + 1),
        OW((p.W - 1) / p.stride + 1),
        pixels(OH * OW),
        channels(at.blocks * kBlock),
        ldc(even_stride(s.C + 1)),
        ldy(even_stride(channels)),
        step((kExpandTile + p.W - 1) / p.W),
        slots(K + step - 1),
        width((OW - 1 + kSlack) * p.stride + K),
        group(pick_group()),
        batch(pick_batch()),
        staged(s.expand && (!std::is_same_v<S, E> || (kPairs && s.C % 2))),
        scale_weights(s.S && batch == 1 && at.out_blocks * kBlock < pixels) {}

  int pick_threads() const {
    const int64_t work = p.N * p.H * p.W * s.C * s.E / 200000, most = cpu::max_threads();  // products: about 3 us
    return static_cast<int>(work < 1 ? 1 : work < most ? work : most);
  }
  int64_t pick_group() const {  // blocks whose ring takes 384 KiB at most
    const int64_t most = (int64_t{384} << 10) / (slots * width * 64);
    return most < 1 ? 1 : most < kMaxBlocks ? most : kMaxBlocks;
  }
  int64_t pick_batch() const {  // images of a crew of one: y takes 512 KiB at most
    const int64_t most = (int64_t{512} << 10) / (pixels * ldy * static_cast<int64_t>(sizeof(E))), share = p.N / threads;
    const int64_t bound = most < share ? most : share;
    return bound < 1 ? 1 : (share + (share + bound - 1) / bound - 1) / ((share + bound - 1) / bound);
  }

  Member member(Layout& to) const {
    Member m;
    const int64_t images = batch > threads ? batch : threads;  // or bands
    m.ring = to.take<float>(slots * group * width * kBlock);
    m.row = to.take<float>((OW + kSlack) * kBlock);
    m.rows = to.take<const float*>(2 * K);
    m.tile = to.take<float>(kTile * kMaxBlocks * kBlock);
    m.gates = to.take<float>(channels);
    m.squeezed = to.take<float>((s.S + kBlock) / kBlock * kBlock);
    m.pool = to.take<float>(s.S ? images * channels : 0);
    m.scaled = to.take<float>(scale_weights ? at.out_blocks * at.project_lanes * kBlock : 0);
    m.staged = to.take<E>(staged ? batch * p.H * p.W * ldc : 0);
    m.y = to.take<E>(batch * pixels * ldy);
    return m;
  }
  Member member(int rank) const {
    Layout to{base + rank * member_bytes};
    return member(to);
  }

  // A team within the team, at work on `count` images from n0.
  struct Crew : Team {
    Member own, lead;
    int64_t n0, count;
    int64_t share(int64_t of, int member) const { return of * member / size; }
  };

  // ---------------------------------------------------------------------------------------------------------- produce

  const S* image(int64_t n) const { return static_cast<const S*>(p.input) + n * p.H * p.W * s.C; }

  void stage(const Crew& crew) const {
    const int64_t rows = crew.count * p.H * p.W;
    for (int64_t r = crew.share(rows, crew.rank); r < crew.share(rows, crew.rank + 1); ++r) {
      E* to = crew.lead.staged + r * ldc;
      const S* from = image(crew.n0) + r * s.C;
      if constexpr (std::is_same_v<S, E>) __builtin_memcpy(to, from, s.C * sizeof(S));
      else if constexpr (!kPairs) load_row(to, from, s.C);
      to[s.C] = E{};
    }
  }

  struct Chunk {
    int64_t image, i;  // in the input; within the crew's images
    int64_t block0, blocks;
    float* ring;
  };
  float* ring_row(const Chunk& c, int64_t y) const { return c.ring + y % slots * c.blocks * width * kBlock; }

  void expand_rows(const Crew& crew, const Chunk& c, int64_t y0, int64_t y1) const {
    const int blocks = static_cast<int>(c.blocks), most = tile_rows(blocks);
    const E* x = nullptr;
    int64_t ld = 0;
    if constexpr (std::is_same_v<S, E>) x = image(c.image), ld = s.C;
    if (staged) x = crew.lead.staged + c.i * p.H * p.W * ldc, ld = ldc;
    const float* w = weights + at.expand + c.block0 * at.expand_lanes * kBlock;
    const int64_t count = (y1 - y0) * p.W;
    for (int64_t k0 = 0; k0 < at.expand_lanes; k0 += kDepth) {
      const int64_t k1 = k0 + kDepth < at.expand_lanes ? k0 + kDepth : at.expand_lanes;
      int64_t y = y0, column = 0;
      float* to = ring_row(c, y) + pad * kBlock;
      for (int64_t i = 0, n; i < count; i += n) {
        n = block_rows(count - i, most);
        const E* a[8];
        float* out[8];
        for (int64_t r = 0; r < n; ++r) {
          a[r] = x + (y0 * p.W + i + r) * ld;
          out[r] = to + column * kBlock;
          if (++column == p.W) column = 0, to = ring_row(c, ++y) + pad * kBlock;
        }
        gemm_tile(static_cast<int>(n), blocks, a, w, at.expand_lanes * kBlock, k0, k1, out, width * kBlock, k0 > 0);
      }
    }
    with_activation(p.activation, [&](auto activation) {
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t g = 0; g < c.blocks; ++g)
          for (int v = 0; v < kBlock; v += kF) {
            const vf bias = load(weights + at.expand_bias + (c.block0 + g) * kBlock + v);
            float* row = ring_row(c, y) + (g * width + pad) * kBlock + v;
            for (int64_t i = 0; i < p.W * kBlock; i += kBlock)
              store(row + i, activate<decltype(activation)::value>(load(row + i) + bias, 0.f));
          }
    });
  }

  void stage_rows(const Chunk& c, int64_t y0, int64_t y1) const {
    for (int64_t y = y0; y < y1; ++y)
      stage_row(ring_row(c, y) + pad * kBlock, width * kBlock, image(c.image) + y * p.W * s.C + c.block0 * kBlock, p.W, s.C,
                s.C - c.block0 * kBlock, c.blocks);
  }

  // z of one row and block -> y, and its sum.
  template <Activation A>
  static void finish_row(const float* z, E* y, int64_t count, int64_t ldy, float* sums) {
    for (int v = 0; v < kBlock; v += kF) {
      vf sum{};
      for (int64_t x = 0; x < count; ++x) {
        const vf value = activate<A>(load(z + x * kBlock + v), 0.f);
        store_as(y + x * ldy + v, value);
        sum += value;
      }
      add_compensated(sums + v, sum);
    }
  }

  // Rows y0 to y1 of y for one chunk; `pool` gets their sums.
  void produce(const Crew& crew, const Chunk& c, int64_t y0, int64_t y1, float* pool) const {
    const float **in = crew.own.rows, **w = in + K;
    const RowFunction convolve = pick_row(K, p.stride, 1);
    float sums[kMaxBlocks * 2 * kBlock] = {};
    for (int64_t i = 0; i < slots * c.blocks; ++i) {
      zero(c.ring + i * width * kBlock, pad);
      zero(c.ring + (i * width + pad + p.W) * kBlock, width - pad - p.W);
    }
    const int64_t last = (y1 - 1) * p.stride - pad + K < p.H ? (y1 - 1) * p.stride - pad + K : p.H;
    int64_t next = 0;
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t first = y * p.stride - pad, end = first + K < p.H ? first + K : p.H;
      next = next < first ? first : next;
      while (next < end) {
        const int64_t stop = next + step < last ? next + step : last;
        if (s.expand) expand_rows(crew, c, next, stop);
        else stage_rows(c, next, stop);
        next = stop;
      }
      for (int64_t g = 0; g < c.blocks; ++g) {
        int64_t rows = 0;
        for (int64_t ky = first < 0 ? -first : 0; ky < K && first + ky < p.H; ++ky, ++rows) {
          in[rows] = ring_row(c, first + ky) + g * width * kBlock;
          w[rows] = weights + at.depthwise + ((c.block0 + g) * K + ky) * K * kBlock;
        }
        convolve({in, w, rows, K, p.stride, 1, OW, weights + at.depthwise_bias + (c.block0 + g) * kBlock, crew.own.row});
        E* to = crew.lead.y + ((c.i * OH + y) * OW) * ldy + (c.block0 + g) * kBlock;
        with_activation(p.activation, [&](auto activation) {
          finish_row<decltype(activation)::value>(crew.own.row, to, OW, ldy, sums + g * 2 * kBlock);
        });
      }
    }
    for (int64_t g = 0; g < c.blocks && s.S; ++g)
      __builtin_memcpy(pool + (c.block0 + g) * kBlock, sums + g * 2 * kBlock, kBlock * sizeof(float));
  }

  // What of y a member produces: blocks for all rows, and blocks for a band of rows.
  struct Part {
    int64_t block0, block1, y0, y1, band;
  };
  struct Parts {
    MBConvSplit split;
    Part part[2];
  };
  // Where there are many groups of blocks, members produce them as they are free.
  bool deals(const Crew& crew) const { return crew.size > 1 && at.blocks >= 3 * group * crew.size; }
  Parts parts(const Crew& crew) const {
    const bool whole = crew.size == 1 || deals(crew);
    const MBConvSplit split = whole ? MBConvSplit{at.blocks, 1, 1} : split_mbconv(at.blocks, OH, p.stride, s.K, crew.size);
    const int unit = crew.rank % split.units, band = crew.rank / split.units;
    const int64_t rest = at.blocks - split.whole;
    Parts parts{split, {{crew.share(split.whole, crew.rank), crew.share(split.whole, crew.rank + 1), 0, OH, 0}, {}}};
    if (band < split.bands)
      parts.part[1] = {split.whole + rest * unit / split.units, split.whole + rest * (unit + 1) / split.units, OH * band / split.bands,
                       OH * (band + 1) / split.bands, band};
    return parts;
  }

  void produce(const Crew& crew, const Parts& parts) const {
    if (!deals(crew)) {
      for (const Part& part : parts.part) produce(crew, part);
      return;
    }
    const int64_t groups = (at.blocks + group - 1) / group;
    crew.deal(groups, [&](int64_t g) { produce(crew, Part{at.blocks * g / groups, at.blocks * (g + 1) / groups, 0, OH, 0}); });
  }
  void produce(const Crew& crew, const Part& part) const {
    const int64_t blocks = part.block1 - part.block0, groups = (blocks + group - 1) / group;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < crew.count; ++i) {
        const int64_t block0 = part.block0 + blocks * g / groups, block1 = part.block0 + blocks * (g + 1) / groups;
        produce(crew, {crew.n0 + i, i, block0, block1 - block0, crew.own.ring}, part.y0, part.y1,
                crew.lead.pool + (i + part.band) * channels);
      }
  }

  // ------------------------------------------------------------------------------------------------------------ gates

  // The squeezed activations of image i, [S], in crew.own.squeezed. More than one band only for one image.
  void squeeze(const Crew& crew, int64_t i, const MBConvSplit& split) const {
    float* mean = crew.own.gates;
    const float scale = 1.f / static_cast<float>(pixels);
    for (int64_t c = 0; c < channels; c += kF) {
      vf sum{};
      for (int band = 0; band < (c < split.whole * kBlock ? 1 : split.bands); ++band)
        sum += load(crew.lead.pool + (i + band) * channels + c);
      store(mean + c, sum * scale);
    }
    const float* w = weights + at.squeeze;
    for (int64_t j = 0; j < s.S; j += 4) {
      const float* rows[4];
      vf acc[4] = {};
      float sums[4];
      for (int64_t r = 0; r < 4; ++r) rows[r] = w + (j + r < s.S ? j + r : s.S - 1) * channels;
      for (int64_t c = 0; c < channels; c += kF)
        for (int r = 0; r < 4; ++r) acc[r] += load(mean + c) * load(rows[r] + c);
      sum_lanes(acc, sums);
      for (int64_t r = 0; r < 4 && j + r < s.S; ++r) crew.own.squeezed[j + r] = sums[r];
    }
    with_activation(p.squeeze_activation, [&](auto activation) {
      for (int64_t j = 0; j < s.S; j += kF) {
        float* at_j = crew.own.squeezed + j;
        store(at_j, activate<decltype(activation)::value>(load(at_j) + load(weights + at.squeeze_bias + j), 0.f));
      }
    });
  }

  // Gates of a range of blocks, in crew.own.gates.
  void excite(const Crew& crew, int64_t block0, int64_t block1) const {
    for (int64_t block = block0; block < block1; ++block)
      for (int v = 0; v < kBlock; v += kF) {
        const float* w = weights + at.gate + block * s.S * kBlock + v;
        vf acc[2] = {};
        for (int64_t j = 0; j < s.S; ++j) acc[j % 2] += crew.own.squeezed[j] * load(w + j * kBlock);
        store(crew.own.gates + block * kBlock + v, (acc[0] + acc[1]) + load(weights + at.gate_bias + block * kBlock + v));
      }
    with_activation(p.gate_activation, [&](auto activation) {
      for (int64_t c = block0 * kBlock; c < block1 * kBlock; c += kF)
        store(crew.own.gates + c, activate<decltype(activation)::value>(load(crew.own.gates + c), 0.f));
    });
  }

  void gate_weights(const Crew& crew) const {
    const int64_t block0 = crew.share(at.blocks, crew.rank), block1 = crew.share(at.blocks, crew.rank + 1);
    const int64_t per_lane = kPairs ? 2 : 1, lane0 = block0 * kBlock / per_lane, lane1 = block1 * kBlock / per_lane;
    excite(crew, block0, block1);
    for (int64_t block = 0; block < at.out_blocks; ++block)
      for (int64_t k = lane0; k < lane1; ++k) {
        const int64_t offset = (block * at.project_lanes + k) * kBlock;
        const float *from = weights + at.project + offset, *gate = crew.own.gates + k * per_lane;
        if constexpr (kPairs) {
          for (int64_t v = 0; v < 2 * kBlock; v += kF) {  // gates of the pair, in turn
            const vf pair = alternate(gate[0], gate[1]);
            store_as(reinterpret_cast<E*>(crew.lead.scaled + offset) + v, load_as(reinterpret_cast<const E*>(from) + v, float{}) * pair);
          }
        } else {
          for (int v = 0; v < kBlock; v += kF) store(crew.lead.scaled + offset + v, load(from + v) * gate[0]);
        }
      }
  }
  static vf alternate(float even, float odd) {
    vf v;
    for (int i = 0; i < kF; ++i) v[i] = i % 2 ? odd : even;
    return v;
  }

  void gate_y(const Crew& crew, const Part& part, int64_t i) const {
    for (int64_t x = part.y0 * OW; x < part.y1 * OW; ++x) {
      E* y = crew.lead.y + (i * pixels + x) * ldy;
      for (int64_t c = part.block0 * kBlock; c < part.block1 * kBlock; c += kF)
        store_as(y + c, load_as(y + c, float{}) * load(crew.own.gates + c));
    }
  }

  // ---------------------------------------------------------------------------------------------------------- project

  void project(const Crew& crew) const {
    const int64_t rows = crew.count * pixels, blocks = at.out_blocks;
    const bool by_blocks = crew.size > 1 && blocks * at.project_lanes * kBlock * 4 > rows * ldy * static_cast<int64_t>(sizeof(E)) &&
                           (blocks % crew.size == 0 || blocks >= 8 * crew.size);
    const auto panel = [&](int64_t i, int64_t panels, int64_t row0, int64_t row1) {
      const int64_t b0 = blocks * i / panels, b1 = blocks * (i + 1) / panels;
      for (int64_t r = row0, n; r < row1; r += n) {
        n = block_rows(row1 - r, kTile);
        project_tile(crew, b0, static_cast<int>(b1 - b0), r, n);
      }
    };
    const int64_t fewest = (blocks + kMaxBlocks - 1) / kMaxBlocks;
    if (by_blocks) {
      const int64_t panels = (fewest + crew.size - 1) / crew.size * crew.size;
      return crew.deal(panels, [&](int64_t i) { panel(i, panels, 0, rows); });
    }
    const int64_t tiles = ((rows + kTile - 1) / kTile + crew.size - 1) / crew.size * crew.size;
    crew.deal(tiles, [&](int64_t tile) {
      for (int64_t i = 0; i < fewest; ++i) panel(i, fewest, rows * tile / tiles, rows * (tile + 1) / tiles);
    });
  }

  void project_tile(const Crew& crew, int64_t block0, int blocks, int64_t row0, int64_t rows) const {
    const float* w = (scale_weights ? crew.lead.scaled : weights + at.project) + block0 * at.project_lanes * kBlock;
    const int most = tile_rows(blocks);
    for (int64_t k0 = 0; k0 < at.project_lanes; k0 += kDepth) {
      const int64_t k1 = k0 + kDepth < at.project_lanes ? k0 + kDepth : at.project_lanes;
      for (int64_t i = 0, n; i < rows; i += n) {
        n = block_rows(rows - i, most);
        const E* a[8];
        float* out[8];
        for (int64_t r = 0; r < n; ++r) a[r] = crew.lead.y + (row0 + i + r) * ldy, out[r] = crew.own.tile + (i + r) * blocks * kBlock;
        gemm_tile(static_cast<int>(n), blocks, a, w, at.project_lanes * kBlock, k0, k1, out, kBlock, k0 > 0);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t offset = (crew.n0 * pixels + row0 + r) * s.O + block0 * kBlock, left = s.O - block0 * kBlock;
      for (int64_t c = 0; c < blocks * kBlock && c < left; c += kF) {
        vf value = load(crew.own.tile + r * blocks * kBlock + c) + load(weights + at.project_bias + block0 * kBlock + c);
        if (p.residual) value += get(static_cast<const S*>(p.input) + offset + c, left - c);
        put(static_cast<S*>(p.output) + offset + c, value, left - c);
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------------- run

  void run(const Crew& crew) const {
    if (staged) stage(crew), crew.sync();
    const Parts parts = this->parts(crew);
    produce(crew, parts);
    crew.sync();
    if (s.S) {
      for (int64_t i = 0; i < crew.count; ++i) {
        squeeze(crew, i, parts.split);
        if (scale_weights) {
          gate_weights(crew);
          continue;
        }
        for (const Part& part : parts.part) excite(crew, part.block0, part.block1);
        for (const Part& part : parts.part) gate_y(crew, part, i);
      }
      crew.sync();
    }
    project(crew);
    crew.sync();  // the first member's part of the scratch is free again
  }

  void run(const Team& team) const {
    const int64_t share = p.N / team.size, rest = p.N % team.size;
    if (rest) {
      const int size = team.size / static_cast<int>(rest), index = team.rank / size, first = index * size;
      if (index < rest)
        run(Crew{{team.rank - first, size, team.members + first, team.shares + first},
                 member(team.rank),
                 member(first),
                 share * team.size + index,
                 1});
    }
    const Member own = member(team.rank);
    for (int64_t n = team.rank * share, end = n + share; n < end; n += batch) {
      cpu::Share alone;  // each crew counts its deals from the first
      run(Crew{{0, 1, nullptr, &alone}, own, own, n, end - n < batch ? end - n : batch});
    }
  }
};

template <class S, class E>
void mbconv_as(const MBConvForward& p, bool pairs) {
  MBConvPass<S, E> pass(p, pairs);
  Layout size{nullptr};
  pass.member(size);
  pass.member_bytes = size.bytes;
  pass.base = static_cast<char*>(cpu::scratch(size.bytes * pass.threads));
  cpu::run_team(pass.threads, [](const Team& team, void* pass) { static_cast<MBConvPass<S, E>*>(pass)->run(team); }, &pass);
}

}  // namespace
}  // namespace pyops::conv::PYOPS_ISA
