// The torch face of CPU MBConv inference: packs folded weights into one tensor, and runs a block from it.
// Schemas and fakes are defined in pyops/ops/_mbconv_ops.py.
#include "conv/conv_tensors.h"
#include "conv/mbconv_cpu.h"

namespace pyops::conv {
namespace {

constexpr int64_t kMost = int64_t{1} << 24;  // channels, kernel, stride: products of two stay far from overflow

const float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  ": expected a contiguous float32 CPU tensor");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, ": wrong shape");
  return static_cast<const float*>(t.const_data_ptr());
}
const float* floats(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.has_value(), name, ": expected, since its partner is given");
  return floats(name, *t, sizes);
}

// Weights are [out, in] or [out, in, 1, 1].
MaybeTensor as_matrix(const char* name, const MaybeTensor& t) {
  if (!t.has_value()) return t;
  const bool image = t->dim() == 4 && t->size(2) == 1 && t->size(3) == 1;
  STD_TORCH_CHECK(t->dim() == 2 || image, name, ": expected [out, in] or [out, in, 1, 1]");
  const Tensor dense = as_contiguous(*t);
  return image ? torch::stable::view(dense, {t->size(0), t->size(1)}) : dense;
}

Tensor mbconv_pack_tensors(MaybeTensor expand_weight, MaybeTensor expand_bias, Tensor depthwise_weight, Tensor depthwise_bias,
                           MaybeTensor squeeze_weight, MaybeTensor squeeze_bias, MaybeTensor gate_weight, MaybeTensor gate_bias,
                           Tensor project_weight, Tensor project_bias, bool bf16) {
  const MaybeTensor expand = as_matrix("expand_weight", expand_weight), squeeze = as_matrix("squeeze_weight", squeeze_weight);
  const MaybeTensor gate = as_matrix("gate_weight", gate_weight), project = as_matrix("project_weight", project_weight);
  const Tensor depthwise = as_contiguous(depthwise_weight);
  STD_TORCH_CHECK(depthwise.dim() == 4 && depthwise.size(2) == depthwise.size(3) && depthwise.size(2) % 2 == 1,
                  "depthwise_weight: expected [E, 1, K, K] with odd K");
  STD_TORCH_CHECK(squeeze.has_value() == gate.has_value(), "gate_weight: expected with squeeze_weight and not without it");
  MBConvSizes s{};
  s.E = depthwise.size(0), s.K = static_cast<int32_t>(depthwise.size(2)), s.O = project->size(0);
  s.expand = expand.has_value(), s.C = s.expand ? expand->size(1) : s.E, s.S = squeeze.has_value() ? squeeze->size(0) : 0;
  STD_TORCH_CHECK(s.C >= 1 && s.E >= 1 && s.O >= 1 && std::max({s.C, s.E, s.O, s.S, depthwise.size(2)}) < kMost,
                  "weights: empty or too large");
  STD_TORCH_CHECK(!squeeze.has_value() || s.S >= 1, "squeeze_weight: empty");
  MBConvWeights w{};
  const MaybeTensor expand_b = as_contiguous(expand_bias), squeeze_b = as_contiguous(squeeze_bias), gate_b = as_contiguous(gate_bias);
  const Tensor depthwise_b = as_contiguous(depthwise_bias), project_b = as_contiguous(project_bias);
  w.depthwise = floats("depthwise_weight", depthwise, {s.E, 1, s.K, s.K}), w.depthwise_bias = floats("depthwise_bias", depthwise_b, {s.E});
  w.project = floats("project_weight", *project, {s.O, s.E}), w.project_bias = floats("project_bias", project_b, {s.O});
  if (s.expand) w.expand = floats("expand_weight", *expand, {s.E, s.C}), w.expand_bias = floats("expand_bias", expand_b, {s.E});
  if (s.S) {
    w.squeeze = floats("squeeze_weight", *squeeze, {s.S, s.E}), w.squeeze_bias = floats("squeeze_bias", squeeze_b, {s.S});
    w.gate = floats("gate_weight", *gate, {s.E, s.S}), w.gate_bias = floats("gate_bias", gate_b, {s.E});
  }
  const bool pairs = bf16 && mbconv_packs_pairs();
  Tensor packed = empty(project_bias, {mbconv_packed_bytes(s, pairs) / static_cast<int64_t>(sizeof(float))}, ScalarType::Float);
  mbconv_pack(s, w, pairs, packed.mutable_data_ptr());
  return packed;
}

Tensor mbconv_infer(Tensor input_, Tensor packed, int64_t expanded, int64_t squeezed, int64_t out_channels, int64_t kernel, int64_t stride,
                    int64_t activation, int64_t squeeze_activation, int64_t gate_activation, bool expand, bool residual) {
  STD_TORCH_CHECK(input_.dim() == 4, "input: expected [N, C, H, W]");
  STD_TORCH_CHECK(stride >= 1 && stride < kMost, "stride: expected 1 or more, got ", stride);
  for (const int64_t size : {input_.size(1), expanded, out_channels, kernel})
    STD_TORCH_CHECK(size >= 1 && size < kMost, "expanded, out_channels, kernel, input's channels: expected 1 or more, got ", size);
  STD_TORCH_CHECK(squeezed >= 0 && squeezed < kMost, "squeezed: expected 0 or more, got ", squeezed);
  STD_TORCH_CHECK(kernel % 2 == 1, "kernel: expected an odd size, got ", kernel);
  MBConvForward p{};
  p.sizes = {input_.size(1), expanded, squeezed, out_channels, static_cast<int32_t>(kernel), expand};
  STD_TORCH_CHECK(expand || expanded == p.sizes.C, "expanded: expected input's ", p.sizes.C, " channels without expand, got ", expanded);
  STD_TORCH_CHECK(!residual || (stride == 1 && out_channels == p.sizes.C), "residual: needs stride 1 and as many channels out as in");
  p.N = input_.size(0), p.H = input_.size(2), p.W = input_.size(3), p.stride = static_cast<int32_t>(stride);
  p.residual = residual, p.dtype = dtype_of("input", input_);
  p.activation = activation_of("activation", activation);
  p.squeeze_activation = activation_of("squeeze_activation", squeeze_activation);
  p.gate_activation = activation_of("gate_activation", gate_activation);
  for (const Activation a : {p.activation, p.squeeze_activation, p.gate_activation})
    STD_TORCH_CHECK(a != Activation::leaky_relu, "activation: leaky_relu has no slope here");
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous(),
                  "packed: not from mbconv_pack");
  bool pairs = false;
  const char* mismatch = mbconv_mismatch(p.sizes, packed.const_data_ptr(), packed.numel() * static_cast<int64_t>(sizeof(float)), &pairs);
  STD_TORCH_CHECK(!mismatch, "packed: ", mismatch);
  STD_TORCH_CHECK(!pairs || p.dtype == DType::bf16, "packed: bfloat16 weights need bfloat16 input");

  const Tensor input = as_image(input_);
  Tensor output = empty_image(input, p.N, out_channels, p.H ? (p.H - 1) / stride + 1 : 0, p.W ? (p.W - 1) / stride + 1 : 0);
  p.input = input.const_data_ptr(), p.packed = packed.const_data_ptr(), p.output = output.mutable_data_ptr();
  mbconv_forward_cpu(p);
  return output;
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("mbconv_pack", TORCH_BOX(&pyops::conv::mbconv_pack_tensors));
  m.impl("mbconv_infer", TORCH_BOX(&pyops::conv::mbconv_infer));
}
