// Local response normalisation over channels and its gradient.
//
//   d[c] = k + share * sum of a[j]^2 over c's window,  output = a * d^-beta                             share = alpha / size
//   output = grad * d^-beta - 2*share*beta * a * sum of grad[j]*a[j]*d[j]^(-beta-1) over the windows that hold c
//
//   input, grad, output: rows [N, P, C] or planes [N, C, P];  shares [N, P, C] or [N, C, P] of float, for windows of any size alone
//
// Windows of five channels (AlexNet's and GoogLeNet's) have kernels of their own: a thread has K neighbouring channels in registers with
// what their windows reach on either side (2 channels, in the gradient 4), in rows a vector of 16 bytes, in planes 8 channels; each window
// is summed anew. Any other window, and rows that do not go in vectors: a thread an element, the window read from L1; the gradient in
// two passes, with grad*a*d^(-beta-1) in workspace between them. Tiling: norms.cuh.
// Floors: input and grad read once, output written once; about 25 float operations an element, most of them the power's.
// Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
#include "norms.cuh"

namespace pyops::norm {
namespace {

constexpr int kWindow = 5, kReach = kWindow / 2;  // as far on either side

template <class T, bool kRows>
constexpr int kPiece = kRows ? 16 / sizeof(T) : 8;

struct LrnParams {
  const void *input, *grad;
  void* output;
  float* shares;
  NormCut cut;
  int before, after;  // the window's channels on either side
  float share, beta, k, slope;
  bool relu;
};

// d^-beta. The exponents that papers use go by roots, which cost less than a general power.
template <class T>
PYOPS_DEVICE float inverse_power(float d, float beta) {
  const auto inverse = [](float x) {
    if constexpr (is_16bit<T>) return fast_divide(1.f, x);
    else return 1.f / x;
  };
  if (beta == 0.75f) {
    const float root = sqrtf(d);
    return inverse(root * sqrtf(root));
  }
  if (beta == 0.5f) return inverse(sqrtf(d));
  if (beta == 1.f) return inverse(d);
  if constexpr (is_16bit<T>) return fast_power(d, -beta);
  else return exact_power(d, -beta);
}

PYOPS_DEVICE float rectified(const LrnParams& p, float x) { return p.relu && x < 0.f ? 0.f : x; }

// Channels first - kSide .. first + K + kSide - 1 of a position; zeros where there are none.
template <class T, bool kRows, int K, int kSide>
PYOPS_DEVICE void load_piece(const NormPlace& me, int64_t C, const void* image, float (&to)[K + 2 * kSide]) {
  const T* const at = static_cast<const T*>(image) + me.at;
  if constexpr (kRows) {
    float left[kSide], own[K], right[kSide];
    conv::load_or_zero<T, kSide>(me.channel > 0, at - kSide, left);
    conv::load_channels<T, K>(at, own);
    conv::load_or_zero<T, kSide>(me.channel + K < C, at + K, right);
    PYOPS_UNROLL
    for (int i = 0; i < K; ++i) to[kSide + i] = own[i];
    PYOPS_UNROLL
    for (int i = 0; i < kSide; ++i) to[i] = left[i], to[kSide + K + i] = right[i];
  } else {
    PYOPS_UNROLL
    for (int i = 0; i < K + 2 * kSide; ++i) {
      const int64_t channel = me.channel - kSide + i;
      to[i] = channel >= 0 && channel < C ? to_float(at[(i - kSide) * me.step]) : 0.f;
    }
  }
}

template <class T, bool kRows, int K>
PYOPS_DEVICE void store_piece(const NormPlace& me, int64_t C, void* image, const float (&from)[K]) {
  T* const at = static_cast<T*>(image) + me.at;
  if constexpr (kRows) conv::store_channels<T, K>(at, from);
  else {
    PYOPS_UNROLL
    for (int i = 0; i < K; ++i)
      if (me.channel + i < C) at[i * me.step] = from_float<T>(from[i]);
  }
}

// The sum over the window of five that begins at i.
template <int N>
PYOPS_DEVICE float window_sum(const float (&values)[N], int i) {
  return (values[i] + values[i + 1]) + (values[i + 2] + values[i + 3]) + values[i + 4];
}

template <class T, bool kRows>
PYOPS_KERNEL(kNormThreads)
lrn_five(LrnParams p) {
  constexpr int K = kPiece<T, kRows>;
  const NormPlace me = norm_place<K>(p.cut);
  if (!me.active) return;
  float a[K + 2 * kReach], squares[K + 2 * kReach], y[K];
  load_piece<T, kRows, K, kReach>(me, p.cut.C, p.input, a);
  PYOPS_UNROLL
  for (int i = 0; i < K + 2 * kReach; ++i) a[i] = rectified(p, a[i]), squares[i] = a[i] * a[i];
  PYOPS_UNROLL
  for (int i = 0; i < K; ++i) y[i] = a[i + kReach] * inverse_power<T>(p.k + p.share * window_sum(squares, i), p.beta);
  store_piece<T, kRows, K>(me, p.cut.C, p.output, y);
}

template <class T, bool kRows>
PYOPS_KERNEL(kNormThreads)
lrn_five_gradient(LrnParams p) {
  constexpr int K = kPiece<T, kRows>, kOutputs = K + 2 * kReach;  // outputs whose windows hold one of the channels
  const NormPlace me = norm_place<K>(p.cut);
  if (!me.active) return;
  float x[K + 4 * kReach], g[kOutputs], squares[K + 4 * kReach], shares[kOutputs], power[kOutputs];
  load_piece<T, kRows, K, 2 * kReach>(me, p.cut.C, p.input, x);
  load_piece<T, kRows, K, kReach>(me, p.cut.C, p.grad, g);
  PYOPS_UNROLL
  for (int i = 0; i < K + 4 * kReach; ++i) {
    const float a = rectified(p, x[i]);
    squares[i] = a * a;
  }
  PYOPS_UNROLL
  for (int i = 0; i < kOutputs; ++i) {
    const float d = p.k + p.share * window_sum(squares, i);
    const bool exists = me.channel - kReach + i >= 0 && me.channel - kReach + i < p.cut.C;  // k may be zero
    power[i] = inverse_power<T>(d, p.beta);
    shares[i] = exists ? g[i] * rectified(p, x[i + kReach]) * power[i] / d : 0.f;
  }
  float dx[K];
  PYOPS_UNROLL
  for (int i = 0; i < K; ++i) {
    const float own = x[i + 2 * kReach];
    dx[i] = g[i + kReach] * power[i + kReach] - p.slope * own * window_sum(shares, i);
    if (p.relu && !(own > 0.f)) dx[i] = 0.f;
  }
  store_piece<T, kRows, K>(me, p.cut.C, p.output, dx);
}

// The sum of term(offset from the thread's own element) over the channels before and after it that exist.
template <class F>
PYOPS_DEVICE float any_window(const LrnParams& p, const NormPlace& me, int before, int after, F&& term) {
  const int64_t last = p.cut.C - 1 - me.channel;
  const int from = me.channel < before ? -static_cast<int>(me.channel) : -before, to = last < after ? static_cast<int>(last) : after;
  Sum sum;
  for (int i = from; i <= to; ++i) sum.add(term(i * me.step));
  return sum.total;
}

template <class T>
PYOPS_DEVICE float any_divisor(const LrnParams& p, const NormPlace& me) {
  const T* const at = static_cast<const T*>(p.input) + me.at;
  return p.k + p.share * any_window(p, me, p.before, p.after, [&](int64_t i) {
                 const float a = rectified(p, to_float(at[i]));
                 return a * a;
               });
}

template <class T>
PYOPS_KERNEL(kNormThreads)
lrn_any(LrnParams p) {
  const NormPlace me = norm_place<1>(p.cut);
  if (!me.active) return;
  const float a = rectified(p, to_float(static_cast<const T*>(p.input)[me.at]));
  static_cast<T*>(p.output)[me.at] = from_float<T>(a * inverse_power<T>(any_divisor<T>(p, me), p.beta));
}

template <class T>
PYOPS_KERNEL(kNormThreads)
lrn_any_shares(LrnParams p) {
  const NormPlace me = norm_place<1>(p.cut);
  if (!me.active) return;
  const float a = rectified(p, to_float(static_cast<const T*>(p.input)[me.at])), g = to_float(static_cast<const T*>(p.grad)[me.at]);
  const float d = any_divisor<T>(p, me);
  p.shares[me.at] = g * a * inverse_power<T>(d, p.beta) / d;
}

template <class T>
PYOPS_KERNEL(kNormThreads)
lrn_any_gradient(LrnParams p) {
  const NormPlace me = norm_place<1>(p.cut);
  if (!me.active) return;
  const float x = to_float(static_cast<const T*>(p.input)[me.at]), g = to_float(static_cast<const T*>(p.grad)[me.at]);
  const float* const at = p.shares + me.at;
  const float shares = any_window(p, me, p.after, p.before, [&](int64_t i) { return at[i]; });
  const float dx = g * inverse_power<T>(any_divisor<T>(p, me), p.beta) - p.slope * x * shares;
  static_cast<T*>(p.output)[me.at] = from_float<T>(p.relu && !(x > 0.f) ? 0.f : dx);
}

bool is_five(const LocalResponse& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2;
  return p.size == kWindow && (!p.rows || vectors_fit(p.C, 16 / element, element, {p.input, p.grad, p.output}));
}

LrnParams lrn_params(const LocalResponse& p, int K) {
  LrnParams params{p.input, p.grad, p.output, nullptr, cut_norm(p.N, p.P, p.C, p.rows != 0, K)};
  const int64_t most = p.C - 1;  // farther there are no channels
  params.before = static_cast<int>(p.size / 2 < most ? p.size / 2 : most);
  params.after = static_cast<int>((p.size - 1) / 2 < most ? (p.size - 1) / 2 : most);
  params.share = p.alpha / static_cast<float>(p.size), params.slope = 2.f * params.share * p.beta;
  params.beta = p.beta, params.k = p.k, params.relu = p.relu != 0;
  return params;
}

// Calls f(a value of the storage type, whether rows as a constant).
template <class F>
void with_layout(const LocalResponse& p, F&& f) {
  with_type(p.dtype, [&](auto type) {
    if (p.rows) f(type, std::true_type{});
    else f(type, std::false_type{});
  });
}

}  // namespace

void lrn(const LocalResponse& p, cudaStream_t stream) {
  if (p.N * p.P * p.C == 0) return;
  with_layout(p, [&](auto type, auto rows) {
    using T = decltype(type);
    constexpr bool kRows = decltype(rows)::value;
    const LrnParams params = lrn_params(p, is_five(p) ? kPiece<T, kRows> : 1);
    if (is_five(p)) launch("lrn_five", lrn_five<T, kRows>, norm_shape(params.cut), stream, params);
    else launch("lrn_any", lrn_any<T>, norm_shape(params.cut), stream, params);
  });
}

size_t lrn_gradient_workspace(const LocalResponse& p) { return is_five(p) ? 0 : sizeof(float) * static_cast<size_t>(p.N * p.P * p.C); }

void lrn_gradient(const LocalResponse& p, void* workspace, cudaStream_t stream) {
  if (p.N * p.P * p.C == 0) return;
  with_layout(p, [&](auto type, auto rows) {
    using T = decltype(type);
    constexpr bool kRows = decltype(rows)::value;
    LrnParams params = lrn_params(p, is_five(p) ? kPiece<T, kRows> : 1);
    const LaunchShape shape = norm_shape(params.cut);
    if (is_five(p)) return launch("lrn_five_gradient", lrn_five_gradient<T, kRows>, shape, stream, params);
    params.shares = static_cast<float*>(workspace);
    launch("lrn_any_shares", lrn_any_shares<T>, shape, stream, params);
    launch("lrn_any_gradient", lrn_any_gradient<T>, shape, stream, params);
  });
}

#define PYOPS_LRN_KERNELS(T)                                                                                                  \
  PYOPS_KERNEL_INFO(lrn_five, T, true), PYOPS_KERNEL_INFO(lrn_five, T, false), PYOPS_KERNEL_INFO(lrn_five_gradient, T, true), \
      PYOPS_KERNEL_INFO(lrn_five_gradient, T, false), PYOPS_KERNEL_INFO(lrn_any, T), PYOPS_KERNEL_INFO(lrn_any_shares, T),    \
      PYOPS_KERNEL_INFO(lrn_any_gradient, T)

static const KernelRegistration registration({PYOPS_LRN_KERNELS(float), PYOPS_LRN_KERNELS(bf16), PYOPS_LRN_KERNELS(f16)});

}  // namespace pyops::norm
