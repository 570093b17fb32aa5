// The torch face of the CPU's attention. Schemas, fakes and references are in pyops/ops/_attention_ops.py.
#include "attention/attention_cpu.h"
#include "attention/attention_tensors.h"

namespace pyops::attention {
namespace {

struct AttentionCpuEngine {
  static void forward(const Attention& p, const Tensor&) { attention_cpu(p); }
  static void backward(const AttentionGradient& p, const Tensor&) { attention_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::attention

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::attention::register_attention<pyops::attention::AttentionCpuEngine>(m); }
