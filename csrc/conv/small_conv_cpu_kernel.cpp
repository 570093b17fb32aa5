// The convolution of small images and of images of few channels on the CPU (small_conv.h says what it computes), compiled once per
// instruction set.
//
// The images are copied once as floats with their zeros around, so that no tap looks at a border. Then a tile of positions by vectors of
// output channels (two rows of positions with pooling) stays in registers while the taps pass, a load of the filter for each vector and a
// broadcast of the image for each position. A row of a filter is one run of KW * C floats of the image; after kRun taps a new sum begins,
// and the bias comes last: small sums, small errors. Floors: N*OH*OW*O*C*KH*KW products over the machine's; the copy is a C-th of a
// channel's taps.
#include "depthwise_cpu_pass.h"
#include "small_conv_cpu.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int kMostVectors = kF == 16 ? 4 : 2;  // of a tile; 24 sums in 32 registers, 12 in 16
constexpr int64_t kMostSpan = 12, kRun = 8;     // positions of a tile, taps

struct Tile {
  const float *image, *weight, *bias;  // of the first position and vector; bias may be null
  int64_t left;                        // channels from there on
  int64_t rows, length;                // of the filter, floats in one
  int64_t row, step, channels;         // floats between the image's rows and positions and the filter's taps
  float* to;                           // [positions][vectors][kF]
};

// The next kRun taps, from tap `first` of row `y` on.
template <int R, int NV>
[[gnu::noinline]] void add_run(const Tile& t, int64_t& y, int64_t& first) {
  const int64_t step = t.step, channels = t.channels;
  const float* weight = t.weight + (y * t.length + first) * channels;
  const bool begins = y == 0 && first == 0;
  vf sums[R][NV];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < NV; ++v) sums[i][v] = vf{};
  int64_t left = kRun;
  do {
    const int64_t count = t.length - first < left ? t.length - first : left;
    const float* from[(R + 2) / 3];  // three positions each: so few pointers stay in registers
    for (int i = 0; i < (R + 2) / 3; ++i) from[i] = t.image + y * t.row + first + 3 * i * step;
    for (int64_t k = 0; k < count; ++k, weight += channels) {
      vf taps[NV];
      for (int v = 0; v < NV; ++v) taps[v] = load(weight + v * kF);
      for (int i = 0; i < R; ++i) {
        const vf x = splat<float>(from[i / 3][i % 3 * step + k]);
        for (int v = 0; v < NV; ++v) sums[i][v] += x * taps[v];
      }
    }
    left -= count, first += count;
    if (first == t.length) first = 0, ++y;
  } while (left > 0 && y < t.rows);
  const bool biased = y == t.rows && t.bias;
  for (int v = 0; v < NV; ++v) {
    const vf bias = biased ? get(t.bias + v * kF, t.left - v * kF) : vf{};
    for (int i = 0; i < R; ++i) {
      float* const to = t.to + (i * NV + v) * kF;
      store(to, (begins ? sums[i][v] : load(to) + sums[i][v]) + bias);
    }
  }
}
template <int R, int NV>
void convolve_tile(const Tile& t) {
  for (int64_t y = 0, first = 0; y < t.rows;) add_run<R, NV>(t, y, first);
}

constexpr int64_t kMostTile = 24 * kF;  // floats: 12 positions by 2 vectors, 8 by 3, 6 by 4
constexpr int64_t span_of(int64_t vectors) { return vectors == 1 || vectors == 3 ? 8 : kF == 16 && vectors == 2 ? 12 : 6; }

// span: an even number of positions, at most span_of(NV).
template <int NV>
void convolve_span(int64_t span, const Tile& t) {
  constexpr int64_t most = span_of(NV);
  switch (span) {
    case 2: return convolve_tile<2, NV>(t);
    case 4: return convolve_tile<4, NV>(t);
    case 6: return convolve_tile<6, NV>(t);
    case 8:
      if constexpr (most >= 8) return convolve_tile<8, NV>(t);
      break;
    case 10:
      if constexpr (most >= 10) return convolve_tile<10, NV>(t);
      break;
    case 12:
      if constexpr (most >= 12) return convolve_tile<12, NV>(t);
  }
}
void convolve_span(int64_t vectors, int64_t span, const Tile& t) {
  if (vectors == 1) return convolve_span<1>(span, t);
  if (vectors == 2) return convolve_span<2>(span, t);
  if constexpr (kMostVectors == 4) return vectors == 3 ? convolve_span<3>(span, t) : convolve_span<4>(span, t);
}

template <class S>
struct SmallPass {
  const SmallConv& p;
  const int threads;
  const int64_t height, row;       // rows of a padded image, floats in one
  const int64_t channels;          // of the filter, whole blocks of 16
  const int64_t out_rows, pooled;  // of the output; rows and columns of results to one of it
  float* image = nullptr;          // [N][height][row]

  explicit SmallPass(const SmallConv& params)
      : p(params),
        threads(small_conv_threads(params)),
        height(p.H + 2 * p.pad_h),
        row((p.W + 2 * p.pad_w) * p.C),
        channels((p.O + 15) / 16 * 16),
        out_rows(p.pool == Pool::none ? p.OH : p.OH / 2),
        pooled(p.pool == Pool::none ? 1 : 2) {}

  void pad(int64_t at) const {
    float* const to = image + at * row;
    const int64_t n = at / height, y = at % height - p.pad_h, side = p.pad_w * p.C, inside = p.W * p.C;
    if (y < 0 || y >= p.H) {
      for (int64_t i = 0; i < row; ++i) to[i] = 0.f;
      return;
    }
    for (int64_t i = 0; i < side; ++i) to[i] = to[side + inside + i] = 0.f;
    load_row(to + side, static_cast<const S*>(p.input) + (n * p.H + y) * inside, inside);
  }

  // Row `at` of the output, [N * out_rows].
  void produce(int64_t at) const {
    const float* const from = image + (at / out_rows * height + at % out_rows * pooled * p.stride_h) * row;
    const int64_t vectors = channels / kF, groups = (vectors + kMostVectors - 1) / kMostVectors, step = p.stride_w * p.C;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = vectors * group / groups, count = vectors * (group + 1) / groups - first, c = first * kF;
      const int64_t tiles = (p.OW + span_of(count) - 1) / span_of(count), span = ((p.OW + tiles - 1) / tiles + 1) / 2 * 2;
      for (int64_t x = 0; x < p.OW; x += span) {
        alignas(64) float results[2][kMostTile];
        for (int64_t i = 0; i < pooled; ++i) {
          const float* const place = from + i * p.stride_h * row + x * step;
          convolve_span(count, span,
                        {place, p.weight + c, p.bias ? p.bias + c : nullptr, p.O - c, p.KH, p.KW * p.C, row, step, channels, results[i]});
        }
        finish(at, x, span, c, count, results[0], results[1]);
      }
    }
  }

  // Channels from c on of positions from x on.
  void finish(int64_t at, int64_t x, int64_t span, int64_t c, int64_t vectors, const float* from, const float* below) const {
    with_activation(p.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      const int64_t width = p.OW / pooled, first = x / pooled, rest = width - first, step = vectors * kF;
      const int64_t count = span / pooled < rest ? span / pooled : rest;
      S* const out = static_cast<S*>(p.output) + (at * width + first) * p.O + c;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < step && c + v < p.O; v += kF) {
          const auto value = [&](const float* row, int64_t place) { return activate<A>(load(row + place * step + v), p.slope); };
          vf y;
          if (p.pool == Pool::none) {
            y = value(from, i);
          } else {
            const vf window[4] = {value(from, 2 * i), value(from, 2 * i + 1), value(below, 2 * i), value(below, 2 * i + 1)};
            y = window[0];
            for (int j = 1; j < 4; ++j) {
              if (p.pool == Pool::average) y += window[j];
              else y = (window[j] > y) | (window[j] != window[j]) ? window[j] : y;  // NaN where any is
            }
            if (p.pool == Pool::average) y *= 0.25f;
          }
          put(out + i * p.O + v, y, p.O - c - v);
        }
    });
  }

  void work(const Team& team) const {
    team.deal(p.N * height, [&](int64_t at) { pad(at); });
    team.sync();
    team.deal(p.N * out_rows, [&](int64_t at) { produce(at); });
  }

  void run() {
    const int64_t size = p.N * height * row + kMostSpan * p.stride_w * p.C;  // the last tile reads beyond, to no effect
    image = static_cast<float*>(cpu::scratch(size * sizeof(float)));
    cpu::run_team(threads, [](const Team& team, void* pass) { static_cast<const SmallPass*>(pass)->work(team); }, this);
  }
};

}  // namespace

void small_conv(const SmallConv& p) {
  with_storage(p.dtype, [&](auto s) { SmallPass<decltype(s)>(p).run(); });
}

}  // namespace pyops::conv::PYOPS_ISA
