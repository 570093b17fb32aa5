// layer_forward and layer_backward on the CPU: pick the kernel of the cell and of the machine's instruction set.
#include "rnn_cpu.h"
#include "../common/isa.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace pyops::rnn {
namespace {

void check(int64_t T, int64_t B, int64_t I, int64_t H, const int64_t* lengths) {
  if (T < 0 || B < 0 || I < 0 || H < 1) throw std::runtime_error("recurrent layer: need T, B, I >= 0 and H >= 1");
  for (int64_t b = 0; lengths && b < B; ++b)
    if (lengths[b] < 0 || lengths[b] > T) throw std::runtime_error("recurrent layer: lengths must be in 0..T");
}

}  // namespace

void sort_rows(const int64_t* lengths, int64_t T, int64_t B, int64_t* order, int64_t* len) {
  std::iota(order, order + B, int64_t{0});
  if (lengths) std::stable_sort(order, order + B, [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  for (int64_t j = 0; j < B; ++j) len[j] = lengths ? lengths[order[j]] : T;
}

Split choose_split(int64_t panels, int64_t rows, int threads) {
  Split best{1, 1};
  int64_t best_cost = INT64_MAX;
  for (int units = static_cast<int>(std::min<int64_t>(panels, threads)); units >= 1; --units) {
    const int groups = static_cast<int>(std::min<int64_t>(std::max<int64_t>(rows, 1), threads / units));
    // Fewer than four rows do not fill the tile: streaming the panel then costs as much as four rows do.
    const int64_t cost = (panels + units - 1) / units * std::max<int64_t>((rows + groups - 1) / groups, 4);
    if (cost < best_cost) best = {units, groups}, best_cost = cost;
  }
  return best;
}

void layer_forward(const LayerForward& p) {
  check(p.T, p.B, p.I, p.H, p.lengths);
  switch (p.cell) {
    case Cell::lstm: return PYOPS_CPU_KERNEL(lstm_forward)(p);
    case Cell::gru:
    case Cell::gru_reset_before: return PYOPS_CPU_KERNEL(gru_forward)(p);
    default: return PYOPS_CPU_KERNEL(rnn_forward)(p);
  }
}

void layer_backward(const LayerBackward& p) {
  check(p.T, p.B, p.I, p.H, p.lengths);
  switch (p.cell) {
    case Cell::lstm: return PYOPS_CPU_KERNEL(lstm_backward)(p);
    case Cell::gru:
    case Cell::gru_reset_before: return PYOPS_CPU_KERNEL(gru_backward)(p);
    default: return PYOPS_CPU_KERNEL(rnn_backward)(p);
  }
}

}  // namespace pyops::rnn
