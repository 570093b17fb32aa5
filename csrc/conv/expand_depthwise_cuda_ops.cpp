// The torch face of the fused expansion and depthwise convolution: checks tensors, allocates results, fills expand_depthwise.h's parameter
// block. On a GPU alone: a CPU fuses the whole block (mbconv_ops.cpp). Schema, fake and reference: pyops/ops/_expand_depthwise_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/expand_depthwise_cuda.h"
#include "conv/pointwise_tensors.h"

namespace pyops::conv {
namespace {

std::tuple<Tensor, Tensor> expand_depthwise(Tensor input_, Tensor expand_weight_, MaybeTensor expand_bias_, Tensor depthwise_weight_,
                                            MaybeTensor depthwise_bias_, int64_t stride, int64_t activation, double slope, bool means,
                                            bool tf32) {
  STD_TORCH_CHECK(input_.dim() == 4 && input_.size(2) > 0 && input_.size(3) > 0, "input: expected [N, C, H, W] with positions");
  STD_TORCH_CHECK(tf32 || input_.scalar_type() != ScalarType::Float, "expand_depthwise: float32 on a GPU needs tf32");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  ExpandDepthwise p{};
  p.N = input_.size(0), p.C = input_.size(1), p.H = input_.size(2), p.W = input_.size(3);
  STD_TORCH_CHECK(expand_weight_.dim() == 2 && expand_weight_.size(1) == p.C && p.C > 0, "expand_weight: expected [E, ", p.C, "]");
  p.E = expand_weight_.size(0);
  const int64_t K = depthwise_weight_.dim() == 4 ? depthwise_weight_.size(2) : 0;
  STD_TORCH_CHECK(
      (K == 3 || K == 5 || K == 7) && depthwise_weight_.size(3) == K && depthwise_weight_.size(0) == p.E && depthwise_weight_.size(1) == 1,
      "depthwise_weight: expected [", p.E, ", 1, K, K], K 3, 5 or 7");
  for (const Tensor& weight : {expand_weight_, depthwise_weight_}) {
    STD_TORCH_CHECK(weight.device() == input_.device(), "weights: expected input's device");
    STD_TORCH_CHECK(weight.scalar_type() == input_.scalar_type() || weight.scalar_type() == ScalarType::Float,
                    "weights: expected input's dtype or float32");
  }
  p.K = static_cast<int32_t>(K), p.stride = static_cast<int32_t>(stride);
  p.OH = (p.H - 1) / stride + 1, p.OW = (p.W - 1) / stride + 1;
  p.dtype = dtype_of("input", input_);
  p.expand_weight_dtype = dtype_of("expand_weight", expand_weight_);
  p.depthwise_weight_dtype = dtype_of("depthwise_weight", depthwise_weight_);
  p.activation = activation_of("activation", activation), p.slope = static_cast<float>(slope);

  const Tensor input = as_positions(input_), expand_weight = as_contiguous(expand_weight_),
               depthwise_weight = as_contiguous(depthwise_weight_);
  const MaybeTensor expand_bias = vector_of("expand_bias", expand_bias_, input, {p.E});
  const MaybeTensor depthwise_bias = vector_of("depthwise_bias", depthwise_bias_, input, {p.E});
  Tensor output = empty_image(input, p.N, p.E, p.OH, p.OW);
  Tensor mean = means ? empty(input, {p.N, p.E}, ScalarType::Float) : empty(input, {0}, ScalarType::Float);
  p.input_stride = position_stride(input);
  p.input = input.const_data_ptr(), p.expand_weight = expand_weight.const_data_ptr(),
  p.depthwise_weight = depthwise_weight.const_data_ptr();
  p.expand_bias = floats(expand_bias), p.depthwise_bias = floats(depthwise_bias);
  p.output = output.mutable_data_ptr(), p.means = means ? mean.mutable_data_ptr<float>() : nullptr;

  const DeviceGuard guard(input.get_device_index());
  const Tensor workspace = scratch(input, expand_depthwise_workspace(p));
  expand_depthwise_run(p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_cuda_stream(input)));
  return {output, mean};
}

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) { m.impl("expand_depthwise", TORCH_BOX(&pyops::conv::expand_depthwise)); }
#endif  // PYOPS_CUDA
