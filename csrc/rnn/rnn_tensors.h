// How the recurrent family's torch-facing files read tensors: dtype, dimensions, rows, lengths.
#pragma once
#include "common/tensor.h"
#include "rnn/rnn.h"

namespace pyops::rnn {

inline Cell cell_of(int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id <= static_cast<int64_t>(Cell::rnn_sigmoid), "cell: expected 0..5, got ", id);
  return static_cast<Cell>(id);
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "input: expected float32, float64, bfloat16 or float16");
  }
}

struct Dims {
  int64_t T, B, I, H;
  bool step, batch_first;  // step: input is [B, I], one time step
};

inline Dims dims_of(const Tensor& input, const Tensor& weight_hh, bool batch_first) {
  const bool step = input.dim() == 2;
  STD_TORCH_CHECK(step || input.dim() == 3, "input: expected [T, B, I], [B, T, I] with batch_first, or [B, I] for one step");
  STD_TORCH_CHECK(weight_hh.dim() == 2, "weight_hh: expected [G*H, H]");
  const int t = batch_first ? 1 : 0;
  return {step ? 1 : input.size(t), input.size(step ? 0 : 1 - t), input.size(step ? 1 : 2), weight_hh.size(1), step, batch_first};
}

inline Rows rows(const Tensor& t, const Dims& d) {
  void* p = const_cast<void*>(t.const_data_ptr());
  if (d.step) return {p, 0, t.stride(0)};
  return {p, t.stride(d.batch_first ? 1 : 0), t.stride(d.batch_first ? 0 : 1)};
}

inline Tensor empty_rows(const Tensor& like, const Dims& d, int64_t width) {
  const ScalarType dtype = like.scalar_type();
  if (d.step) return empty(like, {d.B, width}, dtype);
  return d.batch_first ? empty(like, {d.B, d.T, width}, dtype) : empty(like, {d.T, d.B, width}, dtype);
}

// Lengths for a kernel on `like`'s device; null when there are none. Their values are the kernel's to clamp.
inline const int64_t* device_lengths(const MaybeTensor& lengths, const Tensor& like, const Dims& d) {
  if (!lengths.has_value()) return nullptr;
  STD_TORCH_CHECK(
      lengths->device() == like.device() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 && lengths->size(0) == d.B,
      "lengths: expected an int64 tensor of shape [", d.B, "] on input's device");
  return lengths->const_data_ptr<int64_t>();
}

// A state no step has changed: a copy of `from`, or zeros.
inline void start_state(Tensor& to, const MaybeTensor& from) {
  if (from.has_value()) torch::stable::copy_(to, *from);
  else torch::stable::zero_(to);
}

}  // namespace pyops::rnn
