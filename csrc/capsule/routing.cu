// Dynamic routing between capsules and its gradient; routing.h says what is computed.
//
//   u, its gradient: [N, I, J, D] or [I, N, J, D];  sums [N, T, J, D];  partials [2][N][slots][J*D], of this pass and of the one before
//   grads [T][N][J*D]: the gradients of the v;  terms [N][T][2][J*D]: V and h of iterations, for the pass that writes
//
// An iteration is a launch of N x `slots` blocks; a block takes a run of a sample's inputs, `tile` at a time, a thread one pair (i, j) with
// the D elements of u_ij in registers, read in vectors of 16 bytes where they are aligned. What is summed over j goes through shared
// memory, what is summed over i stays in registers until the run ends. Blocks merge the partial sums of the launch before by themselves,
// in the slots' order: no atomics, and sizes and the number of SMs fix the order.
// Floors: u read once an iteration (after the first from L2), the gradient written once; 4 flops an element an iteration.
// Source: Sabour et al., "Dynamic Routing Between Capsules", 2017.
#include <algorithm>
#include <cmath>

#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "../conv/vectors.cuh"
#include "routing_cuda.h"

namespace pyops::capsule {
namespace {

constexpr int kThreads = 256, kMostElements = 32, kMostTerms = 16384, kMostSlots = 64;

struct RoutingParams {
  const void *input, *grad;
  float* sums;
  void* output;
  const float* before;  // the last pass's partials
  float *partials, *grads, *terms;
  int64_t step_input, step_sample;  // elements
  int N, I, J, D, T, t;             // t: the iteration of this launch
  int tile, slots, run;             // inputs at a time; blocks of a sample; tiles of a block
  int groups;                       // of a tile's inputs, each summed by itself
  bool vectors, stop_gradient;
  PYOPS_HOST_DEVICE int first() const { return stop_gradient ? T - 1 : 0; }
};

// A block's place, and its shared memory: two rooms where threads show a value each, then vectors of J * D.
struct Place {
  float* shared;
  int n, slot, thread, i, j, shown;

  PYOPS_DEVICE explicit Place(const RoutingParams& p) : shared(reinterpret_cast<float*>(dynamic_shared())), shown(0) {
    n = static_cast<int>(blockIdx.x) / p.slots, slot = static_cast<int>(blockIdx.x) % p.slots;
    thread = static_cast<int>(threadIdx.x), i = thread / p.J, j = thread % p.J;
  }
  // [J][D] with rows an odd distance apart, so that threads of different j meet no bank twice.
  PYOPS_DEVICE static int stride(const RoutingParams& p) { return p.D | 1; }
  PYOPS_DEVICE float* vector(const RoutingParams& p, int index) const { return shared + 2 * kThreads + index * p.J * stride(p); }
  // Every thread's value, until the call after the next.
  PYOPS_DEVICE const float* show(float value) {
    float* const room = shared + (shown++ & 1) * kThreads;
    room[thread] = value;
    __syncthreads();
    return room;
  }
};

// f(element of a vector in shared memory, element of one in global memory) for this thread's share.
template <class F>
PYOPS_DEVICE void each(const RoutingParams& p, const Place& me, F&& f) {
  for (int e = me.thread; e < p.J * p.D; e += kThreads) f(e / p.D * Place::stride(p) + e % p.D, e);
}

PYOPS_DEVICE float merged(const RoutingParams& p, const Place& me, int e) {
  const float* const at = p.before + (static_cast<int64_t>(me.n) * p.slots * p.J * p.D + e);
  float sum = 0.f;
  for (int slot = 0; slot < p.slots; ++slot) sum += at[static_cast<int64_t>(slot) * p.J * p.D];
  return sum;
}

// to += squash(s). Ends with a barrier.
PYOPS_DEVICE void add_squashed(const RoutingParams& p, const Place& me, const float* s, float* to) {
  for (int j = me.thread; j < p.J; j += kThreads) {
    const int row = j * Place::stride(p);
    float square = 0.f;
    for (int d = 0; d < p.D; ++d) square += s[row + d] * s[row + d];
    const float scale = sqrtf(square) / (1.f + square);
    for (int d = 0; d < p.D; ++d) to[row + d] += s[row + d] * scale;
  }
  __syncthreads();
}
PYOPS_DEVICE float* sums_of(const RoutingParams& p, const Place& me, int t) {
  return p.sums + (static_cast<int64_t>(me.n) * p.T + t) * p.J * p.D;
}
// to = v_0 + .. + v_(count-1), from the sums of launches before the last; s: scratch. Ends with a barrier.
PYOPS_DEVICE void add_earlier(const RoutingParams& p, const Place& me, int count, float* s, float* to) {
  each(p, me, [&](int at, int) { to[at] = 0.f; });
  for (int t = 0; t < count; ++t) {
    const float* const from = sums_of(p, me, t);
    each(p, me, [&](int at, int e) { s[at] = from[e]; });
    __syncthreads();
    add_squashed(p, me, s, to);
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------------------- a pair of capsules

template <class T, int kD>
PYOPS_DEVICE void load_votes(const RoutingParams& p, const T* from, float (&u)[kD]) {
  constexpr int V = 16 / sizeof(T);
  PYOPS_UNROLL
  for (int d = 0; d < kD; d += V) {
    if (p.vectors) {
      float part[V];
      conv::load_or_zero<T, V>(d < p.D, from + d, part);
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) u[d + v] = part[v];
    } else {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) u[d + v] = d + v < p.D ? to_float(from[d + v]) : 0.f;
    }
  }
}
template <class T, int kD>
PYOPS_DEVICE void store_votes(const RoutingParams& p, T* to, const float (&u)[kD]) {
  constexpr int V = 16 / sizeof(T);
  PYOPS_UNROLL
  for (int d = 0; d < kD; d += V) {
    if (p.vectors) {
      float part[V];
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v) part[v] = u[d + v];
      if (d < p.D) conv::store_channels<T, V>(to + d, part);
    } else {
      PYOPS_UNROLL
      for (int v = 0; v < V; ++v)
        if (d + v < p.D) to[d + v] = from_float<T>(u[d + v]);
    }
  }
}
template <int kD>
PYOPS_DEVICE void load_row(const RoutingParams& p, const Place& me, const float* vector, float (&to)[kD]) {
  PYOPS_UNROLL
  for (int d = 0; d < kD; ++d) to[d] = d < p.D ? vector[me.j * Place::stride(p) + d] : 0.f;
}
template <int kD>
PYOPS_DEVICE float product(const float (&a)[kD], const float (&b)[kD]) {
  float even = 0.f, odd = 0.f;
  PYOPS_UNROLL
  for (int d = 0; d < kD; d += 2) even += a[d] * b[d], odd += a[d + 1] * b[d + 1];
  return even + odd;
}
// Of the J values shown for this thread's input; threads beyond the tile read those of its first.
PYOPS_DEVICE const float* own_input(const RoutingParams& p, const Place& me, const float* room) {
  return room + (me.i < p.tile ? me.i : 0) * p.J;
}
PYOPS_DEVICE float sum_over_outputs(const RoutingParams& p, Place& me, float value) {
  const float* const row = own_input(p, me, me.show(value));
  float sum = 0.f;
  for (int j = 0; j < p.J; ++j) sum += row[j];
  return sum;
}
PYOPS_DEVICE float coupling(const RoutingParams& p, Place& me, float logit) {
  const float* const row = own_input(p, me, me.show(logit));
  float most = row[0];
  for (int j = 1; j < p.J; ++j) most = row[j] > most ? row[j] : most;
  const float share = exact_exp(logit - most);
  return share / sum_over_outputs(p, me, share);
}
PYOPS_DEVICE float logit_gradient(const RoutingParams& p, Place& me, float c, float share) {
  return c * (share - sum_over_outputs(p, me, c * share));
}

// f(u_ij, where it is, whether it exists) for each of this thread's inputs; all threads of the block together.
template <class T, int kD, class F>
PYOPS_DEVICE void each_vote(const RoutingParams& p, const Place& me, F&& f) {
  PYOPS_NO_UNROLL
  for (int step = 0; step < p.run; ++step) {
    const int64_t i = (static_cast<int64_t>(me.slot) * p.run + step) * p.tile + me.i;
    const bool exists = me.i < p.tile && i < p.I;
    const int64_t at = exists ? me.n * p.step_sample + i * p.step_input + me.j * p.D : 0;
    float u[kD];
    load_votes<T, kD>(p, static_cast<const T*>(p.input) + at, u);
    f(u, at, exists);
  }
}
// The block's sums over its inputs, to partials. In two steps, for accuracy as for speed: a tile has up to 256 inputs.
template <int kD>
PYOPS_DEVICE void store_sums(const RoutingParams& p, Place& me, const float (&sums)[kD]) {
  float* const to = p.partials + (static_cast<int64_t>(me.n) * p.slots + me.slot) * p.J * p.D;
  PYOPS_UNROLL
  for (int d = 0; d < kD; ++d) {
    if (d >= p.D) break;
    const float* room = me.show(sums[d]);
    float sum = 0.f;
    if (me.i < p.groups)
      for (int i = me.i; i < p.tile; i += p.groups) sum += room[i * p.J + me.j];
    room = me.show(sum);
    if (me.i > 0) continue;
    float all = 0.f;
    for (int group = 0; group < p.groups; ++group) all += room[group * p.J + me.j];
    to[me.j * p.D + d] = all;
  }
}

// ------------------------------------------------------------------------------------------------------------------------- forward

template <class T, int kD>
PYOPS_KERNEL(kThreads)
routing_pass(RoutingParams p) {
  Place me(p);
  float *const s = me.vector(p, 0), *const earlier = me.vector(p, 1);
  add_earlier(p, me, p.t - 1, s, earlier);
  if (p.t > 0) {
    float* const kept = sums_of(p, me, p.t - 1);
    each(p, me, [&](int at, int e) {
      s[at] = merged(p, me, e);
      if (me.slot == 0) kept[e] = s[at];
    });
    __syncthreads();
    add_squashed(p, me, s, earlier);
  }
  float with[kD], sums[kD];
  load_row(p, me, earlier, with);
  PYOPS_UNROLL
  for (int d = 0; d < kD; ++d) sums[d] = 0.f;
  each_vote<T, kD>(p, me, [&](const float (&u)[kD], int64_t, bool exists) {
    const float c = coupling(p, me, product(u, with)), weight = exists ? c : 0.f;
    PYOPS_UNROLL
    for (int d = 0; d < kD; ++d) sums[d] += weight * u[d];
  });
  store_sums(p, me, sums);
}

template <class T>
PYOPS_KERNEL(kThreads)
routing_finish(RoutingParams p) {
  const Place me(p);
  float *const s = me.vector(p, 0), *const v = me.vector(p, 1), *const kept = sums_of(p, me, p.T - 1);
  if (me.slot != 0) return;
  each(p, me, [&](int at, int e) { v[at] = 0.f, s[at] = merged(p, me, e), kept[e] = s[at]; });
  __syncthreads();
  add_squashed(p, me, s, v);
  T* const output = static_cast<T*>(p.output) + static_cast<int64_t>(me.n) * p.J * p.D;
  each(p, me, [&](int at, int e) { output[e] = from_float<T>(v[at]); });
}

// ------------------------------------------------------------------------------------------------------------------------ gradient

// earlier = V, outer = h of iteration p.t; s = scratch. h is squash'(s_t) times the gradient of v_t: the call's, or what later iterations
// found. Ends with a barrier.
template <class T>
PYOPS_DEVICE void begin_gradient(const RoutingParams& p, const Place& me, float* s, float* earlier, float* outer) {
  const int64_t size = static_cast<int64_t>(p.N) * p.J * p.D, own = static_cast<int64_t>(me.n) * p.J * p.D;
  add_earlier(p, me, p.t, s, earlier);
  const float* const from = sums_of(p, me, p.t);
  each(p, me, [&](int at, int e) {
    s[at] = from[e];
    float g;
    if (p.t == p.T - 1) g = to_float(static_cast<const T*>(p.grad)[own + e]);
    else {
      g = merged(p, me, e) + (p.t == p.T - 2 ? 0.f : p.grads[(p.t + 1) * size + own + e]);
      if (me.slot == 0) p.grads[p.t * size + own + e] = g;
    }
    outer[at] = g;
  });
  __syncthreads();
  for (int j = me.thread; j < p.J; j += kThreads) {
    const int row = j * Place::stride(p);
    float square = 0.f, dot = 0.f;
    for (int d = 0; d < p.D; ++d) square += s[row + d] * s[row + d], dot += s[row + d] * outer[row + d];
    const float length = sqrtf(square), below = 1.f + square;
    const float along = length > 0.f ? dot * (1.f - square) / (below * below * length) : 0.f;
    for (int d = 0; d < p.D; ++d) outer[row + d] = outer[row + d] * (length / below) + s[row + d] * along;
  }
  __syncthreads();
}
PYOPS_DEVICE float* terms_of(const RoutingParams& p, const Place& me, int t) {
  return p.terms + (static_cast<int64_t>(me.n) * p.T + t) * 2 * p.J * p.D;
}

template <class T, int kD>
PYOPS_KERNEL(kThreads)
routing_gradient_pass(RoutingParams p) {
  Place me(p);
  float *const earlier = me.vector(p, 1), *const outer = me.vector(p, 2);
  begin_gradient<T>(p, me, me.vector(p, 0), earlier, outer);
  if (me.slot == 0) {
    float* const terms = terms_of(p, me, p.t);
    each(p, me, [&](int at, int e) { terms[e] = earlier[at], terms[p.J * p.D + e] = outer[at]; });
  }
  float with[kD], h[kD], sums[kD];
  load_row(p, me, earlier, with), load_row(p, me, outer, h);
  PYOPS_UNROLL
  for (int d = 0; d < kD; ++d) sums[d] = 0.f;
  each_vote<T, kD>(p, me, [&](const float (&u)[kD], int64_t, bool exists) {
    const float l = logit_gradient(p, me, coupling(p, me, product(u, with)), product(u, h)), weight = exists ? l : 0.f;
    PYOPS_UNROLL
    for (int d = 0; d < kD; ++d) sums[d] += weight * u[d];
  });
  store_sums(p, me, sums);
}

// All iterations' shares of the gradient at once. Vectors: scratch, then V and h of each iteration from the first on.
template <class T, int kD>
PYOPS_KERNEL(kThreads)
routing_write(RoutingParams p) {
  Place me(p);
  begin_gradient<T>(p, me, me.vector(p, 0), me.vector(p, 1), me.vector(p, 2));
  for (int t = p.t + 1; t < p.T; ++t) {
    const float* const terms = terms_of(p, me, t);
    float *const earlier = me.vector(p, 1 + 2 * (t - p.t)), *const outer = me.vector(p, 2 + 2 * (t - p.t));
    each(p, me, [&](int at, int e) { earlier[at] = terms[e], outer[at] = terms[p.J * p.D + e]; });
  }
  __syncthreads();
  each_vote<T, kD>(p, me, [&](const float (&u)[kD], int64_t at, bool exists) {
    float with[kD], h[kD], found[kD];
    load_row(p, me, me.vector(p, 1), with), load_row(p, me, me.vector(p, 2), h);
    const float c = coupling(p, me, product(u, with));
    PYOPS_UNROLL
    for (int d = 0; d < kD; ++d) found[d] = c * h[d];
    PYOPS_NO_UNROLL
    for (int t = p.t + 1; t < p.T; ++t) {
      load_row(p, me, me.vector(p, 1 + 2 * (t - p.t)), with), load_row(p, me, me.vector(p, 2 + 2 * (t - p.t)), h);
      const float c = coupling(p, me, product(u, with)), l = logit_gradient(p, me, c, product(u, h));
      PYOPS_UNROLL
      for (int d = 0; d < kD; ++d) found[d] += c * h[d] + l * with[d];
    }
    if (exists) store_votes<T, kD>(p, static_cast<T*>(p.output) + at, found);
  });
}

// ------------------------------------------------------------------------------------------------------------------------ launches

RoutingParams routing_params(const Routing& p) {
  if (p.J > kThreads || p.D > kMostElements || p.J * (p.D + 1) * p.T > kMostTerms)
    throw std::runtime_error("routing between capsules on a GPU: up to " + std::to_string(kThreads) + " outputs of " +
                             std::to_string(kMostElements) + " elements, J * (D + 1) * T up to " + std::to_string(kMostTerms));
  if (p.I > INT32_MAX / 2 || p.N > INT32_MAX / kMostSlots) throw std::runtime_error("routing between capsules: too much for one launch");
  RoutingParams r{};
  r.input = p.input, r.grad = p.grad, r.sums = p.sums, r.output = p.output;
  r.N = static_cast<int>(p.N), r.I = static_cast<int>(p.I), r.J = static_cast<int>(p.J), r.D = static_cast<int>(p.D);
  r.T = static_cast<int>(p.T), r.stop_gradient = p.stop_gradient != 0;
  r.step_input = p.J * p.D * (p.by_input ? p.N : 1), r.step_sample = p.J * p.D * (p.by_input ? 1 : p.I);
  // two blocks for each SM, of two tiles or more
  r.tile = kThreads / r.J, r.groups = static_cast<int>(std::sqrt(r.tile));
  const int tiles = ceil_div(r.I, r.tile), wanted = ceil_div(2 * device_limits().sm_count, r.N);
  const int slots = std::min({wanted, std::max(tiles / 2, 1), kMostSlots});
  r.run = ceil_div(tiles, slots), r.slots = ceil_div(tiles, r.run);
  const int element = p.dtype == DType::f32 ? 4 : 2;
  r.vectors = conv::vectors_fit(p.D, 16 / element, element, {p.input, p.output});
  return r;
}

LaunchShape routing_shape(const RoutingParams& r, int vectors) {
  const size_t floats = 2 * kThreads + static_cast<size_t>(vectors) * r.J * (r.D | 1);
  return {dim3(static_cast<unsigned>(r.N * r.slots)), kThreads, sizeof(float) * floats};
}

// Calls f(a value of the storage type, the most elements as a constant).
template <class F>
void with_size(const Routing& p, F&& f) {
  conv::with_type(p.dtype, [&](auto type) {
    if (p.D <= 16) f(type, std::integral_constant<int, 16>{});
    else f(type, std::integral_constant<int, 32>{});
  });
}

}  // namespace

size_t routing_workspace(const Routing& p, bool gradient) {
  if (p.N == 0) return 0;
  const int64_t partials = 2 * int64_t{routing_params(p).slots};
  return sizeof(float) * static_cast<size_t>(p.N * p.J * p.D * (partials + (gradient ? 3 * p.T : 0)));
}

void routing(const Routing& p, void* workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  RoutingParams r = routing_params(p);
  const int64_t size = int64_t{r.slots} * p.N * p.J * p.D;
  float* const space = static_cast<float*>(workspace);
  const LaunchShape shape = routing_shape(r, 2);
  with_size(p, [&](auto type, auto elements) {
    using T = decltype(type);
    for (r.t = 0; r.t < r.T; ++r.t) {
      r.before = space + (r.t + 1) % 2 * size, r.partials = space + r.t % 2 * size;
      launch("routing_pass", routing_pass<T, decltype(elements)::value>, shape, stream, r);
    }
    r.before = r.partials;
    launch("routing_finish", routing_finish<T>, shape, stream, r);
  });
}

void routing_gradient(const Routing& p, void* workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  RoutingParams r = routing_params(p);
  const int64_t sample = p.J * p.D, size = int64_t{r.slots} * p.N * sample;
  float* const space = static_cast<float*>(workspace);
  r.grads = space + 2 * size, r.terms = r.grads + p.T * p.N * sample;
  with_size(p, [&](auto type, auto elements) {
    using T = decltype(type);
    constexpr int kD = decltype(elements)::value;
    for (r.t = r.T - 1; r.t > r.first(); --r.t) {
      r.before = space + (r.t + 1) % 2 * size, r.partials = space + r.t % 2 * size;
      launch("routing_gradient_pass", routing_gradient_pass<T, kD>, routing_shape(r, 3), stream, r);
    }
    r.before = space + (r.t + 1) % 2 * size;
    launch("routing_write", routing_write<T, kD>, routing_shape(r, 1 + 2 * (r.T - r.t)), stream, r);
  });
}

#define PYOPS_ROUTING_KERNELS(T, kD) \
  PYOPS_KERNEL_INFO(routing_pass, T, kD), PYOPS_KERNEL_INFO(routing_gradient_pass, T, kD), PYOPS_KERNEL_INFO(routing_write, T, kD)
#define PYOPS_ALL_ROUTING_KERNELS(T) PYOPS_KERNEL_INFO(routing_finish, T), PYOPS_ROUTING_KERNELS(T, 16), PYOPS_ROUTING_KERNELS(T, 32)

static const KernelRegistration registration({PYOPS_ALL_ROUTING_KERNELS(float), PYOPS_ALL_ROUTING_KERNELS(bf16),
                                              PYOPS_ALL_ROUTING_KERNELS(f16)});

}  // namespace pyops::capsule
