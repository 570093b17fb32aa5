// Routing between capsules on the CPU (routing.h says what it computes), compiled once per instruction set.
//
// A block is as many inputs as a vector has lanes: [lane][J][width] floats in L1, width the D elements padded to vectors. float32 of whole
// vectors is read where it is, anything else widened there first. Logits and couplings are [J][lane], so that the softmax over j has no
// shuffles. Each chunk's sums are apart and merged in the chunks' order by every thread that needs them.
#include "../conv/depthwise_cpu_row.h"
#include "routing_cpu.h"

namespace pyops::capsule::PYOPS_ISA {
namespace {
using namespace cpu::PYOPS_ISA;
using conv::PYOPS_ISA::get;
using conv::PYOPS_ISA::put;
using cpu::Layout;
using cpu::Team;

inline void clear(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

// The inputs of a block, `count` of kF; rows past the last are the first again.
struct Inputs {
  const float* row[kF];
  int64_t count;
};

template <class S>
struct RoutingPass {
  const Routing& p;
  const bool gradient;
  const RoutingPlan plan;
  const int64_t width, row;               // floats of a padded capsule, of J of them
  const int64_t step_input, step_sample;  // elements
  const bool direct;

  RoutingPass(const Routing& params, bool backward)
      : p(params),
        gradient(backward),
        plan(plan_routing(params, kF)),
        width((p.D + kF - 1) / kF * kF),
        row(p.J * width),
        step_input(p.J * p.D * (p.by_input ? p.N : 1)),
        step_sample(p.J * p.D * (p.by_input ? 1 : p.I)),
        direct(sizeof(S) == sizeof(float) && p.D == width) {}

  // What a thread keeps to itself.
  struct Member {
    float *staged, *couplings, *logits;  // [kF][row]; [T][J][kF], the gradient's second of each likewise
    float *earlier, *outer;              // [T][row]: V of each iteration, h of each
    float *sums, *grad;                  // [row]
    float* partials;                     // [2][chunks][row], the first thread's where a sample is shared
  };
  Member member(Layout& at) const {
    Member m;
    m.staged = at.take<float>(direct ? 0 : kF * row);
    m.couplings = at.take<float>(p.T * p.J * kF), m.logits = at.take<float>(p.T * p.J * kF);
    m.earlier = at.take<float>(p.T * row), m.outer = at.take<float>(p.T * row);
    m.sums = at.take<float>(row), m.grad = at.take<float>(row);
    m.partials = at.take<float>(2 * plan.chunks * row);
    return m;
  }

  void run() const {
    Layout size{nullptr};
    for (int i = 0; i < plan.threads; ++i) member(size);
    struct Context {
      const RoutingPass& pass;
      char* scratch;
    } context{*this, static_cast<char*>(cpu::scratch(size.bytes))};
    cpu::run_team(
        plan.threads,
        [](const Team& team, void* at) {
          const Context& c = *static_cast<const Context*>(at);
          Layout layout{c.scratch};
          Member first{}, own{};
          for (int i = 0; i <= team.rank; ++i) {
            own = c.pass.member(layout);
            if (i == 0) first = own;
          }
          if (c.pass.plan.shared) own.partials = first.partials;
          c.pass.samples(team, own);
        },
        &context);
  }
  void samples(const Team& team, const Member& m) const {
    const Team alone{0, 1, nullptr, nullptr};
    const bool shared = plan.shared;
    const int64_t first = shared ? 0 : p.N * team.rank / team.size, last = shared ? p.N : p.N * (team.rank + 1) / team.size;
    int64_t passes = 0;  // so far: whose partial sums may be written over
    for (int64_t n = first; n < last; ++n)
      gradient ? backward(shared ? team : alone, m, n, passes) : forward(shared ? team : alone, m, n, passes);
  }

  // ------------------------------------------------------------------------------------------------------------ blocks of inputs

  Inputs inputs(const Member& m, int64_t n, int64_t block) const {
    Inputs in;
    in.count = p.I - block * kF < kF ? p.I - block * kF : kF;
    for (int64_t lane = 0; lane < kF; ++lane) {
      const S* from = static_cast<const S*>(p.input) + n * step_sample + (block * kF + (lane < in.count ? lane : 0)) * step_input;
      if constexpr (sizeof(S) == sizeof(float)) {
        in.row[lane] = from;
        if (direct) continue;
      }
      float* const to = m.staged + (lane < in.count ? lane : 0) * row;
      in.row[lane] = to;
      if (lane >= in.count) continue;
      for (int64_t j = 0; j < p.J; ++j)
        for (int64_t d = 0; d < width; d += kF) store(to + j * width + d, get(from + j * p.D + d, p.D - d));
    }
    return in;
  }
  // [J][lane] = u_ij . with_j
  void products(const Inputs& in, const float* with, float* to) const {
    for (int64_t j = 0; j < p.J; ++j)
      for (int64_t lane = 0; lane < kF; lane += 4) {
        vf v[4] = {};
        for (int64_t d = 0; d < width; d += kF) {
          const vf w = load(with + j * width + d);
          for (int k = 0; k < 4; ++k) v[k] += load(in.row[lane + k] + j * width + d) * w;
        }
        float sums[4];
        sum_lanes(v, sums);
        __builtin_memcpy(to + j * kF + lane, sums, sizeof sums);
      }
  }
  // c of iteration t, from logits where it is not the first.
  void couple(const Inputs& in, int64_t t, const Member& m, float* c) const {
    if (t == 0) {
      for (int64_t j = 0; j < p.J; ++j) store(c + j * kF, vf{} + 1.f / static_cast<float>(p.J));
      return;
    }
    products(in, m.earlier + t * row, c);
    vf most = load(c), total = vf{};
    for (int64_t j = 1; j < p.J; ++j) {
      const vf logit = load(c + j * kF);
      most = logit > most ? logit : most;
    }
    for (int64_t j = 0; j < p.J; ++j) {
      const vf share = exp_neg(most - load(c + j * kF));
      store(c + j * kF, share), total += share;
    }
    for (int64_t j = 0; j < p.J; ++j) store(c + j * kF, load(c + j * kF) / total);
  }
  // l of iteration t, from its couplings.
  void logit_gradient(const Inputs& in, int64_t t, const Member& m, const float* c, float* l) const {
    products(in, m.outer + t * row, l);
    vf mean{};
    for (int64_t j = 0; j < p.J; ++j) mean += load(c + j * kF) * load(l + j * kF);
    for (int64_t j = 0; j < p.J; ++j) store(l + j * kF, load(c + j * kF) * (load(l + j * kF) - mean));
  }
  // to_j += sum over the block of weight_ij u_ij
  void accumulate(const Inputs& in, const float* weights, float* to) const {
    for (int64_t j = 0; j < p.J; ++j)
      for (int64_t d = 0; d < width; d += kF) {
        vf even{}, odd{};
        int64_t lane = 0;
        for (; lane + 2 <= in.count; lane += 2) {
          even += load(in.row[lane] + j * width + d) * weights[j * kF + lane];
          odd += load(in.row[lane + 1] + j * width + d) * weights[j * kF + lane + 1];
        }
        if (lane < in.count) even += load(in.row[lane] + j * width + d) * weights[j * kF + lane];
        float* const at = to + j * width + d;
        store(at, load(at) + (even + odd));
      }
  }

  // ------------------------------------------------------------------------------------------------------------------ iterations

  // m.sums = the sum over a sample's blocks of body(block's inputs, where to add). Every member of the team has the whole sum afterwards.
  template <class Body>
  void sum(const Team& team, const Member& m, int64_t n, int64_t& passes, const Body& body) const {
    float* const partials = m.partials + passes++ % 2 * plan.chunks * row;  // of the pass before, others may still read
    for (int64_t chunk = plan.chunks * team.rank / team.size; chunk < plan.chunks * (team.rank + 1) / team.size; ++chunk) {
      float* const to = partials + chunk * row;
      clear(to, row);
      for (int64_t block = plan.begin(chunk); block < plan.begin(chunk + 1); ++block) body(inputs(m, n, block), to);
    }
    if (team.size > 1) team.sync();
    for (int64_t i = 0; i < row; i += kF) {
      vf s = load(partials + i);
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) s += load(partials + chunk * row + i);
      store(m.sums + i, s);
    }
  }
  static float dot(const float* a, const float* b, int64_t count) {
    float s = 0.f;
    for (int64_t d = 0; d < count; ++d) s += a[d] * b[d];
    return s;
  }
  // to_j = squash(s_j) + before_j
  void squash(const float* s, const float* before, float* to) const {
    for (int64_t j = 0; j < row; j += width) {
      const float square = dot(s + j, s + j, width), scale = __builtin_sqrtf(square) / (1.f + square);
      for (int64_t d = 0; d < width; ++d) to[j + d] = s[j + d] * scale + (before ? before[j + d] : 0.f);
    }
  }
  // to_j = squash'(s_j) g_j
  void squash_gradient(const float* s, const float* g, float* to) const {
    for (int64_t j = 0; j < row; j += width) {
      const float square = dot(s + j, s + j, width), length = __builtin_sqrtf(square), below = 1.f + square;
      const float along = length > 0.f ? dot(s + j, g + j, width) * (1.f - square) / (below * below * length) : 0.f;
      for (int64_t d = 0; d < width; ++d) to[j + d] = g[j + d] * (length / below) + s[j + d] * along;
    }
  }
  // Between a padded row and J * D elements.
  template <class From>
  void widen_row(const From* from, float* to) const {
    for (int64_t j = 0; j < p.J; ++j)
      for (int64_t d = 0; d < width; d += kF) store(to + j * width + d, get(from + j * p.D + d, p.D - d));
  }
  template <class To>
  void narrow_row(const float* from, To* to) const {
    for (int64_t j = 0; j < p.J; ++j)
      for (int64_t d = 0; d < width; d += kF) put(to + j * p.D + d, load(from + j * width + d), p.D - d);
  }

  void forward(const Team& team, const Member& m, int64_t n, int64_t& passes) const {
    for (int64_t t = 0; t < p.T; ++t) {
      sum(team, m, n, passes, [&](const Inputs& in, float* to) {
        couple(in, t, m, m.couplings);
        accumulate(in, m.couplings, to);
      });
      if (team.rank == 0) narrow_row(m.sums, p.sums + (n * p.T + t) * p.J * p.D);
      if (t + 1 < p.T) squash(m.sums, t ? m.earlier + t * row : nullptr, m.earlier + (t + 1) * row);
    }
    if (team.rank) return;
    squash(m.sums, nullptr, m.sums);
    narrow_row(m.sums, static_cast<S*>(p.output) + n * p.J * p.D);
  }

  void backward(const Team& team, const Member& m, int64_t n, int64_t& passes) const {
    const float* const sums = p.sums + n * p.T * p.J * p.D;
    for (int64_t t = 0; t + 1 < p.T; ++t) {
      widen_row(sums + t * p.J * p.D, m.sums);
      squash(m.sums, t ? m.earlier + t * row : nullptr, m.earlier + (t + 1) * row);
    }
    const int64_t last = p.T - 1, first = p.stop_gradient ? last : 0;
    widen_row(static_cast<const S*>(p.grad) + n * p.J * p.D, m.grad);
    for (int64_t t = last;; --t) {
      widen_row(sums + t * p.J * p.D, m.sums);
      squash_gradient(m.sums, m.grad, m.outer + t * row);
      if (t == first) break;
      sum(team, m, n, passes, [&](const Inputs& in, float* to) {
        couple(in, t, m, m.couplings);
        logit_gradient(in, t, m, m.couplings, m.logits);
        accumulate(in, m.logits, to);
      });
      for (int64_t i = 0; i < row; i += kF) store(m.grad + i, load(m.sums + i) + (t == last ? vf{} : load(m.grad + i)));
    }
    for (int64_t block = plan.blocks * team.rank / team.size; block < plan.blocks * (team.rank + 1) / team.size; ++block)
      write(m, n, block, first, last);
  }
  // The gradient of a block's inputs, all iterations' shares at once.
  void write(const Member& m, int64_t n, int64_t block, int64_t first, int64_t last) const {
    const Inputs in = inputs(m, n, block);
    const int64_t size = p.J * kF;
    for (int64_t t = first; t <= last; ++t) {
      couple(in, t, m, m.couplings + t * size);
      if (t > first) logit_gradient(in, t, m, m.couplings + t * size, m.logits + t * size);
    }
    for (int64_t lane = 0; lane < in.count; ++lane) {
      S* const to = static_cast<S*>(p.output) + n * step_sample + (block * kF + lane) * step_input;
      for (int64_t j = 0; j < p.J; ++j)
        for (int64_t d = 0; d < width; d += kF) {
          const int64_t at = j * width + d, own = j * kF + lane;
          vf g = load(m.outer + first * row + at) * m.couplings[first * size + own];
          for (int64_t t = first + 1; t <= last; ++t)
            g += load(m.outer + t * row + at) * m.couplings[t * size + own] + load(m.earlier + t * row + at) * m.logits[t * size + own];
          put(to + j * p.D + d, g, p.D - d);
        }
    }
  }
};

}  // namespace

void routing(const Routing& p, bool gradient) {
  if (p.dtype == DType::f32) RoutingPass<float>(p, gradient).run();
  else if (p.dtype == DType::bf16) RoutingPass<bf16>(p, gradient).run();
  else RoutingPass<f16>(p, gradient).run();
}

}  // namespace pyops::capsule::PYOPS_ISA
