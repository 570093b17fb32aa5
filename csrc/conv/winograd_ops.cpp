// The torch face of the CPU Winograd convolution. Schemas and fakes are in pyops/ops/_winograd_ops.py.
#include "conv/channel_tensors.h"
#include "conv/winograd_cpu.h"

namespace pyops::conv {
namespace {

constexpr int64_t kMostPadding = 1 << 20;

Tensor winograd_pack_tensor(Tensor weight_, int64_t m) {
  STD_TORCH_CHECK(weight_.is_cpu() && weight_.scalar_type() == ScalarType::Float && weight_.dim() == 4 && weight_.size(2) == 3 &&
                      weight_.size(3) == 3 && weight_.size(0) >= 1 && weight_.size(1) >= 1,
                  "weight: expected a float32 CPU tensor [O, C, 3, 3]");
  STD_TORCH_CHECK(m == 2 || m == 4, "m: expected 2 or 4, got ", m);
  const Tensor weight = as_contiguous(weight_);
  const int64_t O = weight.size(0), C = weight.size(1);
  Tensor packed = empty(weight, {(O + 15) / 16, (m + 2) * (m + 2), C, 16}, ScalarType::Float);
  winograd_pack({O, C, static_cast<int32_t>(m), static_cast<const float*>(weight.const_data_ptr()), packed.mutable_data_ptr<float>()});
  return packed;
}

Tensor winograd_infer(Tensor input_, Tensor packed, MaybeTensor bias_, MaybeTensor residual_, int64_t out_channels, int64_t pad_h,
                      int64_t pad_w, int64_t activation, double slope, bool residual_last, bool pool) {
  STD_TORCH_CHECK(input_.is_cpu() && input_.dim() == 4, "input: expected a CPU tensor [N, C, H, W]");
  Winograd p{};
  p.N = input_.size(0), p.C = input_.size(1), p.H = input_.size(2), p.W = input_.size(3), p.O = out_channels;
  STD_TORCH_CHECK(pad_h >= 0 && pad_w >= 0 && pad_h <= kMostPadding && pad_w <= kMostPadding, "padding: expected 0 or more");
  const int64_t OH = p.H + 2 * pad_h - 2, OW = p.W + 2 * pad_w - 2;
  STD_TORCH_CHECK(OH >= 1 && OW >= 1, "input: too small for a 3x3 filter");
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.dim() == 4 &&
                      packed.size(0) == (p.O + 15) / 16 && (packed.size(1) == 36 || packed.size(1) == 16) && packed.size(2) == p.C &&
                      packed.size(3) == 16 && p.O >= 1,
                  "packed: not from winograd_pack for ", p.C, " input and ", p.O, " output channels");
  p.m = packed.size(1) == 36 ? 4 : 2, p.pad_h = static_cast<int32_t>(pad_h), p.pad_w = static_cast<int32_t>(pad_w);
  p.dtype = dtype_of("input", input_), p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
  p.residual_last = residual_last, p.pool = pool;
  STD_TORCH_CHECK(!pool || (!residual_.has_value() && OH >= 2 && OW >= 2), "pool: needs 2 rows and columns, and takes no residual");
  check_tensor("residual", residual_, input_, {p.N, p.O, OH, OW});
  const Tensor input = as_image(input_);
  const MaybeTensor bias = vector_of("bias", bias_, input, {p.O}), residual = as_image(residual_);
  Tensor output = empty_image(input, p.N, p.O, pool ? OH / 2 : OH, pool ? OW / 2 : OW);
  p.input = input.const_data_ptr(), p.packed = static_cast<const float*>(packed.const_data_ptr());
  p.bias = floats(bias), p.residual = data(residual), p.output = output.mutable_data_ptr();
  if (p.N > 0) winograd_cpu(p);
  return output;
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&pyops::conv::winograd_pack_tensor));
  m.impl("winograd_infer", TORCH_BOX(&pyops::conv::winograd_infer));
}
