// The list of compiled kernels, so that a test or `pyops env` can ask a kernel by name for its registers and shared memory
// (cudaFuncGetAttributes on `function`). A kernel file adds its kernels with one static `KernelRegistration` at its foot.
#pragma once

namespace pyops {

struct KernelInfo {
  const char* name;      // "one_cta_forward<Kind::lstm, bf16, 8>"
  const void* function;  // what cudaFuncGetAttributes takes
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

}  // namespace pyops
