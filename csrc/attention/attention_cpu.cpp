// Attention on the CPU: the cut of the work, the zeros of rows that no sequence has, and the kernel of the machine's instruction set.
#include "attention_cpu.h"
#include "../common/isa.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace pyops::attention {
namespace {

constexpr int64_t kPerThread = 400000;  // products, about 5 us

// Work of some rows of one head, in columns seen, and in what a row costs by itself.
int64_t cost_of(const Attention& p, const Sequence& q, int64_t begin, int64_t end) {
  const Columns seen = seen_by(p, q, (begin + end) / 2, (begin + end) / 2);
  return (end - begin) * (std::max<int64_t>(seen.end - seen.begin, 0) + 16);
}
int64_t cost_of_head(const Attention& p, const Sequence& q, int64_t most) {
  if (p.left < 0 && p.right < 0) return cost_of(p, q, 0, q.rows);
  const int64_t all = share_count(q.rows, most);
  int64_t cost = 0;
  for (int64_t g = 0; g < all; ++g) cost += cost_of(p, q, share_begin(q.rows, all, g), share_begin(q.rows, all, g + 1));
  return cost;
}

int threads_for(int64_t cost, int64_t D, int64_t most) {
  const int64_t wanted = static_cast<int64_t>(static_cast<double>(cost) * static_cast<double>(2 * D) / kPerThread);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(std::min<int64_t>(cpu::max_threads(), most), 1)));
}

// fill(batch, row) for rows (or columns) of no sequence.
template <class F>
void each_gap(const Attention& p, bool columns, const F& fill) {
  if (!p.spans) return;
  const int64_t length = columns ? p.M : p.N;
  std::vector<std::pair<int64_t, int64_t>> spans;  // first, end
  for (int64_t batch = 0; batch < p.B; ++batch) {
    spans.clear();
    for (int64_t s = p.B > 1 ? batch : 0; s < (p.B > 1 ? batch + 1 : p.S); ++s) {
      const Sequence q = sequence_of(p, s);
      const int64_t first = columns ? q.first_column : q.first_row, count = columns ? q.columns : q.rows;
      if (count > 0) spans.emplace_back(first, first + count);
    }
    std::sort(spans.begin(), spans.end());
    spans.emplace_back(length, length);
    int64_t covered = 0;
    for (const auto& [first, end] : spans) {
      for (; covered < first; ++covered) fill(batch, covered);
      covered = std::max(covered, end);
    }
  }
}
void clear_row(const Attention& p, const Heads& t, int64_t heads, int64_t batch, int64_t row) {
  const int64_t size = p.dtype == DType::f32 ? 4 : 2;
  for (int64_t h = 0; h < heads; ++h)
    std::memset(static_cast<char*>(t.data) + (batch * t.batch + h * t.head + row * t.row) * size, 0, p.D * size);
}

std::vector<Place> cut_forward(const Attention& p, int& threads) {
  std::vector<int64_t> costs(p.S);  // of one head
  int64_t total = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    costs[s] = s > 0 && !p.spans ? costs[0] : cost_of_head(p, sequence_of(p, s), kGroupRows);
    total += costs[s] * p.H;
  }
  threads = threads_for(total, p.D, INT32_MAX);
  std::vector<Place> cuts(threads + 1, Place{p.S, 0, 0});
  cuts[0] = {0, 0, 0};
  int64_t s = 0, before = 0;  // cost of the sequences before s
  for (int t = 1; t < threads; ++t) {
    const int64_t wanted = static_cast<int64_t>(static_cast<double>(total) * t / threads);
    for (; s < p.S && before + costs[s] * p.H <= wanted; ++s) before += costs[s] * p.H;
    if (s == p.S) break;
    const Sequence q = sequence_of(p, s);
    const int64_t all = share_count(q.rows, kGroupRows), head = (wanted - before) / costs[s];
    int64_t g = 0;
    for (int64_t left = (wanted - before) % costs[s]; left > 0 && g < all; ++g)
      left -= cost_of(p, q, share_begin(q.rows, all, g), share_begin(q.rows, all, g + 1));
    cuts[t] = g < all ? Place{s, head, g} : head + 1 < p.H ? Place{s, head + 1, 0} : Place{s + 1, 0, 0};
  }
  return cuts;
}

BackwardPlan plan_backward(const AttentionGradient& a, std::vector<int64_t>& cuts) {
  // Owners wanted, and where a copy of the bias' gradient serves eight tasks or more; floats of all copies.
  constexpr int64_t kOwners = 8, kFineOwners = 64, kMostFloats = int64_t{1} << 26;
  const Attention& p = a.forward;
  BackwardPlan plan{};
  plan.sequence_slices = p.S, plan.head_slices = p.G, plan.copies = 1, plan.parts = 1;
  const int64_t* sizes = p.bias.sizes;
  if (p.S == 0) return plan;
  int64_t blocks = 1;  // of a task's rows
  for (int64_t s = 0; s < (p.spans ? p.S : 1); ++s) blocks = std::max(blocks, p.H / p.G * share_count(sequence_of(p, s).rows, kBlockRows));
  const int64_t floats = a.grad_bias ? std::max<int64_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3], 1) : 1;
  if (a.grad_bias) {
    if (sizes[0] == 1) plan.sequence_slices = 1;
    if (sizes[1] == 1) plan.head_slices = 1;
    const int64_t slices = plan.sequence_slices * plan.head_slices, tasks = p.S * p.G / slices;
    const int64_t wanted = std::max(std::min(tasks, share_count(kOwners, slices)), std::min(tasks / 8, share_count(kFineOwners, slices)));
    plan.copies = std::clamp<int64_t>(kMostFloats / floats, 1, wanted);
  }
  const int64_t runs = plan.sequence_slices * plan.head_slices * plan.copies;
  plan.parts = std::min(share_count(kOwners, runs), blocks);
  // parts that add to the same rows of the bias need sums of their own
  const bool shared = a.grad_bias && (sizes[2] == 1 || (sizes[1] == 1 && p.H > p.G));
  if (shared) plan.parts = std::clamp<int64_t>(kMostFloats / (plan.copies * floats), 1, plan.parts);
  plan.bias_copies = a.grad_bias ? plan.copies * (shared ? plan.parts : 1) : 0;
  plan.bias_floats = a.grad_bias ? floats : 0;
  plan.owners = runs * plan.parts;

  std::vector<int64_t> costs(plan.owners);
  int64_t total = 0;
  for (int64_t o = 0; o < plan.owners; ++o) {
    const Owner owner = owner_of(p, plan, o);
    for (int64_t t = owner.first_task; t < owner.end; ++t) {
      const Sequence q = sequence_of(p, task_of(p, plan, owner, t).sequence);
      const int64_t all = share_count(q.rows, kBlockRows), units = all * (p.H / p.G);
      for (int64_t u = units * owner.part / plan.parts; u < units * (owner.part + 1) / plan.parts; ++u)
        costs[o] += cost_of(p, q, share_begin(q.rows, all, u % all), share_begin(q.rows, all, u % all + 1));
      costs[o] += q.columns;
    }
    total += costs[o];
  }
  plan.threads = threads_for(total, p.D, plan.owners);
  cuts.assign(plan.threads + 1, plan.owners);
  cuts[0] = 0;
  int64_t o = 0, before = 0;
  for (int t = 1; t < plan.threads; ++t) {
    const double wanted = static_cast<double>(total) * t / plan.threads;
    for (; o < plan.owners && static_cast<double>(before + costs[o] / 2) < wanted; ++o) before += costs[o];
    cuts[t] = o;
  }
  plan.cuts = cuts.data();
  return plan;
}

}  // namespace

void attention_cpu(const Attention& p) {
  each_gap(p, false, [&](int64_t batch, int64_t row) {
    clear_row(p, p.output, p.H, batch, row);
    for (int64_t h = 0; h < p.H; ++h) p.lse[(batch * p.H + h) * p.N + row] = -__builtin_inff();
  });
  if (p.S == 0) return;
  int threads = 1;
  const std::vector<Place> cuts = cut_forward(p, threads);
  PYOPS_CPU_KERNEL(attention_forward)(p, cuts.data(), threads);
}

void attention_gradient_cpu(const AttentionGradient& a) {
  const Attention& p = a.forward;
  each_gap(p, false, [&](int64_t batch, int64_t row) { clear_row(p, a.grad_query, p.H, batch, row); });
  each_gap(p, true,
           [&](int64_t batch, int64_t row) { clear_row(p, a.grad_key, p.G, batch, row), clear_row(p, a.grad_value, p.G, batch, row); });
  std::vector<int64_t> cuts;
  const BackwardPlan plan = plan_backward(a, cuts);
  if (a.grad_bias && plan.bias_copies <= 1) {
    const int64_t* sizes = p.bias.sizes;
    std::memset(a.grad_bias, 0, sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizeof(float));
  }
  if (p.S > 0) PYOPS_CPU_KERNEL(attention_backward)(a, plan);
}

}  // namespace pyops::attention
