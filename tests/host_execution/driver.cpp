// C interface to the kernels compiled for the host: what tests/test_host_execution.py calls through ctypes.
#include <cstdio>

#include "../../csrc/common/cuda_registry.h"
#include "../../csrc/common/launch.cuh"
#include "../../csrc/rnn/scan.cuh"

using namespace pyops;
using namespace pyops::rnn;

namespace {

template <class F>
int guarded(char* error, int error_bytes, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, static_cast<size_t>(error_bytes), "%s", e.what());
    return 1;
  }
}

std::optional<Path> path_or_auto(int path) { return path < 0 ? std::nullopt : std::optional<Path>(static_cast<Path>(path)); }

}  // namespace

extern "C" {

void host_machine(uint64_t seed, int sm_count, int shared_limit) {
  host::machine().seed = seed;
  host::machine().sm_count = sm_count;
  host::machine().shared_limit = shared_limit;
}

int host_scan_workspace(int cell, int dtype, int64_t T, int64_t B, int64_t H, int backward, int path, int64_t* bytes, char* error,
                        int error_bytes) {
  return guarded(error, error_bytes, [&] {
    *bytes = static_cast<int64_t>(
        scan_workspace(static_cast<Cell>(cell), static_cast<DType>(dtype), T, B, H, backward != 0, path_or_auto(path)));
  });
}

int host_scan_forward(const ScanForward* p, int path, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { scan_forward(*p, nullptr, path_or_auto(path)); });
}

int host_scan_backward(const ScanBackward* p, int path, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { scan_backward(*p, nullptr, path_or_auto(path)); });
}

int host_choose_path(int cell, int dtype, int64_t B, int64_t H, int backward, int sm_count, int shared_bytes) {
  return static_cast<int>(
      choose_path(static_cast<Cell>(cell), static_cast<DType>(dtype), B, H, backward != 0, sm_count, shared_bytes).path);
}

// The registered kernels' names, one per line.
int host_kernel_names(char* text, int bytes) {
  int count = 0, used = 0;
  const KernelInfo* kernels = kernel_table(&count);
  for (int i = 0; i < count && used < bytes; ++i)
    used += std::snprintf(text + used, static_cast<size_t>(bytes - used), "%s\n", kernels[i].name);
  return count;
}

}  // extern "C"
