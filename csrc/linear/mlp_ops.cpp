// The torch face of the CPU's fused MLP. Schemas and fakes are in pyops/ops/_mlp_ops.py.
#include "conv/channel_tensors.h"
#include "linear/mlp_cpu.h"

namespace pyops::linear {
namespace {

constexpr int64_t kMost = int64_t{1} << 24;  // C, H, O: products of two stay far from overflow

void check_matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) >= 1 && t.size(1) >= 1 && t.size(0) < kMost && t.size(1) < kMost, name,
                  ": expected a CPU tensor [outputs, inputs]");
}

Tensor mlp_pack_tensors(Tensor first_, Tensor first_bias_, Tensor second_, Tensor second_bias_) {
  check_matrix("first", first_), check_matrix("second", second_);
  MlpWeights w{};
  w.dtype = conv::dtype_of("first", first_);
  STD_TORCH_CHECK(w.dtype == DType::f32 || w.dtype == DType::bf16, "first: expected float32 or bfloat16");
  STD_TORCH_CHECK(second_.scalar_type() == first_.scalar_type() && second_.size(1) == first_.size(0),
                  "second: expected first's dtype and as many inputs as first has outputs");
  const MlpSizes s{first_.size(1), first_.size(0), second_.size(0)};
  const Tensor first = as_contiguous(first_), second = as_contiguous(second_);
  const MaybeTensor first_bias = conv::vector_of("first_bias", MaybeTensor(first_bias_), first, {s.H});
  const MaybeTensor second_bias = conv::vector_of("second_bias", MaybeTensor(second_bias_), first, {s.O});
  w.first = first.const_data_ptr(), w.second = second.const_data_ptr();
  w.first_bias = conv::floats(first_bias), w.second_bias = conv::floats(second_bias);
  Tensor packed = empty(first, {MlpLayout(s, mlp_packs_pairs(w.dtype)).floats}, ScalarType::Float);
  mlp_pack(s, w, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor mlp_infer(Tensor input_, Tensor packed, MaybeTensor residual_, int64_t hidden, int64_t outputs, bool norm, double eps,
                 int64_t activation, double slope) {
  STD_TORCH_CHECK(input_.is_cpu() && input_.dim() == 2 && input_.size(1) >= 1 && input_.size(1) < kMost,
                  "input: expected a CPU tensor [rows, inputs]");
  STD_TORCH_CHECK(hidden >= 1 && hidden < kMost && outputs >= 1 && outputs < kMost, "hidden, outputs: expected 1 or more");
  Mlp p{};
  p.sizes = {input_.size(1), hidden, outputs}, p.M = input_.size(0);
  p.dtype = conv::dtype_of("input", input_), p.norm = norm, p.eps = static_cast<float>(eps), p.slope = static_cast<float>(slope);
  p.activation = conv::activation_of("activation", activation);
  const int64_t floats = packed.numel();
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous(),
                  "packed: not from mlp_pack");
  p.pairs = mlp_packs_pairs(DType::bf16) && floats == MlpLayout(p.sizes, true).floats;
  STD_TORCH_CHECK(p.pairs || floats == MlpLayout(p.sizes, false).floats, "packed: not from mlp_pack for these sizes on this machine");
  STD_TORCH_CHECK(!p.pairs || p.dtype == DType::bf16, "packed: bfloat16 weights need bfloat16 input");
  check_tensor("residual", residual_, input_, {p.M, outputs});
  const Tensor input = as_contiguous(input_);
  const MaybeTensor residual = as_contiguous(residual_);
  Tensor output = empty(input, {p.M, outputs}, input.scalar_type());
  p.input = input.const_data_ptr(), p.residual = data(residual), p.packed = static_cast<const float*>(packed.const_data_ptr());
  p.output = output.mutable_data_ptr();
  if (p.M > 0) mlp_cpu(p);
  return output;
}

}  // namespace
}  // namespace pyops::linear

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("mlp_pack", TORCH_BOX(&pyops::linear::mlp_pack_tensors));
  m.impl("mlp_infer", TORCH_BOX(&pyops::linear::mlp_infer));
}
