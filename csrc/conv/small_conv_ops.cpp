// The torch face of the convolution of small images on the CPU. Schema, fake and reference are in pyops/ops/_small_conv_ops.py.
#include "conv/channel_tensors.h"
#include "conv/small_conv_cpu.h"

namespace pyops::conv {
namespace {

constexpr int64_t kMost = 1 << 20;

Tensor small_conv(Tensor input_, Tensor weight, MaybeTensor bias_, int64_t out_channels, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, int64_t activation, double slope, int64_t pool) {
  STD_TORCH_CHECK(input_.is_cpu() && input_.dim() == 4, "input: expected a CPU tensor [N, C, H, W]");
  SmallConv p{};
  p.N = input_.size(0), p.C = input_.size(1), p.H = input_.size(2), p.W = input_.size(3), p.O = out_channels;
  const int64_t channels = (p.O + 15) / 16 * 16;
  STD_TORCH_CHECK(p.O >= 1 && weight.is_cpu() && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.dim() == 4 &&
                      weight.size(2) == p.C && weight.size(3) == channels && weight.size(0) >= 1 && weight.size(1) >= 1 &&
                      weight.size(0) < kMost && weight.size(1) < kMost,
                  "weight: expected float32 [KH, KW, ", p.C, ", ", channels, "], contiguous");
  const auto pair = [](const char* name, const std::vector<int64_t>& n, int64_t least) {
    STD_TORCH_CHECK(n.size() == 2 && n[0] >= least && n[1] >= least && n[0] < kMost && n[1] < kMost, name, ": expected two, from ", least);
  };
  pair("stride", stride, 1), pair("padding", padding, 0);
  STD_TORCH_CHECK(pool >= 0 && pool <= 2, "pool: expected 0, 1 or 2, got ", pool);
  p.KH = static_cast<int32_t>(weight.size(0)), p.KW = static_cast<int32_t>(weight.size(1));
  p.stride_h = static_cast<int32_t>(stride[0]), p.stride_w = static_cast<int32_t>(stride[1]);
  p.pad_h = static_cast<int32_t>(padding[0]), p.pad_w = static_cast<int32_t>(padding[1]);
  const int64_t down = p.H + 2 * p.pad_h - p.KH, across = p.W + 2 * p.pad_w - p.KW, shift = pool > 0;
  STD_TORCH_CHECK(down >= 0 && across >= 0, "input: too small for the filter");
  p.OH = down / p.stride_h + 1, p.OW = across / p.stride_w + 1;
  STD_TORCH_CHECK(p.OH >> shift >= 1 && p.OW >> shift >= 1, "pool: needs 2 rows and columns");
  p.dtype = dtype_of("input", input_), p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);
  p.pool = static_cast<Pool>(pool);
  const Tensor input = as_image(input_);
  const MaybeTensor bias = vector_of("bias", bias_, input, {p.O});
  Tensor output = empty_image(input, p.N, p.O, p.OH >> shift, p.OW >> shift);
  p.input = input.const_data_ptr(), p.weight = static_cast<const float*>(weight.const_data_ptr()), p.bias = floats(bias);
  p.output = output.mutable_data_ptr();
  if (p.N > 0) small_conv_cpu(p);
  return output;
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("small_conv", TORCH_BOX(&pyops::conv::small_conv)); }
