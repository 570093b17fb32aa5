// CUDA's own names on the host: thread indices, barriers, shuffles, votes and atomics, on top of cuda_host.h's fibers.
// Warp-wide operations take the full mask only. An atomic is one because a fiber gives way at barriers alone.
#pragma once
#include "cuda_host.h"

#define threadIdx (::pyops::host::machine().current->index)
#define blockIdx (::pyops::host::machine().current->block->index)
#define blockDim (::pyops::host::machine().block)
#define gridDim (::pyops::host::machine().grid)

namespace pyops::host {

inline void require_full_warp(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp-wide operation on part of a warp: only the full mask is modelled");
}

// Lane i gets the value of lane source(i, what lane i asked for).
template <class T, class Source>
inline T shuffle(const char* what, unsigned mask, T value, int asked, Source&& source) {
  struct Lane {
    T value;
    int asked;
  };
  require_full_warp(mask);
  return warp_operation(what, Lane{value, asked},
                        [&](Lane* lanes) {
                          T old[kWarp];
                          for (int i = 0; i < kWarp; ++i) old[i] = lanes[i].value;
                          for (int i = 0; i < kWarp; ++i) lanes[i].value = old[source(i, lanes[i].asked)];
                        })
      .value;
}

}  // namespace pyops::host

inline void __syncthreads() {
  pyops::host::meet(pyops::host::machine().current->block->barrier, "__syncthreads", [] {});
}
inline int __syncthreads_or(int predicate) {
  pyops::host::Block& block = *pyops::host::machine().current->block;
  block.vote |= predicate != 0;
  pyops::host::meet(block.barrier, "__syncthreads_or", [&] {
    block.vote_result = block.vote;
    block.vote = 0;
  });
  return block.vote_result;
}
inline void __syncwarp() {
  pyops::host::meet(pyops::host::current_warp().barrier, "__syncwarp", [] {});
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  return pyops::host::shuffle("__shfl_sync", mask, value, source, [](int, int asked) { return asked & 31; });
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return pyops::host::shuffle("__shfl_xor_sync", mask, value, lane_mask, [](int lane, int asked) { return (lane ^ asked) & 31; });
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {  // the first `delta` lanes keep their own
  return pyops::host::shuffle("__shfl_up_sync", mask, value, static_cast<int>(delta),
                              [](int lane, int asked) { return lane < asked ? lane : lane - asked; });
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {  // the last `delta` lanes keep their own
  return pyops::host::shuffle("__shfl_down_sync", mask, value, static_cast<int>(delta),
                              [](int lane, int asked) { return lane + asked > 31 ? lane : lane + asked; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  pyops::host::require_full_warp(mask);
  return pyops::host::warp_operation("__ballot_sync", static_cast<unsigned>(predicate != 0), [](unsigned* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < pyops::host::kWarp; ++i) votes |= lanes[i] << i;
    for (int i = 0; i < pyops::host::kWarp; ++i) lanes[i] = votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T>
inline T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
inline T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <class T>
inline T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
