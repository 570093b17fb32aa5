// The torch face of the CPU's window attention. Schemas, fakes and references are in pyops/ops/_window_attention_ops.py.
#include "attention/window_attention_cpu.h"
#include "attention/window_attention_tensors.h"

namespace pyops::attention {
namespace {

struct WindowCpuEngine {
  static void forward(const WindowAttention& p, const Tensor&) { window_attention_cpu(p); }
  static void backward(const WindowAttention& p, const Tensor&) { window_attention_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::attention

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::attention::register_window_attention<pyops::attention::WindowCpuEngine>(m); }
