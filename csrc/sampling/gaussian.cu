// Sampling from diagonal normal distributions and its gradient (gaussian.h says what they compute).
//
//   mean, log_var, grad: rows [N, D], neighbouring columns;  z, grad_mean, grad_log_var [N, D];  parts [N, segments]  ->  kl [N]
//
// A warp has a segment of a row, up to 2048 columns: each lane four neighbouring ones at a time, which are a block of Philox's words, 16
// bytes of float32. Its divergence is summed across lanes; gaussian_merge adds a longer row's segments in their order. Logarithm, sine,
// cosine and exponential are Cephes' polynomials, the same on every machine.
// Floors: mean and log_var (and grad) read once, each result written once; some 65 operations an element.
// Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014; Salmon et al., 2011; Box and Muller, 1958.
#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "../common/philox.cuh"
#include "../conv/vectors.cuh"
#include "gaussian_cuda.h"

namespace pyops::sampling {
namespace {

using conv::Sum;
using conv::with_type;

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kStep = 4 * kWarpSize, kColumns = 16 * kStep;  // of a warp: at a time, and in all

struct GaussianParams {
  Gaussian p;
  float* parts;  // [N, segments]; kl where a row is one segment
  int64_t units, segments;
};

// Of normal x > 0.
PYOPS_DEVICE float logarithm(float x) {
  const int32_t u = static_cast<int32_t>(float_to_bits(x)), e = (u - 0x3f3504f3) >> 23;
  const float f = bits_to_float(static_cast<uint32_t>(u - e * (1 << 23))) - 1.f, n = static_cast<float>(e);
  float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return (f + ((f * f) * (f * p - 0.5f) - n * 2.12194440e-4f)) + n * 0.693359375f;
}

// Two normal numbers of two words; the angle is taken from the nearest quarter turn.
PYOPS_DEVICE void polar(uint32_t first, uint32_t second, float& x, float& y) {
  const float radius = sqrtf(-2.f * logarithm(static_cast<float>(first) * 0x1p-32f + 0x1p-33f));
  const uint32_t quarter = (second + 0x20000000u) >> 30;
  const float angle = static_cast<float>(static_cast<int32_t>(second - (quarter << 30))) * 1.46291807926715968e-9f, square = angle * angle;
  const float s = (square * -1.9515295891e-4f + 8.3321608736e-3f) * square - 1.6666654611e-1f;
  const float sin = s * square * angle + angle;
  const float c = (square * 2.443315711809948e-5f - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  const float cos = c * (square * square) + (1.f - 0.5f * square);
  const bool odd = (quarter & 1) != 0;
  const float a = odd ? sin : cos, b = odd ? cos : sin;
  x = radius * (((quarter + 1) & 2) != 0 ? -a : a);  // quarters 1 and 2
  y = radius * ((quarter & 2) != 0 ? -b : b);        // quarters 2 and 3
}

PYOPS_DEVICE float power_of_two(float n) { return bits_to_float(float_to_bits(n + 12583039.f) << 23); }  // -126 <= n <= 127

// e^x and e^x - 1; the second in two ways, since a large power of two swallows what a small one keeps. NaN stays NaN.
PYOPS_DEVICE void exponentials(float x, float& exp, float& less_one) {
  const float y = x < -104.f ? -104.f : x > 89.f ? 89.f : x;
  const float n = y * 1.44269504f + 12582912.f - 12582912.f;  // 1.5 * 2^23: the sum's last place is one
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float q = p * (r * r) + r;
  const float low = n * 0.5f - 0.25f + 12582912.f - 12582912.f;  // two factors: 128 and subnormal powers have no float
  exp = (1.f + q) * power_of_two(low) * power_of_two(n - low);
  const float small = power_of_two(n < -126.f ? -126.f : n > 3.f ? 3.f : n);
  less_one = n >= 3.f ? exp - 1.f : q * small + (small - 1.f);
}

// Four columns, in one piece where rows go in pieces of four (kWhole); of others, zeros where there are none.
template <class T, bool kWhole>
PYOPS_DEVICE void load_four(const void* rows, int64_t at, int64_t count, float (&to)[4]) {
  const T* from = static_cast<const T*>(rows) + at;
  if constexpr (kWhole) conv::load_channels<T, 4>(from, to);
  else {
    PYOPS_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = i < count ? to_float(from[i]) : 0.f;
  }
}
template <class T, bool kWhole>
PYOPS_DEVICE void store_four(void* rows, int64_t at, int64_t count, const float (&from)[4]) {
  T* to = static_cast<T*>(rows) + at;
  if constexpr (kWhole) conv::store_channels<T, 4>(to, from);
  else {
    PYOPS_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = from_float<T>(from[i]);
  }
}

// The warp's segment of a row.
struct Segment {
  int64_t unit, row, first, end;
  bool active;
};
PYOPS_DEVICE Segment segment_of(const GaussianParams& params) {
  Segment me;
  me.unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  me.active = me.unit < params.units;
  me.row = me.unit / params.segments;
  const int64_t begin = me.unit % params.segments * kColumns;
  me.end = params.p.D - begin < kColumns ? params.p.D : begin + kColumns;
  me.first = begin + 4 * (threadIdx.x % kWarpSize);
  return me;
}

PYOPS_DEVICE void normals(const Gaussian& p, int64_t row, int64_t column, float (&eps)[4]) {
  const uint4 words = philox(static_cast<uint64_t>(*p.seed), static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), 0u, kNormals);
  polar(words.x, words.y, eps[0], eps[1]), polar(words.z, words.w, eps[2], eps[3]);
}

template <class T, bool kWhole>
PYOPS_KERNEL(kThreads)
gaussian_sample(GaussianParams params) {
  const Gaussian& p = params.p;
  const Segment me = segment_of(params);
  float total = 0.f;
  if (me.active) {
    PYOPS_NO_UNROLL
    for (int64_t i = me.first; i < me.end; i += kStep) {
      float mean[4], log_var[4], eps[4], z[4];
      load_four<T, kWhole>(p.mean, me.row * p.mean_row + i, me.end - i, mean);
      load_four<T, kWhole>(p.log_var, me.row * p.log_var_row + i, me.end - i, log_var);
      normals(p, me.row, i, eps);
      PYOPS_UNROLL
      for (int k = 0; k < 4; ++k) {
        float deviation, e;
        exponentials(log_var[k] * 0.5f, deviation, e);
        z[k] = mean[k] + deviation * eps[k];
        total += mean[k] * mean[k] + (e * (e + 2.f) - log_var[k]);  // zero where there is no column
      }
      store_four<T, kWhole>(p.z, me.row * p.D + i, me.end - i, z);
    }
  }
  PYOPS_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
  if (me.active && threadIdx.x % kWarpSize == 0) params.parts[me.unit] = 0.5f * total;
}

template <class T, bool kWhole>
PYOPS_KERNEL(kThreads)
gaussian_sample_gradient(GaussianParams params) {
  const Gaussian& p = params.p;
  const Segment me = segment_of(params);
  if (!me.active) return;
  const float share = p.grad_kl ? p.grad_kl[me.row] : 0.f;
  PYOPS_NO_UNROLL
  for (int64_t i = me.first; i < me.end; i += kStep) {
    float log_var[4], deviation[4], e[4], of_mean[4], of_log_var[4];
    conv::clear(of_mean), conv::clear(of_log_var);
    load_four<T, kWhole>(p.log_var, me.row * p.log_var_row + i, me.end - i, log_var);
    PYOPS_UNROLL
    for (int k = 0; k < 4; ++k) exponentials(log_var[k] * 0.5f, deviation[k], e[k]);
    if (p.grad) {
      float eps[4];
      load_four<T, kWhole>(p.grad, me.row * p.grad_row + i, me.end - i, of_mean);
      normals(p, me.row, i, eps);
      PYOPS_UNROLL
      for (int k = 0; k < 4; ++k) of_log_var[k] = of_mean[k] * deviation[k] * eps[k];
    }
    if (p.grad_kl) {
      float mean[4];
      load_four<T, kWhole>(p.mean, me.row * p.mean_row + i, me.end - i, mean);
      PYOPS_UNROLL
      for (int k = 0; k < 4; ++k) of_mean[k] += share * mean[k], of_log_var[k] += share * (e[k] * (e[k] + 2.f));
    }
    PYOPS_UNROLL
    for (int k = 0; k < 4; ++k) of_log_var[k] *= 0.5f;
    store_four<T, kWhole>(p.grad_mean, me.row * p.D + i, me.end - i, of_mean);
    store_four<T, kWhole>(p.grad_log_var, me.row * p.D + i, me.end - i, of_log_var);
  }
}

PYOPS_KERNEL(kThreads)
gaussian_merge(GaussianParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= params.p.N) return;
  Sum sum;
  for (int64_t i = 0; i < params.segments; ++i) sum.add(params.parts[row * params.segments + i]);
  params.p.kl[row] = sum.total;
}

int64_t segments_of(const Gaussian& p) { return p.D > kColumns ? ceil_div(p.D, int64_t{kColumns}) : 1; }

GaussianParams params_of(const Gaussian& p, void* workspace) {
  const int64_t segments = segments_of(p);
  if (ceil_div(p.N * segments, int64_t{kWarps}) > INT32_MAX) throw std::runtime_error("gaussian_sample: too much for one launch");
  return {p, segments == 1 ? p.kl : static_cast<float*>(workspace), p.N * segments, segments};
}

LaunchShape shape_of(int64_t count, int each) { return {dim3(static_cast<unsigned>(ceil_div(count, int64_t{each}))), kThreads, 0}; }

// Whether rows begin and end with pieces of four.
bool is_whole(const Gaussian& p, int element) {
  const bool rows = p.mean_row % 4 == 0 && p.log_var_row % 4 == 0 && (!p.grad || p.grad_row % 4 == 0);
  return rows && conv::vectors_fit(p.D, 4, element, {p.mean, p.log_var, p.grad, p.z, p.grad_mean, p.grad_log_var});
}

// Calls f(a value of the storage type, whether rows go in pieces of four as a constant).
template <class F>
void with_rows(const Gaussian& p, F&& f) {
  with_type(p.dtype, [&](auto type) {
    if (is_whole(p, sizeof(type))) f(type, std::true_type{});
    else f(type, std::false_type{});
  });
}

}  // namespace

size_t gaussian_workspace(const Gaussian& p) { return segments_of(p) == 1 ? 0 : sizeof(float) * static_cast<size_t>(p.N * segments_of(p)); }

void gaussian(const Gaussian& p, void* workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  const GaussianParams params = params_of(p, workspace);
  with_rows(p, [&](auto type, auto whole) {
    using T = decltype(type);
    launch("gaussian_sample", gaussian_sample<T, decltype(whole)::value>, shape_of(params.units, kWarps), stream, params);
  });
  if (params.segments > 1) launch("gaussian_merge", gaussian_merge, shape_of(p.N, kThreads), stream, params);
}

void gaussian_gradient(const Gaussian& p, cudaStream_t stream) {
  if (p.N * p.D == 0) return;
  const GaussianParams params = params_of(p, nullptr);
  with_rows(p, [&](auto type, auto whole) {
    using T = decltype(type);
    launch("gaussian_sample_gradient", gaussian_sample_gradient<T, decltype(whole)::value>, shape_of(params.units, kWarps), stream, params);
  });
}

#define PYOPS_GAUSSIAN_KERNELS(T)                                                            \
  PYOPS_KERNEL_INFO(gaussian_sample, T, true), PYOPS_KERNEL_INFO(gaussian_sample, T, false), \
      PYOPS_KERNEL_INFO(gaussian_sample_gradient, T, true), PYOPS_KERNEL_INFO(gaussian_sample_gradient, T, false)

static const KernelRegistration registration({PYOPS_GAUSSIAN_KERNELS(float),
                                              PYOPS_GAUSSIAN_KERNELS(bf16),
                                              PYOPS_GAUSSIAN_KERNELS(f16),
                                              {"gaussian_merge", reinterpret_cast<const void*>(&gaussian_merge)}});

}  // namespace pyops::sampling
