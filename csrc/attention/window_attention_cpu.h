// CPU side of window attention: the entry points, and what window_attention_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "window_attention.h"

namespace pyops::attention {

void window_attention_cpu(const WindowAttention& p);
void window_attention_gradient_cpu(const WindowAttention& p);

int window_threads(const WindowAttention& p, int64_t units);  // of a forward pass

// How the gradient's work is cut, by sizes alone: a task is a chunk of windows in a group of heads, whose sums are its own.
struct WindowPlan {
  int threads;
  int64_t windows, chunks, group, groups;
  int64_t begin(int64_t chunk) const { return windows * chunk / chunks; }
};
WindowPlan plan_windows(const WindowAttention& p, int64_t head_bytes);  // head_bytes: a head's sums of a member

#define PYOPS_WINDOW_KERNELS(isa)                           \
  namespace isa {                                           \
  void window_attention(const WindowAttention& p);          \
  void window_attention_gradient(const WindowAttention& p); \
  }
PYOPS_WINDOW_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_WINDOW_KERNELS(avx2)
PYOPS_WINDOW_KERNELS(avx512)
#endif

}  // namespace pyops::attention
