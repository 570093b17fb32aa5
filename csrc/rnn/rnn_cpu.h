// Inside of the CPU recurrent layers: what rnn_cpu.cpp (compiled once) and the kernels (compiled per instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "rnn.h"

namespace pyops::rnn {

// Rows in order of falling length: order[j] is the row of the batch, len[j] its length. Step s then works on the prefix of
// rows that are still alive, and cost follows the real tokens.
void sort_rows(const int64_t* lengths, int64_t T, int64_t B, int64_t* order, int64_t* len);

// How a team shares a layer: `units` threads split the panels and meet once a step; `rows` such groups take every rows-th
// row each and never meet.
struct Split {
  int units, rows;
};
Split choose_split(int64_t panels, int64_t rows, int threads);

#define PYOPS_RNN_KERNELS(isa)                \
  namespace isa {                             \
  void lstm_forward(const LayerForward& p);   \
  void gru_forward(const LayerForward& p);    \
  void rnn_forward(const LayerForward& p);    \
  void lstm_backward(const LayerBackward& p); \
  void gru_backward(const LayerBackward& p);  \
  void rnn_backward(const LayerBackward& p);  \
  }
PYOPS_RNN_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_RNN_KERNELS(avx2)
PYOPS_RNN_KERNELS(avx512)
#endif

}  // namespace pyops::rnn
