// Philox4x32-7 (pyops/ops/_philox.py) on the CPU, a vector of blocks at a time.
#pragma once
#include "simd.h"

namespace pyops::cpu::PYOPS_ISA {
namespace {

typedef uint32_t vu __attribute__((vector_size(kVecBytes)));

// High and low words of the products of 32 bits.
inline void products(vu a, uint32_t constant, vu& high, vu& low) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  const auto multiply = [](vu x, vu y) { return bits<vu>(_mm512_mul_epu32(bits<__m512i>(x), bits<__m512i>(y))); };
#elif defined(__AVX2__)
  const auto multiply = [](vu x, vu y) { return bits<vu>(_mm256_mul_epu32(bits<__m256i>(x), bits<__m256i>(y))); };
#else
  const auto multiply = [](vu x, vu y) { return bits<vu>(_mm_mul_epu32(bits<__m128i>(x), bits<__m128i>(y))); };
#endif
  typedef uint64_t Wide __attribute__((vector_size(kVecBytes)));
  const vu b = vu{} + constant;
  const Wide even = bits<Wide>(multiply(a, b)), odd = bits<Wide>(multiply(bits<vu>(bits<Wide>(a) >> 32), b));
  high = bits<vu>((even >> 32) | (odd & 0xffffffff00000000u)), low = a * constant;
#else
  for (int i = 0; i < kF; ++i) high[i] = static_cast<uint32_t>(static_cast<uint64_t>(a[i]) * constant >> 32);
  low = a * constant;
#endif
}

struct Philox {
  uint32_t low, high;  // the seed's words

  static Philox of(uint64_t seed) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}; }

  // Words of the blocks with counters (a, b, c, d) in each lane.
  void words(vu a, vu b, vu c, vu d, vu (&to)[4]) const {
    uint32_t k0 = low, k1 = high;
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      vu h0, l0, h1, l1;
      products(a, 0xD2511F53u, h0, l0), products(c, 0xCD9E8D57u, h1, l1);
      a = h1 ^ b ^ k0, b = l1, c = h0 ^ d ^ k1, d = l0;
    }
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
  }
};

// first .. first + kF - 1
inline vu counted(uint32_t first) {
  vu lanes = vu{} + first;
  for (int i = 0; i < kF; ++i) lanes[i] += static_cast<uint32_t>(i);
  return lanes;
}

// Number k of lane i to place 4 * i + k.
template <class V>
inline void in_order(V (&v)[4]) {
  using Lanes = std::make_integer_sequence<int, kF>;
  const V even_low = interleave<0>(v[0], v[2], Lanes{}), odd_low = interleave<0>(v[1], v[3], Lanes{});
  const V even_high = interleave<1>(v[0], v[2], Lanes{}), odd_high = interleave<1>(v[1], v[3], Lanes{});
  v[0] = interleave<0>(even_low, odd_low, Lanes{}), v[1] = interleave<1>(even_low, odd_low, Lanes{});
  v[2] = interleave<0>(even_high, odd_high, Lanes{}), v[3] = interleave<1>(even_high, odd_high, Lanes{});
}

}  // namespace
}  // namespace pyops::cpu::PYOPS_ISA
