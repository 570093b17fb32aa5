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

// Everything but what the output needs.
Winograd winograd_call(const Tensor& input, const Tensor& packed, int64_t out_channels, int64_t pad_h, int64_t pad_w, int64_t activation,
                       double slope, bool upsample) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4, "input: expected a CPU tensor [N, C, H, W]");
  Winograd p{};
  p.N = input.size(0), p.C = input.size(1), p.H = input.size(2) << upsample, p.W = input.size(3) << upsample, p.O = out_channels;
  STD_TORCH_CHECK(pad_h >= 0 && pad_w >= 0 && pad_h <= kMostPadding && pad_w <= kMostPadding, "padding: expected 0 or more");
  STD_TORCH_CHECK(p.H + 2 * pad_h > 2 && p.W + 2 * pad_w > 2, "input: too small for a 3x3 filter");
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.dim() == 4 &&
                      packed.size(0) == (p.O + 15) / 16 && (packed.size(1) == 36 || packed.size(1) == 16) && packed.size(2) == p.C &&
                      packed.size(3) == 16 && p.O >= 1,
                  "packed: not from winograd_pack for ", p.C, " input and ", p.O, " output channels");
  p.m = packed.size(1) == 36 ? 4 : 2, p.pad_h = static_cast<int32_t>(pad_h), p.pad_w = static_cast<int32_t>(pad_w);
  p.dtype = dtype_of("input", input), p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
  p.packed = static_cast<const float*>(packed.const_data_ptr());
  return p;
}

Tensor winograd_infer(Tensor input_, Tensor packed, MaybeTensor bias_, MaybeTensor residual_, int64_t out_channels, int64_t pad_h,
                      int64_t pad_w, int64_t activation, double slope, bool residual_last, int64_t pool, int64_t upsample) {
  STD_TORCH_CHECK(pool >= 0 && pool <= 2, "pool: expected 0, 1 or 2, got ", pool);
  STD_TORCH_CHECK(upsample >= 0 && upsample <= 2, "upsample: expected 0, 1 or 2, got ", upsample);
  Winograd p = winograd_call(input_, packed, out_channels, pad_h, pad_w, activation, slope, upsample > 0);
  p.residual_last = residual_last, p.pool = static_cast<Pool>(pool), p.upsample = static_cast<Upsample>(upsample);
  const int64_t OH = p.H + 2 * pad_h - 2, OW = p.W + 2 * pad_w - 2, shift = pool > 0;
  STD_TORCH_CHECK(OH >> shift >= 1 && OW >> shift >= 1, "pool: needs 2 rows and columns");
  check_tensor("residual", residual_, input_, {p.N, p.O, OH, OW});
  const Tensor input = as_image(input_);
  const MaybeTensor bias = vector_of("bias", bias_, input, {p.O}), residual = as_image(residual_);
  Tensor output = empty_image(input, p.N, p.O, OH >> shift, OW >> shift);
  p.input = input.const_data_ptr(), p.bias = floats(bias), p.residual = data(residual);
  p.output = output.mutable_data_ptr(), p.out_stride = p.O;
  if (p.N > 0) winograd_cpu(p);
  return output;
}

void winograd_into(Tensor out, Tensor input_, Tensor packed, MaybeTensor bias_, int64_t pad_h, int64_t pad_w, int64_t activation,
                   double slope) {
  STD_TORCH_CHECK(out.dim() == 4, "out: expected [N, O, H, W]");
  Winograd p = winograd_call(input_, packed, out.size(1), pad_h, pad_w, activation, slope, false);
  check_tensor("out", MaybeTensor(out), input_, {p.N, p.O, p.H + 2 * pad_h - 2, p.W + 2 * pad_w - 2});
  p.out_stride = position_stride(out);
  STD_TORCH_CHECK(p.out_stride > 0 || p.N == 0, "out: expected channels_last memory or a channel slice of it");
  const Tensor input = as_image(input_);
  const MaybeTensor bias = vector_of("bias", bias_, input, {p.O});
  p.input = input.const_data_ptr(), p.bias = floats(bias), p.output = out.mutable_data_ptr();
  if (p.N > 0) winograd_cpu(p);
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&pyops::conv::winograd_pack_tensor));
  m.impl("winograd_infer", TORCH_BOX(&pyops::conv::winograd_infer));
  m.impl("winograd_into", TORCH_BOX(&pyops::conv::winograd_into));
}
