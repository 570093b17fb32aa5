// CUDA's execution model on the host, so that a kernel's own source runs, checked, where there is no GPU.
//
// Every CUDA thread is a fiber. Blocks run one after another in random order; a cooperative launch runs all its blocks
// together. Which ready fiber runs next is drawn from `machine().seed`, so a missing barrier shows as a result that
// depends on the seed. A fiber gives way only at a barrier, at a warp-wide operation or at `wait_at_least`.
// Dynamic shared memory is its own heap block per CUDA block, filled with 0xFF (NaN in every float type), so that
// AddressSanitizer sees overruns and arithmetic on unwritten memory shows. When no fiber can go on, the launch throws
// with the barrier that was not reached by all. Weak memory ordering, bank conflicts and speed are not modelled.
// CUDA's own names are in cuda_host_intrinsics.h, ptx.cuh's wrappers in cuda_host_ptx.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
typedef struct CUstream_st* cudaStream_t;

namespace pyops::host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;  // reserved, not touched: only used pages cost memory
constexpr size_t kSlotBytes = 64;           // what one lane brings to a warp-wide operation

// ---------------------------------------------------------------------------------------------------------- stacks

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, then continues on another. Weak: every kernel file has a copy.
asm(R"(
  .text
  .weak pyops_switch_stack
  .type pyops_switch_stack, @function
pyops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size pyops_switch_stack, .-pyops_switch_stack
)");
extern "C" void pyops_switch_stack(void** save, void* to);

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + bytes - 16);
    top[0] = reinterpret_cast<void*>(entry);  // reached by the `ret`; the stack is then 8 off 16, as after a call
    sp = top - 6;
    std::memset(sp, 0, 6 * sizeof(void*));
  }
  void switch_to(Context& to) { pyops_switch_stack(&sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& to) { swapcontext(&context, &to.context); }
};
#endif

// ------------------------------------------------------------------------------------------------- blocks and threads

struct Fiber;

struct Barrier {
  int expected = 0;
  const char* what = "";  // the operation the waiting threads are in
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[kWarp][kSlotBytes];
};

struct Block {
  dim3 index;
  unsigned char* shared = nullptr;
  Barrier barrier;
  int vote = 0, vote_result = 0;
  std::vector<Warp> warps;
};

struct PendingCopy {  // cp.async: lands at its wait, not before
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  dim3 index;
  int linear = 0;
  const unsigned* spin_on = nullptr;
  unsigned spin_for = 0;
  std::vector<PendingCopy> copies;
  int copy_group = 0;
};

struct Launched {  // what launches of one kernel have asked for so far
  const char* name = "";
  int launches = 0, threads = 0;
  size_t shared_bytes = 0;
};

struct Machine {
  // Set by the test driver.
  uint64_t seed = 0;
  int sm_count = 108;
  int shared_limit = 163 * 1024;

  // The launch in flight.
  dim3 grid, block;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<Fiber*> ready, spinning;
  std::vector<char*> stacks;
  size_t alive = 0;
  std::exception_ptr error;
  std::mt19937_64 random;

  std::map<const void*, Launched> launched;  // by the kernel's address, so that a test can tell which kernels it has run
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void note_launch(const char* name, const void* kernel, int threads, size_t shared_bytes) {
  Launched& known = machine().launched[kernel];
  known.name = name;
  ++known.launches;
  if (threads > known.threads) known.threads = threads;
  if (shared_bytes > known.shared_bytes) known.shared_bytes = shared_bytes;
}

inline void leave_fiber(bool for_good) {
  Machine& m = machine();
  Fiber* self = m.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
  self->context.switch_to(m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  (void)for_good;
}

inline void fiber_entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  try {
    (*m.body)();
    if (!m.current->copies.empty()) throw std::runtime_error("a thread ended with cp.async copies it never waited for");
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  --m.alive;
  leave_fiber(true);
}

inline void enter_fiber(Fiber* fiber) {
  Machine& m = machine();
  m.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber->stack, kStackBytes);
#endif
  m.scheduler.switch_to(fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// All of `barrier`'s threads meet; the last to come runs `last`, then all go on.
template <class Last>
inline void meet(Barrier& barrier, const char* what, Last&& last) {
  Machine& m = machine();
  if (!barrier.waiting.empty() && std::strcmp(barrier.what, what) != 0)
    throw std::runtime_error(std::string("threads that must go together are in ") + barrier.what + " and in " + what);
  barrier.what = what;
  barrier.waiting.push_back(m.current);
  if (static_cast<int>(barrier.waiting.size()) == barrier.expected) {
    last();
    m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  leave_fiber(false);
}

inline Warp& current_warp() {
  Fiber* self = machine().current;
  return self->block->warps[self->linear / kWarp];
}
inline int current_lane() { return machine().current->linear % kWarp; }

// Every lane brings `mine`; the last to come runs `all(slots)` once for the warp; each lane gets its slot back.
template <class T, class All>
inline T warp_operation(const char* what, const T& mine, All&& all) {
  static_assert(sizeof(T) <= kSlotBytes);
  Warp& warp = current_warp();
  const int lane = current_lane();
  std::memcpy(warp.slots[lane], &mine, sizeof(T));
  T result;
  // Each lane's answer goes to where that lane will look, its own slot: nobody reuses the slots before all have left,
  // since the next operation of this warp completes only after each lane has picked up its answer.
  meet(warp.barrier, what, [&] {
    T lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) std::memcpy(&lanes[i], warp.slots[i], sizeof(T));
    all(lanes);
    for (int i = 0; i < kWarp; ++i) std::memcpy(warp.slots[i], &lanes[i], sizeof(T));
  });
  std::memcpy(&result, warp.slots[lane], sizeof(T));
  return result;
}

// A thread that polls a flag: it sleeps until the flag is high enough, and a flag nobody will raise is a deadlock.
inline void wait_at_least(const unsigned* flag, unsigned value) {
  Machine& m = machine();
  m.current->spin_on = flag;
  m.current->spin_for = value;
  m.spinning.push_back(m.current);
  leave_fiber(false);
}

inline void wake_spinning() {
  Machine& m = machine();
  size_t kept = 0;
  for (Fiber* fiber : m.spinning)
    if (static_cast<int>(*fiber->spin_on - fiber->spin_for) >= 0) m.ready.push_back(fiber);
    else m.spinning[kept++] = fiber;
  m.spinning.resize(kept);
}

// ----------------------------------------------------------------------------------------------------------- launches

inline std::string describe_stuck(const std::vector<Block>& blocks, size_t spinning) {
  std::string text = "deadlock: no thread can go on";
  for (const Block& block : blocks) {
    auto add = [&](const Barrier& barrier, const std::string& who) {
      if (!barrier.waiting.empty())
        text += "; block " + std::to_string(block.index.x) + who + ": " + std::to_string(barrier.waiting.size()) + " of " +
                std::to_string(barrier.expected) + " threads reached " + barrier.what;
    };
    add(block.barrier, "");
    for (size_t w = 0; w < block.warps.size(); ++w) add(block.warps[w].barrier, " warp " + std::to_string(w));
    if (text.size() > 600) break;
  }
  if (spinning) text += "; " + std::to_string(spinning) + " threads wait for a flag";
  return text;
}

inline void run_blocks(const std::vector<unsigned>& ids, size_t shared_bytes) {
  Machine& m = machine();
  const unsigned threads = m.block.x;
  std::vector<Block> blocks(ids.size());
  std::vector<Fiber> fibers(ids.size() * threads);
  m.ready.clear();
  m.spinning.clear();
  for (size_t k = 0; k < ids.size(); ++k) {
    Block& block = blocks[k];
    block.index = dim3(ids[k] % m.grid.x, ids[k] / m.grid.x % m.grid.y, ids[k] / m.grid.x / m.grid.y);
    block.shared = static_cast<unsigned char*>(std::malloc(shared_bytes ? shared_bytes : 1));
    std::memset(block.shared, 0xFF, shared_bytes);
    block.barrier.expected = static_cast<int>(threads);
    block.warps.resize(threads / kWarp);
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[k * threads + t];
      fiber.block = &block;
      fiber.index = dim3(t, 0, 0);
      fiber.linear = static_cast<int>(t);
      if (m.stacks.size() <= k * threads + t) {
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) throw std::runtime_error("no memory for another thread's stack");
        m.stacks.push_back(static_cast<char*>(stack));
      }
      fiber.stack = m.stacks[k * threads + t];
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // the marks of the thread that had it before
#endif
      fiber.context.prepare(fiber.stack, kStackBytes, fiber_entry);
      m.ready.push_back(&fiber);
    }
  }
  m.alive = fibers.size();
  while (m.alive && !m.error) {
    const uint64_t draw = m.random();
    if (m.ready.empty() || draw % 16 == 0) wake_spinning();
    if (m.ready.empty()) {
      m.error = std::make_exception_ptr(std::runtime_error(describe_stuck(blocks, m.spinning.size())));
      break;
    }
    const size_t pick = (draw >> 8) % m.ready.size();
    Fiber* fiber = m.ready[pick];
    m.ready[pick] = m.ready.back();
    m.ready.pop_back();
    enter_fiber(fiber);
  }
  for (Block& block : blocks) std::free(block.shared);
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, const std::function<void()>& body) {
  Machine& m = machine();
  const unsigned count = grid.x * grid.y * grid.z;
  if (block.y != 1 || block.z != 1 || block.x % kWarp || block.x > 1024) throw std::runtime_error("block shape not supported");
  if (shared_bytes > static_cast<size_t>(m.shared_limit)) throw std::runtime_error("too much shared memory asked for");
  if (cooperative && count > static_cast<unsigned>(m.sm_count)) throw std::runtime_error("cooperative launch too large");
  m.grid = grid;
  m.block = block;
  m.body = &body;
  m.error = nullptr;
  m.random.seed(m.seed);
  std::vector<unsigned> ids(count);
  for (unsigned i = 0; i < count; ++i) ids[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(ids[i - 1], ids[m.random() % i]);
  if (cooperative) run_blocks(ids, shared_bytes);
  else
    for (unsigned id : ids)
      if (!m.error) run_blocks({id}, shared_bytes);
  if (m.error) std::rethrow_exception(m.error);
}

}  // namespace pyops::host
