// How the convolution family's torch-facing files read and make tensors: dtypes, activations, channels_last images.
#pragma once
#include <algorithm>

#include "common/tensor.h"
#include "conv/depthwise.h"

namespace pyops::conv {

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline Activation activation_of(const char* name, int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id <= static_cast<int64_t>(Activation::hardsigmoid), name, ": expected 0..9, got ", id);
  return static_cast<Activation>(id);
}

// Strides of a logical [N, C, H, W] whose memory is a dense [N, H, W, C].
struct ChannelsLast {
  int64_t strides[4];
  ChannelsLast(int64_t C, int64_t H, int64_t W) {
    const int64_t c = std::max<int64_t>(C, 1), w = std::max<int64_t>(W, 1);
    strides[0] = c * w * std::max<int64_t>(H, 1), strides[1] = 1, strides[2] = c * w, strides[3] = c;
  }
};

// Of like's dtype, or of another.
inline Tensor empty_image(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, std::optional<ScalarType> dtype = {}) {
  const int64_t sizes[4] = {N, C, H, W};
  const ChannelsLast layout(C, H, W);
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t kind = shim_dtype(dtype.value_or(like.scalar_type()));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, layout.strides, kind, device_type, device_index, &handle));
  return Tensor(handle);
}

// The tensor itself where its memory is a dense [N, H, W, C], else a copy that is. (is_contiguous(channels_last) is no question the
// stable ABI answers, and strides of dimensions of size one say nothing.)
inline Tensor as_image(const Tensor& t) {
  const ChannelsLast layout(t.size(1), t.size(2), t.size(3));
  bool dense = true;
  for (int d = 0; d < 4; ++d) dense = dense && (t.size(d) <= 1 || t.stride(d) == layout.strides[d]);
  if (dense || t.numel() == 0) return t;
  Tensor copy = empty_image(t, t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return copy;
}
inline MaybeTensor as_image(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(as_image(*t)) : t; }

// Distance between positions of an image whose channels are neighbours and whose positions are evenly spaced; 0 where they are not.
inline int64_t position_stride(const Tensor& t) {
  const int64_t N = t.size(0), C = t.size(1), H = t.size(2), W = t.size(3);
  if (C > 1 && t.stride(1) != 1) return 0;
  const int64_t stride = W > 1 ? t.stride(3) : H > 1 ? t.stride(2) : N > 1 ? t.stride(0) : C;
  const bool even = (W <= 1 || t.stride(3) == stride) && (H <= 1 || t.stride(2) == stride * W) && (N <= 1 || t.stride(0) == stride * W * H);
  return even && stride >= C ? stride : 0;
}

}  // namespace pyops::conv
