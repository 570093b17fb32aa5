// The torch face of the CPU linear layer of a few rows. Schema, fake and reference are in pyops/ops/_linear_ops.py.
#include "conv/channel_tensors.h"
#include "linear/linear_cpu.h"

namespace pyops::linear {
namespace {

Tensor linear_rows(Tensor input_, Tensor weight_, MaybeTensor bias_, MaybeTensor residual_, int64_t activation, double slope) {
  STD_TORCH_CHECK(input_.is_cpu() && input_.dim() == 2 && input_.size(0) <= kMostRows, "input: expected a CPU tensor [M, K], M up to ",
                  kMostRows);
  Linear p{};
  p.M = input_.size(0), p.K = input_.size(1);
  STD_TORCH_CHECK(weight_.dim() == 2, "weight: expected [N, K]");
  p.N = weight_.size(0);
  check_tensor("weight", weight_, input_, {p.N, p.K});
  check_tensor("residual", residual_, input_, {p.M, p.N});
  p.dtype = conv::dtype_of("input", input_), p.activation = conv::activation_of("activation", activation);
  p.slope = static_cast<float>(slope);
  const Tensor input = as_contiguous(input_), weight = as_contiguous(weight_);
  const MaybeTensor bias = conv::vector_of("bias", bias_, input, {p.N}), residual = as_contiguous(residual_);
  Tensor output = empty(input, {p.M, p.N}, input.scalar_type());
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr(), p.residual = data(residual), p.bias = conv::floats(bias);
  p.output = output.mutable_data_ptr();
  if (p.M > 0 && p.N > 0) linear_cpu(p);
  return output;
}

}  // namespace
}  // namespace pyops::linear

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("linear_rows", TORCH_BOX(&pyops::linear::linear_rows)); }
