// Threads and scratch memory of the CPU kernels. Everything here is compiled once, for the baseline instruction set;
// kernels only call it.
//
// Threads are torch's own pool (never a second OpenMP runtime). A `Team` is a persistent region: every member runs the
// same function once and they meet at barriers, so that a layer of T steps wakes the pool once, not T times.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyops::cpu {

// The instruction set in use: "avx512", "avx2" or "baseline". Chosen once by CPUID; PYOPS_CPU_ISA overrides it.
// Throws std::runtime_error when the variable names one that this machine lacks.
const char* cpu_isa();

int max_threads();  // torch.get_num_threads()

// One member's part of a barrier, a cache line that only it writes. Members stand in an array, zeroed before first use.
struct alignas(64) Barrier {
  int32_t reached[15] = {};  // per round: number of the last barrier it came to
  int32_t count = 0;         // barriers passed
};
// Returns when all `size` members have come. Spins, and yields the core after a bound.
void wait(Barrier* members, int rank, int size);

// What is left of a member's share of pieces of work, a cache line for each. Members stand in an array, zeroed before first use.
struct alignas(64) Share {
  uint64_t word = 0;  // number of the deal, first piece, end
};
constexpr int64_t kMostPieces = int64_t{1} << 22;
// A piece of deal `number` of n < kMostPieces: the next of the member's own even share, or the last of another's; -1: none is left.
int64_t take(Share* members, int rank, int size, int64_t n, uint64_t number);

struct Team {
  int rank, size;
  Barrier* members;
  Share* shares;
  mutable uint64_t deals = 0;

  void sync() const { wait(members, rank, size); }

  // f(i) for 0 <= i < n. Each member takes its share in order and then from those who are late: cores that others use too
  // differ in speed, two of Sapphire Rapids by a sixth on average. All members call it, with the same n.
  template <class F>
  void deal(int64_t n, const F& f) const {
    const int64_t each = n / kMostPieces + 1, pieces = (n + each - 1) / each;
    ++deals;
    for (int64_t piece; (piece = take(shares, rank, size, pieces, deals)) >= 0;)
      for (int64_t i = piece * each; i < n && i < (piece + 1) * each; ++i) f(i);
  }
};

// Runs body(team, context) on up to `threads` threads, the caller being one of them. The pool may grant fewer (nested
// regions, thread limits): team.size says how many there are. `body` must not throw.
void run_team(int threads, void (*body)(const Team& team, void* context), void* context);

// The calling thread's scratch memory, 64-byte aligned, contents undefined, valid until its next call of `scratch`.
// Fresh pages cost up to three times the work done on them, so the block is kept (up to 256 MiB) between calls.
void* scratch(size_t bytes);

// Lays several arrays out in one block: run once with a null base to learn the size, once more with the block.
struct Layout {
  char* base;
  size_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

}  // namespace pyops::cpu
