// The list of compiled kernels, so that a test or `pyops env` can ask a kernel by name for its registers and shared memory
// (cudaFuncGetAttributes on `function`). A kernel file adds its kernels with one static `KernelRegistration` at its foot.
// Every kernel runs in host execution, but for one that only Hopper can run: that one names the portable kernel of its op.
#pragma once

namespace pyops {

struct KernelInfo {
  const char* name;                // "one_cta_forward<Kind::lstm, bf16, 8>"
  const void* function;            // what cudaFuncGetAttributes takes
  const char* portable = nullptr;  // Hopper only: the kernel that computes the same on every GPU, and on the host
};

constexpr int kMaxKernels = 512;

struct KernelTable {
  KernelInfo kernels[kMaxKernels];
  int count;
};

inline KernelTable& mutable_kernel_table() {
  static KernelTable table{};  // built on first use: registrations of several files run in no fixed order
  return table;
}

inline const KernelInfo* kernel_table(int* count) {
  *count = mutable_kernel_table().count;
  return mutable_kernel_table().kernels;
}

struct KernelRegistration {
  template <int N>
  explicit KernelRegistration(const KernelInfo (&kernels)[N]) {
    KernelTable& table = mutable_kernel_table();
    for (const KernelInfo& kernel : kernels)
      if (table.count < kMaxKernels) table.kernels[table.count++] = kernel;
  }
};

// One instance of a kernel template: PYOPS_KERNEL_INFO(one_cta_forward, Kind::lstm, bf16, 8).
#define PYOPS_KERNEL_INFO(kernel, ...) \
  ::pyops::KernelInfo { #kernel "<" #__VA_ARGS__ ">", reinterpret_cast<const void*>(&kernel<__VA_ARGS__>) }

// The same of a kernel that needs wgmma, TMA or clusters: PYOPS_HOPPER_KERNEL_INFO("gemm<bf16>", gemm_wgmma, bf16). Its source is
// for nvcc alone, so the host build only knows its name.
#if defined(__CUDACC__)
#define PYOPS_HOPPER_KERNEL_INFO(portable, kernel, ...) \
  ::pyops::KernelInfo { #kernel "<" #__VA_ARGS__ ">", reinterpret_cast<const void*>(&kernel<__VA_ARGS__>), portable }
#else
#define PYOPS_HOPPER_KERNEL_INFO(portable, kernel, ...) \
  ::pyops::KernelInfo { #kernel "<" #__VA_ARGS__ ">", nullptr, portable }
#endif

}  // namespace pyops
