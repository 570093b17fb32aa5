// Depthwise convolution on the CPU: every storage type's instances for one instruction set (this file is compiled once per set).
#include "depthwise_cpu_backward.h"
#include "depthwise_cpu_forward.h"

namespace pyops::conv::PYOPS_ISA {
void depthwise_forward(const DepthwiseForward& p, const DepthwisePrologue& before) {
  with_storage(p.dtype, [&](auto s) { forward_as<decltype(s)>(p, before); });
}
void depthwise_backward(const DepthwiseBackward& p, const DepthwisePrologue& before) {
  with_storage(p.dtype, [&](auto s) { backward_as<decltype(s)>(p, before); });
}
}  // namespace pyops::conv::PYOPS_ISA
