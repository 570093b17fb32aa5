// The host side of a kernel: launch, clear, ask the device. Every call is stream-ordered, allocates nothing, waits for
// nothing, may be captured into a CUDA graph, and throws std::runtime_error when CUDA refuses.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"

namespace pyops {

struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  bool cooperative = false;  // all blocks resident at once, or an error
};

struct DeviceLimits {
  int sm_count;
  int shared_bytes;  // what one block may opt in to
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // not left for the next caller to trip over
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

inline DeviceLimits device_limits() {
  static const std::vector<DeviceLimits> known = [] {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<DeviceLimits> all(count);
    for (int i = 0; i < count; ++i) {
      check_cuda(cudaDeviceGetAttribute(&all[i].sm_count, cudaDevAttrMultiProcessorCount, i), "cudaDeviceGetAttribute");
      check_cuda(cudaDeviceGetAttribute(&all[i].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, i), "cudaDeviceGetAttribute");
    }
    return all;
  }();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return known.at(device);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)), name);
  Params copy = params;
  void* arguments[] = {&copy};
  if (shape.cooperative)
    check_cuda(cudaLaunchCooperativeKernel(function, shape.grid, dim3(shape.threads), arguments, shape.shared_bytes, stream), name);
  else check_cuda(cudaLaunchKernel(function, shape.grid, dim3(shape.threads), arguments, shape.shared_bytes, stream), name);
}

inline void zero_async(void* pointer, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(pointer, 0, bytes, stream), "cudaMemsetAsync");
}

// `rows` rows of `width` bytes, device to device; pitches in bytes.
inline void copy_rows_async(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                            cudaStream_t stream) {
  check_cuda(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy2DAsync");
}

#else

inline DeviceLimits device_limits() { return {host::machine().sm_count, host::machine().shared_limit}; }

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, cudaStream_t, const Params& params) {
  host::note_launch(name, reinterpret_cast<const void*>(kernel), shape.threads, shape.shared_bytes);
  host::run(shape.grid, dim3(shape.threads), shape.shared_bytes, shape.cooperative, [&] { kernel(params); });
}

inline void zero_async(void* pointer, size_t bytes, cudaStream_t) { std::memset(pointer, 0, bytes); }

inline void copy_rows_async(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, cudaStream_t) {
  for (size_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
}

#endif

}  // namespace pyops
