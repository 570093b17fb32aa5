// Winograd convolution on the CPU (winograd.h says what it computes), compiled once per instruction set.
//
// A chunk of tiles at a time: the (m+2)^2 points of its inputs go to v [point][tile][C]; then for each panel of up to 64 output channels
// every point is a matrix product [tiles, C] x [C, 64] into a member's x [point][tile][64], and the panel's tiles are transformed back,
// finished and stored. A chunk's buffers stay in L2; filters come from L3 once a chunk, tile rows of 6 x 64 sums in registers.
// Floors: 2*(m+2)^2*C*O/m^2 flops an output position; input and output over memory bandwidth.
#include "depthwise_cpu_pass.h"
#include "mbconv_cpu_gemm.h"
#include "winograd_cpu.h"
#include "winograd_cpu_transform.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int64_t kSlice = 160;  // products summed apart, as in pointwise_cpu_kernel.cpp

template <class S, int m>
struct WinogradPass {
  using W = Winograd1d<m>;
  static constexpr int kSide = m + 2, kPoints = kSide * kSide;
  static constexpr int64_t kColumns = kMaxBlocks * kBlock;

  const Winograd& p;
  const WinogradPlan plan;
  const int64_t OH, OW, blocks, ld;
  float* bias = nullptr;  // [blocks * 16]
  float* common = nullptr;
  char* members = nullptr;
  size_t member_bytes = 0;
  struct Member {
    float* v;  // [point][chunk][ld]
    float* x;  // [point][chunk][columns]
  };

  explicit WinogradPass(const Winograd& params)
      : p(params),
        plan(plan_winograd(params)),
        OH(p.H + 2 * p.pad_h - 2),
        OW(p.W + 2 * p.pad_w - 2),
        blocks((p.O + kBlock - 1) / kBlock),
        ld((p.C + 15) / 16 * 16 + 16) {}  // rows of a power of two would meet in the same sets of L1

  Member member(Layout& to) const {
    Member me;
    me.v = to.take<float>(plan.together ? 0 : kPoints * plan.chunk * ld);
    me.x = to.take<float>(kPoints * plan.chunk * kColumns);
    return me;
  }
  Member member(int rank) const {
    Layout to{members + rank * member_bytes};
    Member me = member(to);
    if (plan.together) me.v = common;
    return me;
  }
  void lay_out(Layout& at) {
    bias = at.take<float>(blocks * kBlock);
    common = at.take<float>(plan.together ? kPoints * plan.chunk * ld : 0);
    Layout one{nullptr};
    member(one);
    member_bytes = one.bytes;
    members = at.take<char>(plan.threads * static_cast<int64_t>(member_bytes));
  }

  struct Place {
    int64_t n, y, x;  // image; first output row and column
  };
  Place place(int64_t tile) const {
    const int64_t of_image = plan.tiles_h * plan.tiles_w, r = tile % of_image;
    return {tile / of_image, r / plan.tiles_w * m, r % plan.tiles_w * m};
  }

  void gather(const Place& at, int64_t c, vf (&d)[kSide][kSide]) const {
    const int64_t y0 = at.y - p.pad_h, x0 = at.x - p.pad_w;
    if (p.upsample != Upsample::none) return gather_enlarged(at.n, y0, x0, c, d);
    const S* from = static_cast<const S*>(p.input) + ((at.n * p.H + y0) * p.W + x0) * p.C + c;
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + kSide <= p.H && x0 + kSide <= p.W && c + kF <= p.C;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const bool there = inside || (y0 + i >= 0 && y0 + i < p.H && x0 + j >= 0 && x0 + j < p.W);
        d[i][j] = !there ? vf{} : inside ? load_as(from + (i * p.W + j) * p.C, float{}) : get(from + (i * p.W + j) * p.C, p.C - c);
      }
  }

  // The two stored positions that an enlarged one lies between, inside the image, and the share of the second.
  struct Between {
    int64_t lo, hi;
    float share;
  };
  Between between(int64_t at, int64_t size) const {
    if (p.upsample == Upsample::nearest) return {at >> 1, at >> 1, 0.f};
    const int64_t lo = (at - 1) >> 1;
    return {lo < 0 ? 0 : lo, lo + 1 < size ? lo + 1 : size - 1, at & 1 ? 0.25f : 0.75f};
  }
  // A tile of the enlarged image: its columns between two stored rows, then between two of those.
  void gather_enlarged(int64_t n, int64_t y0, int64_t x0, int64_t c, vf (&d)[kSide][kSide]) const {
    const int64_t h = p.H / 2, w = p.W / 2, left = p.C - c;
    const S* const image = static_cast<const S*>(p.input) + n * h * w * p.C + c;
    constexpr int kStored = kSide / 2 + 2;
    const int64_t first = (x0 - 1) >> 1;
    for (int i = 0; i < kSide; ++i) {
      const int64_t y = y0 + i;
      if (y < 0 || y >= p.H) {
        for (int j = 0; j < kSide; ++j) d[i][j] = vf{};
        continue;
      }
      const Between rows = between(y, h);
      vf column[kStored];
      for (int s = 0; s < kStored; ++s) {
        const int64_t x = first + s < 0 ? 0 : first + s < w ? first + s : w - 1;
        const vf lo = get(image + (rows.lo * w + x) * p.C, left);
        column[s] = rows.share == 0.f ? lo : lo * (1.f - rows.share) + get(image + (rows.hi * w + x) * p.C, left) * rows.share;
      }
      for (int j = 0; j < kSide; ++j) {
        const int64_t x = x0 + j;
        const Between columns = between(x < 0 ? 0 : x, w);
        const int lo = static_cast<int>(columns.lo - first), hi = static_cast<int>(columns.hi - first);
        const bool there = x >= 0 && x < p.W;
        d[i][j] = !there ? vf{} : columns.share == 0.f ? column[lo] : column[lo] * (1.f - columns.share) + column[hi] * columns.share;
      }
    }
  }

  // Tiles first .. last of the chunk that starts at tile t0.
  void transform(const Member& me, int64_t t0, int64_t first, int64_t last) const {
    for (int64_t t = first; t < last; ++t) {
      const Place at = place(t0 + t);
      for (int64_t c = 0; c < p.C; c += kF) {
        vf d[kSide][kSide], v[kSide][kSide];
        gather(at, c, d);
        transform_2d(d, v, W::input);
        for (int i = 0; i < kPoints; ++i) store(me.v + (i * plan.chunk + t) * ld + c, v[i / kSide][i % kSide]);
      }
    }
  }

  void multiply(const Member& me, int64_t count, int64_t block0, int panel) const {
    const int most = tile_rows(panel);
    for (int point = 0; point < kPoints; ++point) {
      const float* w = p.packed + (block0 * kPoints + point) * p.C * kBlock;
      for (int64_t k0 = 0; k0 < p.C; k0 += kSlice) {
        const int64_t k1 = k0 + kSlice < p.C ? k0 + kSlice : p.C;
        for (int64_t i = 0, n; i < count; i += n) {
          n = block_rows(count - i, most);
          const float* a[8];
          float* out[8];
          for (int64_t r = 0; r < n; ++r) {
            a[r] = me.v + (point * plan.chunk + i + r) * ld;
            out[r] = me.x + (point * plan.chunk + i + r) * kColumns;
          }
          gemm_tile(static_cast<int>(n), panel, a, w, kPoints * p.C * kBlock, k0, k1, out, kBlock, k0 > 0);
        }
      }
    }
  }

  void finish(const Member& me, int64_t t0, int64_t count, int64_t block0, int panel) const {
    for (int64_t t = 0; t < count; ++t) {
      const Place at = place(t0 + t);
      for (int64_t c = 0; c < panel * kBlock && block0 * kBlock + c < p.O; c += kF) {
        vf x[kSide][kSide], y[m][m];
        for (int i = 0; i < kPoints; ++i) x[i / kSide][i % kSide] = load(me.x + (i * plan.chunk + t) * kColumns + c);
        transform_2d(x, y, W::output);
        finish_tile(at, block0 * kBlock + c, y);
      }
    }
  }

  void finish_tile(const Place& at, int64_t c, vf (&y)[m][m]) const {
    const int64_t rows = OH - at.y < m ? OH - at.y : m, columns = OW - at.x < m ? OW - at.x : m, left = p.O - c;
    const auto residual = [&](int i, int j) {
      const S* from = static_cast<const S*>(p.residual) + ((at.n * OH + at.y + i) * OW + at.x + j) * p.O + c;
      return i < rows && j < columns ? get(from, left) : vf{};
    };
    const vf b = load(bias + c);
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < m; ++j) {
        y[i][j] += b;
        if (p.residual && !p.residual_last) y[i][j] += residual(i, j);
      }
    with_activation(p.activation, [&](auto a) {
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) y[i][j] = activate<decltype(a)::value>(y[i][j], p.slope);
    });
    if (p.residual && p.residual_last) {
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) y[i][j] += residual(i, j);
    }
    S* const output = static_cast<S*>(p.output) + c;
    if (p.pool == Pool::none) {
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) put(output + ((at.n * OH + at.y + i) * OW + at.x + j) * p.out_stride, y[i][j], left);
      return;
    }
    for (int i = 0; i + 1 < rows; i += 2)
      for (int j = 0; j + 1 < columns; j += 2) {
        const vf(&top)[m] = y[i], (&bottom)[m] = y[i + 1];
        const vf pooled = p.pool == Pool::average ? (top[j] + top[j + 1] + bottom[j] + bottom[j + 1]) * 0.25f
                                                  : larger(larger(top[j], top[j + 1]), larger(bottom[j], bottom[j + 1]));
        put(output + ((at.n * (OH / 2) + (at.y + i) / 2) * (OW / 2) + (at.x + j) / 2) * p.out_stride, pooled, left);
      }
  }
  // NaN where either is, as torch's max pooling has it.
  static vf larger(vf a, vf b) { return (a > b) | (a != a) ? a : b; }

  void run(const Team& team) const {
    pack_bias(team, DType::f32, p.bias, p.O, bias);
    team.sync();
    const Member me = member(team.rank);
    const auto chunk = [&](int64_t i) { return plan.tiles * i / plan.chunks; };
    const auto all_of = [&](int64_t t0, int64_t count, int64_t i) {
      const int64_t b0 = blocks * i / plan.panels, b1 = blocks * (i + 1) / plan.panels;
      multiply(me, count, b0, static_cast<int>(b1 - b0));
      finish(me, t0, count, b0, static_cast<int>(b1 - b0));
    };
    if (!plan.together) {
      team.deal(plan.chunks, [&](int64_t i) {
        const int64_t t0 = chunk(i), count = chunk(i + 1) - t0;
        transform(me, t0, 0, count);
        for (int64_t panel = 0; panel < plan.panels; ++panel) all_of(t0, count, panel);
      });
      return;
    }
    for (int64_t i = 0; i < plan.chunks; ++i) {
      const int64_t t0 = chunk(i), count = chunk(i + 1) - t0;
      transform(me, t0, count * team.rank / team.size, count * (team.rank + 1) / team.size);
      team.sync();
      team.deal(plan.panels, [&](int64_t panel) { all_of(t0, count, panel); });
      team.sync();  // v is written anew
    }
  }
};

template <class S, int m>
void winograd_as(const Winograd& p) {
  WinogradPass<S, m> pass(p);
  Layout size{nullptr};
  pass.lay_out(size);
  Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
  pass.lay_out(at);
  cpu::run_team(pass.plan.threads, [](const Team& team, void* pass) { static_cast<const WinogradPass<S, m>*>(pass)->run(team); }, &pass);
}

// A block's filters [C][9][16], then their points.
template <int m>
void filter_blocks(const WinogradFilter& p, const Team& team, float* taps) {
  constexpr int kSide = m + 2, kPoints = kSide * kSide;
  const int64_t blocks = (p.O + kBlock - 1) / kBlock;
  for (int64_t block = team.rank; block < blocks; block += team.size) {
    const float* rows[16];
    for (int64_t i = 0; i < 16; ++i) rows[i] = block * 16 + i < p.O ? p.weight + (block * 16 + i) * p.C * 9 : nullptr;
    pack_rows<16>(rows, 0, p.C * 9, p.C * 9, taps);
    float* const to = p.packed + block * kPoints * p.C * kBlock;
    for (int64_t c = 0; c < p.C; ++c)
      for (int v = 0; v < kBlock; v += kF) {
        vf g[3][3], u[kSide][kSide];
        for (int i = 0; i < 9; ++i) g[i / 3][i % 3] = load(taps + (c * 9 + i) * kBlock + v);
        transform_2d(g, u, Winograd1d<m>::filter);
        for (int i = 0; i < kPoints; ++i) store(to + (i * p.C + c) * kBlock + v, u[i / kSide][i % kSide]);
      }
  }
}

}  // namespace

void winograd(const Winograd& p) {
  with_storage(p.dtype, [&](auto s) {
    if (p.m == 4) winograd_as<decltype(s), 4>(p);
    else winograd_as<decltype(s), 2>(p);
  });
}

void winograd_filter(const WinogradFilter& p) {
  const int64_t floats = (p.C * 9 + 15) / 16 * 16 * kBlock, work = p.O * p.C / 4096;
  const int threads = static_cast<int>(work < 1 ? 1 : work < cpu::max_threads() ? work : cpu::max_threads());
  struct Job {
    const WinogradFilter& p;
    float* taps;
    int64_t floats;
  } job{p, static_cast<float*>(cpu::scratch(threads * floats * sizeof(float))), floats};
  cpu::run_team(
      threads,
      [](const Team& team, void* context) {
        const Job& job = *static_cast<const Job*>(context);
        float* const taps = job.taps + team.rank * job.floats;
        job.p.m == 4 ? filter_blocks<4>(job.p, team, taps) : filter_blocks<2>(job.p, team, taps);
      },
      &job);
}

}  // namespace pyops::conv::PYOPS_ISA
