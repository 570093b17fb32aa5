// What every op's torch-facing file needs: checks that name the argument, allocation, dtype and stream. Stable ABI only.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

namespace pyops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What the C shim calls a dtype.
inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: STD_TORCH_CHECK(false, "pyops: unsupported dtype");
  }
}

// A fresh contiguous tensor on `like`'s device; the C shim itself, since the boxed dispatcher call costs several times as much.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8];
  int64_t step = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, shim_dtype(dtype),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline MaybeTensor as_contiguous(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(as_contiguous(*t)) : t; }

inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline const void* data(const MaybeTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

// The public functions have said the same at more length; this keeps a direct torch.ops call from reading out of bounds.
inline void check_tensor(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": dtype differs from input's");
  STD_TORCH_CHECK(t.device() == like.device(), name, ": device differs from input's");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, ": wrong shape");
}

inline void check_tensor(const char* name, const MaybeTensor& t, const Tensor& like, std::initializer_list<int64_t> sizes) {
  if (t.has_value()) check_tensor(name, *t, like, sizes);
}

}  // namespace pyops
