// Which scores dropout keeps (pyops/ops/_philox.py), a vector of blocks at a time, four columns of a row in each.
#pragma once
#include "../common/philox.h"

namespace pyops::attention::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;

struct Dropout {
  Philox numbers;
  uint32_t threshold;  // what a word must reach to be kept
  float factor;        // of what is kept

  // Words of columns column .. column + 4 * kF, a multiple of four.
  void words(int64_t sequence, int64_t head, int64_t row, int64_t column, vu (&to)[4]) const {
    const vu zero{};
    numbers.words(counted(static_cast<uint32_t>(column / 4)), zero + static_cast<uint32_t>(row), zero + static_cast<uint32_t>(head),
                  zero + static_cast<uint32_t>(sequence), to);
    in_order(to);
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

inline Dropout dropout_of(uint64_t seed, uint32_t threshold, float factor) { return {Philox::of(seed), threshold, factor}; }

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
