// LSTM layers on the CPU: every dtype's instances for one instruction set (this file is compiled once per set).
// The kernels and their layouts are in rnn_cpu_forward.h, rnn_cpu_step.h (few rows) and rnn_cpu_backward.h.
#include "rnn_cpu_backward.h"
#include "rnn_cpu_forward.h"
#include "rnn_cpu_step.h"

namespace pyops::rnn::PYOPS_ISA {
void lstm_forward(const LayerForward& p) { forward_any<4>(p); }
void lstm_backward(const LayerBackward& p) { backward_any<4>(p); }
}  // namespace pyops::rnn::PYOPS_ISA
