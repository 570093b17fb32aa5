// ptx.cuh's wrappers for the host: same names, same meaning, lane layouts as the PTX ISA gives them.
#pragma once
#include "cuda_host_intrinsics.h"

namespace pyops::ptx {

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return (sign ? -1.f : 1.f) * static_cast<float>(mantissa) * bits_to_float(0x33800000u);  // 2^-24
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u)  // below 2^-14: the sum with 0.5 leaves the subnormal's bits, rounded, in the low mantissa
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline uint32_t floats_to_pair(bf16, float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline uint32_t floats_to_pair(f16, float low, float high) { return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16; }

inline float exp2(float x) { return x < -126.f ? 0.f : std::exp2(x); }

template <class T>
inline float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  if constexpr (std::is_same_v<T, bf16>) return bits_to_float(static_cast<uint32_t>(bits) << 16);
  else return f16_to_float(bits);
}

template <class T>
inline void mma_m16n8k16(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Lane {
    float c[4];
    uint32_t a[4], b[2];
  };
  const Lane mine{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
  const Lane result = host::warp_operation("mma.m16n8k16", mine, [](Lane* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = half_of<T>(lanes[lane].a[i], e);
        for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + e][g] = half_of<T>(lanes[lane].b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane].c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane].c[i] = sum;
      }
  });
  for (int i = 0; i < 4; ++i) c[i] = result.c[i];
}

inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // infinities and NaN stay
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_m16n8k8_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Lane {
    float c[4];
    uint32_t a[4], b[2];
  };
  const Lane mine{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
  const Lane result = host::warp_operation("mma.m16n8k8", mine, [](Lane* lanes) {
    auto value = [](uint32_t bits) { return bits_to_float(bits & ~0x1fffu); };  // tensor cores do not read the rest
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = value(lanes[lane].a[i]);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = value(lanes[lane].b[i]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane].c[i];
        for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
        lanes[lane].c[i] = sum;
      }
  });
  for (int i = 0; i < 4; ++i) c[i] = result.c[i];
}

template <bool kTrans>
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  struct Lane {
    const void* row;
    uint32_t r[4];
  };
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: row not 16-byte aligned");
  const Lane result = host::warp_operation("ldmatrix", Lane{row, {}}, [](Lane* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, t = lane % 4;
        auto at = [&](int y, int x) -> uint32_t { return static_cast<const uint16_t*>(lanes[8 * i + y].row)[x]; };
        lanes[lane].r[i] = kTrans ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
      }
  });
  for (int i = 0; i < 4; ++i) r[i] = result.r[i];
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix<true>(r, row); }

// The destination is unusable from the issue (hardware may write at any time) until the wait, where the bytes land.
inline void cp_async_16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    throw std::runtime_error("cp.async: not 16-byte aligned");
  host::Fiber& self = *host::machine().current;
  std::memset(shared, 0xFF, 16);
  self.copies.push_back({shared, global, 16, self.copy_group});
}
inline void cp_async_16_or_zero(void* shared, const void* global, bool exists) {
  alignas(16) static const unsigned char zeros[16] = {};
  if (reinterpret_cast<uintptr_t>(global) % 16) throw std::runtime_error("cp.async: not 16-byte aligned");
  cp_async_16(shared, exists ? global : zeros);
}
inline void cp_async_commit() { ++host::machine().current->copy_group; }
template <int kPending>
inline void cp_async_wait() {
  host::Fiber& self = *host::machine().current;
  size_t kept = 0;
  for (const host::PendingCopy& copy : self.copies)
    if (copy.group < self.copy_group - kPending) std::memcpy(copy.to, copy.from, copy.bytes);
    else self.copies[kept++] = copy;
  self.copies.resize(kept);
}

inline uint4 load_l2(const uint4* pointer) { return *pointer; }
inline void store_release(unsigned* flag, unsigned value) { *flag = value; }
inline void wait_at_least(const unsigned* flag, unsigned value) { host::wait_at_least(flag, value); }

}  // namespace pyops::ptx
