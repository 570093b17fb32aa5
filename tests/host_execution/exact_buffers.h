// Buffers of exactly the right size for the memory checks of csrc/conv: the sanitizer guards both ends of each.
#pragma once
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/common/ptx.cuh"
#include "../../csrc/conv/depthwise.h"

namespace pyops::conv {

class Buffers {  // an allocation each
 public:
  ~Buffers() {
    for (void* p : all_) std::free(p);
  }
  void* raw(size_t bytes) {  // poisoned with NaN
    all_.push_back(std::memset(std::malloc(bytes ? bytes : 1), 0xFF, bytes));
    return all_.back();
  }
  void* filled(int64_t count, DType dtype) {
    uint32_t state = 1;
    auto* values = static_cast<unsigned char*>(raw(static_cast<size_t>(count) * (dtype == DType::f32 ? 4 : 2)));
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = static_cast<float>(state >> 8) / 8388608.f - 1.f;
      if (dtype == DType::f32) std::memcpy(values + 4 * i, &value, 4);
      else {
        const uint16_t bits = dtype == DType::bf16 ? ptx::float_to_bf16(value) : ptx::float_to_f16(value);
        std::memcpy(values + 2 * i, &bits, 2);
      }
    }
    return values;
  }

 private:
  std::vector<void*> all_;
};

inline size_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace pyops::conv
