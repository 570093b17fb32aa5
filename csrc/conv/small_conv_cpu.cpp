// The convolution of small images on the CPU: how many threads it is worth, and the kernel of the machine's instruction set.
#include "small_conv_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::conv {

int small_conv_threads(const SmallConv& p) {
  constexpr int64_t kEach = 500000;  // products; about 15 us, where waking a thread takes 5
  const int64_t products = p.N * p.OH * p.OW * p.O * p.C * p.KH * p.KW;
  return static_cast<int>(std::clamp<int64_t>(products / kEach, 1, cpu::max_threads()));
}

void small_conv_cpu(const SmallConv& p) { PYOPS_CPU_KERNEL(small_conv)(p); }

}  // namespace pyops::conv
