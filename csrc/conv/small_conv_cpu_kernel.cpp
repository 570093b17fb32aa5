// The convolution of small images on the CPU (small_conv.h says what it computes), compiled once per instruction set.
//
// The images are copied once as floats with their zeros around, so that no tap looks at a border. Then an output row at a time (two with
// pooling): kSpan positions by 16 output channels stay in registers while the taps pass, one load of the filter and kSpan broadcasts of
// the image each. A row of a filter is one run of KW * C floats of the image; every kRun taps or so a new sum begins, and the bias comes
// last: small sums, small errors. Floors: N*OH*OW*O*C*KH*KW products over the machine's, which a broadcast each halves; the copy is a C-th
// of a channel's taps.
#include "depthwise_cpu_pass.h"
#include "small_conv_cpu.h"

namespace pyops::conv::PYOPS_ISA {
namespace {

constexpr int kSpan = 6;     // positions
constexpr int64_t kRun = 8;  // taps
constexpr int kVectors = 16 / kF;

template <class S>
struct SmallPass {
  const SmallConv& p;
  const int threads;
  const int64_t height, row;                // rows of a padded image, floats in one
  const int64_t blocks, columns;            // of 16 channels; positions in a row of results
  float *image = nullptr, *rows = nullptr;  // [N][height][row]; [threads][2][columns][blocks * 16]

  explicit SmallPass(const SmallConv& params)
      : p(params),
        threads(small_conv_threads(params)),
        height(p.H + 2 * p.pad_h),
        row((p.W + 2 * p.pad_w) * p.C),
        blocks((p.O + 15) / 16),
        columns((p.OW + kSpan - 1) / kSpan * kSpan) {}

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

  // A row of results before the activation, [columns][blocks * 16].
  void convolve(int64_t n, int64_t oy, float* to) const {
    const int64_t length = p.KW * p.C, step = p.stride_w * p.C;
    for (int64_t ox = 0; ox < p.OW; ox += kSpan) {
      int64_t place[kSpan];
      for (int i = 0; i < kSpan; ++i) place[i] = (ox + i < p.OW ? ox + i : p.OW - 1) * step;
      for (int64_t block = 0; block < blocks; ++block) {
        vf sums[kSpan][kVectors] = {}, part[kSpan][kVectors] = {};
        const auto flush = [&] {
          for (int i = 0; i < kSpan; ++i)
            for (int v = 0; v < kVectors; ++v) sums[i][v] += part[i][v], part[i][v] = vf{};
        };
        int64_t taken = 0;
        for (int64_t ky = 0; ky < p.KH; ++ky) {
          const float* const from = image + (n * height + oy * p.stride_h + ky) * row;
          const float* weight = p.weight + (ky * length * blocks + block) * 16;
          for (int64_t first = 0; first < length; first += kRun) {
            const int64_t last = first + kRun < length ? first + kRun : length;
            for (int64_t k = first; k < last; ++k, weight += blocks * 16) {
              vf taps[kVectors];
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) taps[v] = load(weight + v * kF);
#pragma GCC unroll 8
              for (int i = 0; i < kSpan; ++i) {
                const vf x = vf{} + from[place[i] + k];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) part[i][v] += x * taps[v];
              }
            }
            taken += last - first;
            if (taken >= kRun) flush(), taken = 0;
          }
        }
        flush();
        for (int v = 0; v < kVectors; ++v) {
          const int64_t c = block * 16 + v * kF;
          const vf bias = p.bias ? get(p.bias + c, p.O - c) : vf{};
          for (int i = 0; i < kSpan; ++i) store(to + ((ox + i) * blocks + block) * 16 + v * kF, sums[i][v] + bias);
        }
      }
    }
  }

  void finish(int64_t at, const float* from) const {
    with_activation(p.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      const int64_t channels = blocks * 16, below = columns * channels;
      const int64_t width = p.pool == Pool::none ? p.OW : p.OW / 2;
      S* const out = static_cast<S*>(p.output) + at * width * p.O;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < p.O; c += kF) {
          const auto value = [&](int64_t place) { return activate<A>(load(from + place + c), p.slope); };
          vf y;
          if (p.pool == Pool::none) {
            y = value(x * channels);
          } else {
            const int64_t left = 2 * x * channels, right = left + channels;
            const vf window[4] = {value(left), value(right), value(below + left), value(below + right)};
            y = window[0];
            for (int i = 1; i < 4; ++i) {
              if (p.pool == Pool::average) y += window[i];
              else y = (window[i] > y) | (window[i] != window[i]) ? window[i] : y;  // NaN where any is
            }
            if (p.pool == Pool::average) y *= 0.25f;
          }
          put(out + x * p.O + c, y, p.O - c);
        }
    });
  }

  void work(const Team& team) const {
    const auto share = [&](int64_t count, const auto& f) {
      for (int64_t i = count * team.rank / team.size; i < count * (team.rank + 1) / team.size; ++i) f(i);
    };
    share(p.N * height, [&](int64_t at) { pad(at); });
    team.sync();
    const int64_t many = p.pool == Pool::none ? 1 : 2, out_rows = p.OH / many, size = columns * blocks * 16;
    float* const results = rows + team.rank * 2 * size;
    share(p.N * out_rows, [&](int64_t at) {
      for (int64_t i = 0; i < many; ++i) convolve(at / out_rows, at % out_rows * many + i, results + i * size);
      finish(at, results);
    });
  }

  void run() {
    Layout size{nullptr};
    lay_out(size);
    Layout at{static_cast<char*>(cpu::scratch(size.bytes))};
    lay_out(at);
    cpu::run_team(threads, [](const Team& team, void* pass) { static_cast<const SmallPass*>(pass)->work(team); }, this);
  }
  void lay_out(Layout& at) {
    image = at.take<float>(p.N * height * row);
    rows = at.take<float>(threads * 2 * columns * blocks * 16);
  }
};

}  // namespace

void small_conv(const SmallConv& p) {
  with_storage(p.dtype, [&](auto s) { SmallPass<decltype(s)>(p).run(); });
}

}  // namespace pyops::conv::PYOPS_ISA
