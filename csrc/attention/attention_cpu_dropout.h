// Which scores dropout keeps (pyops/ops/_philox.py): Philox4x32-7, a vector of blocks at a time, four columns of a row in each.
#pragma once
#include "../common/simd.h"

namespace pyops::attention::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

typedef uint32_t vu __attribute__((vector_size(kVecBytes)));

// High words of the products of 32 bits; the low ones are a * constant.
inline vu high_product(vu a, uint32_t constant) {
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
  return bits<vu>((even >> 32) | (odd & 0xffffffff00000000u));
#else
  for (int i = 0; i < kF; ++i) a[i] = static_cast<uint32_t>(static_cast<uint64_t>(a[i]) * constant >> 32);
  return a;
#endif
}

struct Dropout {
  uint32_t low, high, threshold;  // the seed's words; what a word must reach to be kept
  float factor;                   // of what is kept

  // Words of columns column .. column + 4 * kF, a multiple of four.
  void words(int64_t sequence, int64_t head, int64_t row, int64_t column, vu (&to)[4]) const {
    vu a = vu{} + static_cast<uint32_t>(column / 4), b = vu{} + static_cast<uint32_t>(row), c = vu{} + static_cast<uint32_t>(head);
    vu d = vu{} + static_cast<uint32_t>(sequence);
    for (int i = 0; i < kF; ++i) a[i] += static_cast<uint32_t>(i);
    uint32_t k0 = low, k1 = high;
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const vu h0 = high_product(a, 0xD2511F53u), l0 = a * 0xD2511F53u, h1 = high_product(c, 0xCD9E8D57u), l1 = c * 0xCD9E8D57u;
      a = h1 ^ b ^ k0, b = l1, c = h0 ^ d ^ k1, d = l0;
    }
    using Lanes = std::make_integer_sequence<int, kF>;
    const vu even_low = interleave<0>(a, c, Lanes{}), odd_low = interleave<0>(b, d, Lanes{});
    const vu even_high = interleave<1>(a, c, Lanes{}), odd_high = interleave<1>(b, d, Lanes{});
    to[0] = interleave<0>(even_low, odd_low, Lanes{}), to[1] = interleave<1>(even_low, odd_low, Lanes{});
    to[2] = interleave<0>(even_high, odd_high, Lanes{}), to[3] = interleave<1>(even_high, odd_high, Lanes{});
  }

  // to[c] = 0 or `factor` for columns begin + c < end of a row; begin is a multiple of four. Writes whole runs of 4 * kF.
  void row(int64_t sequence, int64_t head, int64_t row, int64_t begin, int64_t end, float* to) const {
    for (int64_t c = begin; c < end; c += 4 * kF, to += 4 * kF) {
      vu w[4];
      words(sequence, head, row, c, w);
      for (int v = 0; v < 4; ++v) store(to + v * kF, w[v] >= threshold ? vf{} + factor : vf{});
    }
  }
};

inline Dropout dropout_of(uint64_t seed, uint32_t threshold, float factor) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), threshold, factor};
}

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
