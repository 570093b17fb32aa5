// What the CPU norms over channels share: chunks of the work on a team, and the merge of their sums.
#pragma once
#include "../conv/depthwise_cpu_pass.h"
#include "channel_norms_cpu.h"

namespace pyops::norm::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::put;
using conv::PYOPS_ISA::with_storage;
using cpu::Layout;
using cpu::Team;

inline int64_t padded(int64_t n) { return (n + kF - 1) / kF * kF; }

// body(scratch, the chunk's sums, its first unit, its last but one) for every chunk. scratch: `floats`, the member's own; prepare(scratch)
// comes before its first chunk. sums: `count` doubles of a chunk, zero at first; they are added up in the chunks' order into `totals`.
template <class Prepare, class Body>
void run_chunks(const NormPlan& plan, int64_t floats, int64_t count, float* totals, const Prepare& prepare, const Body& body) {
  struct Context {
    const NormPlan& plan;
    int64_t floats, count;
    float* totals;
    const Prepare& prepare;
    const Body& body;
    float* members;
    double* sums;
    void lay_out(Layout at) { members = at.take<float>(plan.threads * floats), sums = at.take<double>(plan.chunks * count); }
  } context{plan, (floats + 15) / 16 * 16, count, totals, prepare, body, nullptr, nullptr};
  Layout size{nullptr};
  size.take<float>(plan.threads * context.floats), size.take<double>(plan.chunks * count);
  context.lay_out(Layout{static_cast<char*>(cpu::scratch(size.bytes))});
  cpu::run_team(
      plan.threads,
      [](const Team& team, void* at) {
        const Context& c = *static_cast<const Context*>(at);
        const int64_t chunks = c.plan.chunks;
        float* scratch = c.members + team.rank * c.floats;
        c.prepare(scratch);
        for (int64_t chunk = chunks * team.rank / team.size; chunk < chunks * (team.rank + 1) / team.size; ++chunk) {
          double* sums = c.sums + chunk * c.count;
          for (int64_t i = 0; i < c.count; ++i) sums[i] = 0.0;
          c.body(scratch, sums, c.plan.begin(chunk), c.plan.begin(chunk + 1));
        }
        if (!c.count) return;
        team.sync();
        const int64_t first = c.count * team.rank / team.size, last = c.count * (team.rank + 1) / team.size;
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          for (int64_t i = first; i < last; ++i) c.sums[i] += c.sums[chunk * c.count + i];
        for (int64_t i = first; i < last; ++i) c.totals[i] = static_cast<float>(c.sums[i]);
      },
      &context);
}

// A block of a plane [N, C, P]: where its first channel starts, and how many positions it has.
struct Block {
  int64_t at, count;
  Block(const NormPlan& plan, int64_t unit, int64_t P, int64_t C) {
    const int64_t first = unit % plan.blocks * plan.block;
    at = unit / plan.blocks * C * P + first, count = P - first < plan.block ? P - first : plan.block;
  }
};

}  // namespace
}  // namespace pyops::norm::PYOPS_ISA
