// MBConv on the CPU: every storage type's instances for one instruction set (this file is compiled once per set).
#include "mbconv_cpu_forward.h"

namespace pyops::conv::PYOPS_ISA {
void mbconv_forward(const MBConvForward& p, bool pairs) {
  if constexpr (kBf16Pairs) {
    if (pairs) return mbconv_as<bf16, bf16>(p, true);
  }
  with_storage(p.dtype, [&](auto s) { mbconv_as<decltype(s), float>(p, false); });
}
}  // namespace pyops::conv::PYOPS_ISA
