// The torch face of the CPU depthwise convolution.
// Schemas, fakes and gradients are defined in pyops/ops/_depthwise_ops.py.
#include "conv/depthwise_cpu.h"
#include "conv/depthwise_tensors.h"

namespace pyops::conv {
namespace {

struct CpuEngine {
  static void forward(const DepthwiseForward& p, const Tensor&) { depthwise_forward_cpu(p); }
  static void backward(const DepthwiseBackward& p, const Tensor&) { depthwise_backward_cpu(p); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  using pyops::conv::CpuEngine;
  m.impl("depthwise_fwd", TORCH_BOX(&pyops::conv::depthwise_fwd<CpuEngine>));
  m.impl("depthwise_infer", TORCH_BOX(&pyops::conv::depthwise_fwd<CpuEngine>));
  m.impl("depthwise_bwd", TORCH_BOX(&pyops::conv::depthwise_bwd<CpuEngine>));
}
