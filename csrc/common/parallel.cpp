// Instruction-set choice, thread team, barrier and scratch memory (parallel.h).
#include "parallel.h"

#include <sched.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyops::cpu {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Spins until *word reaches `value`. A barrier among running threads opens within a microsecond; past the bound
// (about 20 us) a member has probably lost its core, and this one is given up to it.
void spin_until(const int32_t* word, int32_t value) {
  for (int spins = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) - value < 0; ++spins) {
    if (spins < 2000) relax();
    else sched_yield();
  }
}

bool supported(const char* isa) {
  if (!std::strcmp(isa, "baseline")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx2")) return avx2;
  // F and BW but no BF16 (Skylake to Ice Lake) runs the avx2 level: a fourth build for them is not worth its compile time.
  if (!std::strcmp(isa, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const char* choose_isa() {
  if (const char* wanted = std::getenv("PYOPS_CPU_ISA"); wanted && *wanted) {
    for (const char* isa : {"avx512", "avx2", "baseline"})
      if (!std::strcmp(wanted, isa) && supported(isa)) return isa;
    throw std::runtime_error(std::string("PYOPS_CPU_ISA=") + wanted + ": this machine supports" + (supported("avx512") ? " avx512" : "") +
                             (supported("avx2") ? " avx2" : "") + " baseline");
  }
  return supported("avx512") ? "avx512" : supported("avx2") ? "avx2" : "baseline";
}

struct Region {
  int threads;
  void (*body)(const Team&, void*);
  void* context;
  alignas(64) int32_t chunk = 0;  // items per worker, published by the worker that got item 0
  Barrier* members = nullptr;
  Share* shares = nullptr;
};

// torch gives each worker one contiguous range of the `threads` items. The first worker's range is never the short one,
// so its length is the chunk, and chunk and range start give every worker its rank.
void worker(int64_t begin, int64_t end, void* context) {
  Region& region = *static_cast<Region*>(context);
  if (begin == 0) __atomic_store_n(&region.chunk, static_cast<int32_t>(end), __ATOMIC_RELEASE);
  else spin_until(&region.chunk, 1);
  const int chunk = __atomic_load_n(&region.chunk, __ATOMIC_ACQUIRE);
  const Team team{static_cast<int>(begin / chunk), (region.threads + chunk - 1) / chunk, region.members, region.shares};
  region.body(team, region.context);
}

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

const char* cpu_isa() {
  static const char* const isa = choose_isa();
  return isa;
}

int max_threads() {
  uint32_t threads = 1;
  return torch_get_num_threads(&threads) == 0 && threads > 1 ? static_cast<int>(threads) : 1;
}

// Dissemination barrier: in round k a member tells the one 2^k after it that it has come, and waits for the one 2^k before. No
// read-modify-write and, for two threads, one cache line across each way: a counter took four, 2 us a step between distant cores.
void wait(Barrier* members, int rank, int size) {
  if (size <= 1) return;
  Barrier& own = members[rank];
  const int32_t number = ++own.count;
  for (int round = 0, distance = 1; distance < size; ++round, distance *= 2) {
    __atomic_store_n(&own.reached[round], number, __ATOMIC_RELEASE);
    spin_until(&members[(rank + size - distance) % size].reached[round], number);
  }
}

int64_t take(Share* members, int rank, int size, int64_t n, uint64_t number) {
  constexpr int kBits = 22;
  constexpr uint64_t kMask = kMostPieces - 1;
  number &= kMask >> 2;  // what is left of the word
  for (int i = 0; i < size; ++i) {
    const int owner = (rank + i) % size;
    uint64_t* const at = &members[owner].word;
    uint64_t word = __atomic_load_n(at, __ATOMIC_RELAXED);
    for (;;) {
      const bool begun = word >> 2 * kBits == number;  // else the word is of an earlier deal, or of a later one: then nothing is left
      if (!begun && ((word >> 2 * kBits) - number) % (kMask / 4 + 1) < kMask / 8) break;
      uint64_t first = begun ? word >> kBits & kMask : n * owner / size, end = begun ? word & kMask : n * (owner + 1) / size;
      if (first >= end) break;
      const uint64_t piece = i == 0 ? first++ : --end, left = number << 2 * kBits | first << kBits | end;
      if (__atomic_compare_exchange_n(at, &word, left, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return static_cast<int64_t>(piece);
    }
  }
  return -1;
}

void run_team(int threads, void (*body)(const Team&, void*), void* context) {
  constexpr int kFew = 16;
  Barrier few_barriers[kFew];
  Share few_shares[kFew];
  if (threads <= 1) return body({0, 1, few_barriers, few_shares}, context);
  std::unique_ptr<Barrier[]> barriers(threads > kFew ? new Barrier[threads] : nullptr);
  std::unique_ptr<Share[]> shares(threads > kFew ? new Share[threads] : nullptr);
  Region region{threads, body, context};
  region.members = barriers ? barriers.get() : few_barriers, region.shares = shares ? shares.get() : few_shares;
  if (torch_parallel_for(0, threads, 1, worker, &region) != 0) throw std::runtime_error("torch_parallel_for failed");
}

void* scratch(size_t bytes) {
  constexpr size_t kKept = size_t{256} << 20, kHuge = size_t{2} << 20;
  thread_local Block block;
  // Grow when too small; let a block beyond the cap go as soon as a call fits below it.
  if (bytes > block.bytes || (block.bytes > kKept && bytes <= kKept)) {
    std::free(block.data);
    block.data = nullptr, block.bytes = 0;
    const size_t rounded = bytes < kHuge ? (bytes + 4095) / 4096 * 4096 : (bytes + kHuge - 1) / kHuge * kHuge;
    if (posix_memalign(&block.data, bytes < kHuge ? 64 : kHuge, rounded) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (rounded >= kHuge) madvise(block.data, rounded, MADV_HUGEPAGE);  // 512 times fewer faults, fewer TLB misses
#endif
    block.bytes = rounded;
  }
  return block.data;
}

}  // namespace pyops::cpu
