// CPU side of attention: the entry points, and what attention_cpu.cpp (compiled once) and the kernels (compiled per instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "attention.h"

namespace pyops::attention {

void attention_cpu(const Attention& p);
void attention_gradient_cpu(const AttentionGradient& p);

// Rows are computed in fixed groups of a sequence, whoever computes them: even shares of at most `most` rows.
constexpr int64_t kGroupRows = 6;   // forward
constexpr int64_t kBlockRows = 64;  // backward
constexpr int64_t share_count(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
constexpr int64_t share_begin(int64_t rows, int64_t count, int64_t i) { return rows * i / count; }

// Forward: thread t of T takes the groups from cut t up to cut t + 1, in the order of sequences, query heads, groups.
struct Place {
  int64_t sequence, head, group;
};

// Backward. A task is a sequence's key head: the blocks of rows of its query heads, one after the other, which `parts` may share; each
// part then has sums of its own for key and value, added up in order. Where a bias' gradient is wanted, the tasks of one slice of it (those
// that add to the same elements) follow one another in `copies` runs, each with sums of its own. An owner is one part of one run: what it
// adds to is nobody else's. The cut depends on sizes alone, not on the number of threads.
struct BackwardPlan {
  int threads;
  int64_t sequence_slices, head_slices, copies, parts, owners;
  int64_t bias_copies, bias_floats;  // sums of the bias' gradient: none, one in place, or several in scratch memory
  const int64_t* cuts;               // [threads + 1], of owners
};

struct Owner {
  int64_t sequence, head;   // of its slice
  int64_t first_task, end;  // in the slice
  int64_t part, bias_copy;
};
constexpr Owner owner_of(const Attention& p, const BackwardPlan& plan, int64_t o) {
  const int64_t part = o % plan.parts, run = o / plan.parts % plan.copies, slice = o / plan.parts / plan.copies;
  const int64_t tasks = p.S / plan.sequence_slices * (p.G / plan.head_slices);
  const int64_t copy = plan.bias_copies > plan.copies ? run * plan.parts + part : run;
  return {slice / plan.head_slices, slice % plan.head_slices, tasks * run / plan.copies, tasks * (run + 1) / plan.copies, part, copy};
}
// The sequence and key head of a task of its slice.
struct Task {
  int64_t sequence, head;
};
constexpr Task task_of(const Attention& p, const BackwardPlan& plan, const Owner& owner, int64_t task) {
  const int64_t heads = p.G / plan.head_slices;
  return {owner.sequence + task / heads, owner.head + task % heads};
}

#define PYOPS_ATTENTION_KERNELS(isa)                                             \
  namespace isa {                                                                \
  void attention_forward(const Attention& p, const Place* cuts, int threads);    \
  void attention_backward(const AttentionGradient& p, const BackwardPlan& plan); \
  }
PYOPS_ATTENTION_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_ATTENTION_KERNELS(avx2)
PYOPS_ATTENTION_KERNELS(avx512)
#endif

}  // namespace pyops::attention
