// Philox4x32-7: pyops/ops/_philox.py says which word is whose.
#pragma once
#include "device.cuh"

namespace pyops {

PYOPS_DEVICE uint4 philox(uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  PYOPS_UNROLL
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * a, second = uint64_t{0xCD9E8D57u} * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ low, b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ high, d = static_cast<uint32_t>(first);
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return {a, b, c, d};
}

}  // namespace pyops
