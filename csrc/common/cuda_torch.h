// What a CUDA op's torch-facing file needs beyond tensor.h: the current stream, a device guard and scratch memory.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "common/tensor.h"

namespace pyops {

// torch's current stream on the tensor's device. The shim lives in libtorch_cuda, which a CPU-only torch has not: looked up at
// first use, so that the extension loads everywhere.
inline void* current_cuda_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "pyops: this PyTorch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    STD_TORCH_CHECK(cudaGetDevice(&before_) == cudaSuccess, "pyops: no CUDA device");
    if (device != before_) STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "pyops: cannot use CUDA device ", device);
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Uninitialised device memory from torch's allocator, 256-byte aligned as its blocks are.
inline Tensor scratch(const Tensor& like, size_t bytes) { return empty(like, {static_cast<int64_t>((bytes + 3) / 4)}, ScalarType::Float); }

}  // namespace pyops
