#include "rnn_cpu_backward.h"
#include "rnn_cpu_forward.h"
#include "rnn_cpu_step.h"

namespace pyops::rnn::PYOPS_ISA {
void rnn_forward(const LayerForward& p) { forward_any<1>(p); }
void rnn_backward(const LayerBackward& p) { backward_any<1>(p); }
}  // namespace pyops::rnn::PYOPS_ISA
