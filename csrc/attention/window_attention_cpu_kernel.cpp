// Window attention on the CPU (window_attention.h says what it computes), compiled once per instruction set.
#include "window_attention_cpu_backward.h"
#include "window_attention_cpu_forward.h"

namespace pyops::attention::PYOPS_ISA {

void window_attention(const WindowAttention& p) {
  conv::PYOPS_ISA::with_storage(p.dtype, [&](auto s) { WindowForward<decltype(s)>(p).run(); });
}
void window_attention_gradient(const WindowAttention& p) {
  conv::PYOPS_ISA::with_storage(p.dtype, [&](auto s) { WindowBackward<decltype(s)>(p).run(); });
}

}  // namespace pyops::attention::PYOPS_ISA
