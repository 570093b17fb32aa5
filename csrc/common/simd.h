// Vectors, conversions, transposes and activations of the CPU kernels, written once with GCC/Clang vector extensions and
// compiled per instruction set: 4, 8 or 16 floats wide. Everything has internal linkage inside a namespace of its
// instruction set, and nothing from std:: is called: a merged AVX-512 instance would crash an older machine.
//
// Activations are accurate to 1-2 units in the last place in relative terms, saturate, propagate NaN, and take infinities
// to their limits.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(PYOPS_ISA)
#define PYOPS_ISA baseline
#endif

namespace pyops::cpu::PYOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVecBytes)));
  typedef float U __attribute__((vector_size(kVecBytes), aligned(1), may_alias));
  typedef int32_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int N = kVecBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVecBytes)));
  typedef double U __attribute__((vector_size(kVecBytes), aligned(1), may_alias));
  typedef int64_t I __attribute__((vector_size(kVecBytes)));
  static constexpr int N = kVecBytes / 8;
};
template <class T>
using Vec = typename Simd<T>::V;
using vf = Vec<float>;
using vi = Simd<float>::I;
constexpr int kF = Simd<float>::N;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Bytes of one type read as another (a copy that the compiler makes free).
template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ------------------------------------------------------------------------------------------------- narrow types

inline float widen(bf16 x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(f16 x) {  // shift into place, then scale by 2^112: exact for every subnormal
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t scaled = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  return bits<float>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled) | sign);
}

template <class S>
inline S narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {  // round to nearest even
  const uint32_t u = bits<uint32_t>(x);
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu;
  // Adding a power of two whose last place is f16's last place makes the float unit round to nearest even.
  const float a = bits<float>(magnitude);
  const uint32_t exponent = magnitude & 0x7f800000u;
  const float anchor = bits<float>((exponent < 0x38800000u ? 0x38800000u : exponent) + (13u << 23));
  const uint32_t fraction = bits<uint32_t>(a + anchor) - bits<uint32_t>(anchor);
  const uint32_t finite = (exponent < 0x38800000u ? 0u : ((exponent - 0x38800000u) >> 13)) + fraction;
  const uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  return {static_cast<uint16_t>(half | ((u >> 16) & 0x8000u))};
}
template <class S>
inline S narrow(double x) {
  return x;
}

// One vector of T from storage type S (lossless).
inline vf load_as(const float* p, float) { return load(p); }
inline Vec<double> load_as(const double* p, double) { return load(p); }
inline vf load_as(const bf16* p, float) {
  typedef uint16_t Half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
  return bits<vf>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), vi) << 16);
}
inline vf load_as(const f16* p, float) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kF; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

inline void store_as(float* p, vf v) { store(p, v); }
inline void store_as(double* p, Vec<double> v) { store(p, v); }
inline void store_as(bf16* p, vf v) {
  typedef uint16_t Half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
  const vi u = bits<vi>(v);
  const vi rounded = ((u + 0x7fff + ((u >> 16) & 1)) >> 16) & 0xffff;
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(v == v ? rounded : vi{} + 0x7fc0, Half);
}
inline void store_as(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < kF; ++i) p[i] = narrow<f16>(v[i]);
#endif
}

// The first n < kF lanes; load_part: the others are zero.
template <class S>
inline vf load_part(const S* p, int n) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return _mm512_maskz_loadu_ps(mask, p);
  const __m256i narrow = _mm256_maskz_loadu_epi16(mask, p);
  if constexpr (std::is_same_v<S, bf16>) return bits<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  else return _mm512_cvtph_ps(narrow);
#else
  S buffer[kF] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load_as(buffer, float{});
#endif
}
template <class S>
inline void store_part(S* p, vf v, int n) {
  S buffer[kF];
  store_as(buffer, v);
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, mask, v);
  else _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
#else
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// n elements from S to T; both may be any storage or compute type, at least one of them the compute type.
template <class T, class S>
inline void load_row(T* to, const S* from, int64_t n) {
  int64_t i = 0;
  for (; i + Simd<T>::N <= n; i += Simd<T>::N) store(to + i, load_as(from + i, T{}));
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <class S, class T>
inline void store_row(S* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + Simd<T>::N <= n; i += Simd<T>::N) store_as(to + i, load(from + i));
  for (; i < n; ++i) to[i] = narrow<S>(from[i]);
}

// ---------------------------------------------------------------------------------------------------- shuffles

template <class V, int... I>
inline V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef decltype(a < b) M;
  return __builtin_shuffle(a, b, M{I...});
#endif
}
// Lanes of a and b in turn, from the low (Half = 0) or the high (Half = 1) half of each.
template <int Half, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return shuffle(a, b, std::integer_sequence<int, (I % 2 * N + I / 2 + Half * N / 2)...>{});
}
// N x N: log2(N) perfect shuffles.
template <class T>
inline void transpose(Vec<T> (&v)[Simd<T>::N]) {
  constexpr int N = Simd<T>::N;
  using Lanes = std::make_integer_sequence<int, N>;
#pragma GCC unroll 4
  for (int stage = 1; stage < N; stage *= 2) {
    Vec<T> t[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      t[2 * i] = interleave<0>(v[i], v[i + N / 2], Lanes{});
      t[2 * i + 1] = interleave<1>(v[i], v[i + N / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = t[i];
  }
}

// The four sums over the lanes of four vectors.
template <int... I>
inline void sum_lanes(const vf (&v)[4], float (&sums)[4], std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  using Even = std::integer_sequence<int, (I % 2 * N + I / 2 * 2)...>;             // a0 b0 a2 b2 ..
  using Odd = std::integer_sequence<int, (I % 2 * N + I / 2 * 2 + 1)...>;          // a1 b1 a3 b3 ..
  using Low = std::integer_sequence<int, (I / 2 % 2 * N + I / 4 * 4 + I % 2)...>;  // a0 a1 b0 b1 a4 a5 ..
  using High = std::integer_sequence<int, (I / 2 % 2 * N + I / 4 * 4 + 2 + I % 2)...>;
  const vf p = shuffle(v[0], v[1], Even{}) + shuffle(v[0], v[1], Odd{});
  const vf q = shuffle(v[2], v[3], Even{}) + shuffle(v[2], v[3], Odd{});
  vf s = shuffle(p, q, Low{}) + shuffle(p, q, High{});
  if constexpr (N >= 16) s += shuffle(s, s, std::integer_sequence<int, ((I + 8) % N)...>{});
  if constexpr (N >= 8) s += shuffle(s, s, std::integer_sequence<int, ((I + 4) % N)...>{});
  for (int i = 0; i < 4; ++i) sums[i] = s[i];
}
inline void sum_lanes(const vf (&v)[4], float (&sums)[4]) { sum_lanes(v, sums, std::make_integer_sequence<int, kF>{}); }

// -------------------------------------------------------------------------------------------------- activations

// y = n ln 2 + r, |r| <= ln 2 / 2, for |y| < 2^21: n as float, and q = expm1(r) (Cephes' polynomial, 2^-26 relative).
inline vf expm1_reduced(vf y, vf& n) {
  const vf shifted = y * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum's last place is one
  n = shifted - 12582912.f;
  vf r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}
inline vf power_of_two(vf n) { return bits<vf>(bits<vi>(n + 12583039.f) << 23); }  // -126 <= n <= 127: n + 127 in the low bits

// NaN stays NaN (the instructions return their second operand then). Half the latency of a compare and a blend.
inline vf at_most(vf x, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_set1_ps(bound), x);
#elif defined(__x86_64__)
  return _mm_min_ps(_mm_set1_ps(bound), x);
#else
  return x > bound ? vf{} + bound : x;
#endif
}

inline vf exp_neg(vf x) {  // e^-x; infinity above 88.72, not below e^-87 (callers add one)
  vf n;
  const vf y = at_most(-at_most(x, 87.f), 89.f);
  const vf q = expm1_reduced(y, n);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(1.f + q, n);
#else
  const vf low = n * 0.5f - 0.25f + 12582912.f - 12582912.f;  // two factors: n = 128 has no float
  return (1.f + q) * power_of_two(low) * power_of_two(n - low);
#endif
}
inline vf with_sign(vf a, vf x) { return bits<vf>((bits<vi>(a) & INT32_MAX) | (bits<vi>(x) & INT32_MIN)); }

// |tanh(x)| = top / bottom: Cephes' x + x^3 P(x^2) over one below 0.625, (1 - t) / (1 + t) with t = e^-2|x| above, where
// nothing cancels. (-m / (2 + m) with m = expm1(-2|x|) needs no choice but has 1.3 times the error of eager's tanh.)
inline void tanh_parts(vf x, vf& top, vf& bottom) {
  const vf magnitude = bits<vf>(bits<vi>(x) & INT32_MAX);
  vf n;
  const vf q = expm1_reduced(-at_most(magnitude + magnitude, 40.f), n);
  const vf t = (1.f + q) * power_of_two(n);
  const vf z = x * x;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  top = magnitude < 0.625f ? p * z * magnitude + magnitude : 1.f - t;
  bottom = magnitude < 0.625f ? vf{} + 1.f : 1.f + t;
}

inline vf sigmoid(vf x) { return 1.f / (1.f + exp_neg(x)); }
inline vf tanh(vf x) {
  vf top, bottom;
  tanh_parts(x, top, bottom);
  return with_sign(top / bottom, x);
}
// sigmoid(a) * tanh(b) with one division.
inline vf sigmoid_tanh(vf a, vf b) {
  vf top, bottom;
  tanh_parts(b, top, bottom);
  return with_sign(top / ((1.f + exp_neg(a)) * bottom), b);
}

// Two polynomials (N. Juffa's): x + x P(x^2) below 0.92, 1 - e^-Q(|x|) above.
inline vf erf(vf x) {
  const vf magnitude = at_most(bits<vf>(bits<vi>(x) & INT32_MAX), 4.f), square = magnitude * magnitude;
  vf p = square * -5.96761703e-4f + 4.99119423e-3f;
  p = p * square - 2.67681349e-2f;
  p = p * square + 1.12819925e-1f;
  p = p * square - 3.76125336e-1f;
  p = p * square + 1.28379166e-1f;
  vf q = magnitude * 1.72853470e-5f - 3.83197126e-4f;
  q = q * square + (magnitude * 3.88396438e-3f - 2.42546219e-2f);
  q = q * magnitude + 1.06777877e-1f;
  q = q * magnitude + 6.34846687e-1f;
  q = q * magnitude + 1.28717512e-1f;
  q = q * magnitude + magnitude;
  return magnitude < 0.927734375f ? x * p + x : with_sign(1.f - exp_neg(q), x);
}

inline vf sqrt(vf x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < kF; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x^y for one y: x = 2^e m with m around one, y = head + tail with head * e exact, so that only y log2(m) and tail * e are rounded before
// the whole part of the exponent is taken away. log(m) is Cephes' polynomial. Its error grows with y: 2 units in the last place at 3,
// above which the C library computes. NaN for x < 0.
inline vf power(vf x, float y) {
  if (y < -3.f || y > 3.f) {
    for (int i = 0; i < kF; ++i) x[i] = static_cast<float>(__builtin_pow(x[i], y));
    return x;
  }
  const vf head = bits<vf>(bits<vi>(vf{} + y) & ~0xfff), tail = y - head;
  const auto subnormal = x < 0x1p-126f;
  const vi u = bits<vi>(subnormal ? x * 0x1p24f : x), e = (u - 0x3f3504f3) >> 23;
  const vf f = bits<vf>(u - (e << 23)) - 1.f, exponent = __builtin_convertvector(e, vf) - (subnormal ? vf{} + 24.f : vf{});
  vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf log = f + (f * f) * (f * p - 0.5f);
  const vf whole = head * exponent, rest = tail * exponent + (y * 1.44269504f) * log, t = whole + rest;
  const vf near = t + 12582912.f - 12582912.f;
  vf n;
  const vf q = expm1_reduced(((whole - near) + rest) * 0.69314718f, n);
  n += near;
  const vf low = n * 0.5f - 0.25f + 12582912.f - 12582912.f, infinity = vf{} + __builtin_inff();
  vf value = (1.f + q) * power_of_two(low) * power_of_two(n - low);  // two factors: neither overflows before the result does
  value = t > 129.f ? infinity : t < -151.f ? vf{} : value;
  const vf at_zero = y < 0.f ? infinity : vf{} + (y > 0.f ? 0.f : 1.f), at_infinity = y > 0.f ? infinity : vf{} + (y < 0.f ? 0.f : 1.f);
  value = x == 0.f ? at_zero : x == infinity ? at_infinity : value;
  return x >= 0.f ? value : vf{} + __builtin_nanf("");
}

using vd = Vec<double>;
inline vd sigmoid(vd x) {
  for (int i = 0; i < Simd<double>::N; ++i) x[i] = 1.0 / (1.0 + __builtin_exp(-x[i]));
  return x;
}
inline vd tanh(vd x) {
  for (int i = 0; i < Simd<double>::N; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
inline vd sigmoid_tanh(vd a, vd b) { return sigmoid(a) * tanh(b); }
template <class V>
inline V relu(V x) {
  return x < 0 ? V{} : x;
}  // keeps NaN

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
