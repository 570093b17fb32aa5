// The torch face of the GPU's fused MLP. Schemas and fakes are in pyops/ops/_mlp_ops.py.
#ifdef PYOPS_CUDA
#include "common/cuda_torch.h"
#include "conv/channel_tensors.h"
#include "linear/mlp_cuda.h"

namespace pyops::linear {
namespace {

cudaStream_t stream_of(const Tensor& t) { return static_cast<cudaStream_t>(current_cuda_stream(t)); }

void check_sizes(const MlpSizes& s) {
  STD_TORCH_CHECK(s.C >= 1 && s.C <= kMlpMost && s.O >= 1 && s.O <= kMlpMost, "fused MLP on a GPU: up to ", kMlpMost,
                  " inputs and outputs, got ", s.C, " and ", s.O);
  STD_TORCH_CHECK(s.H >= 1 && s.H <= INT32_MAX / 2, "hidden: expected 1 to 2^30, got ", s.H);
}

Tensor mlp_pack_tensors(Tensor first_, Tensor first_bias_, Tensor second_, Tensor second_bias_) {
  STD_TORCH_CHECK(first_.dim() == 2 && second_.dim() == 2, "first, second: expected [outputs, inputs]");
  const MlpSizes s{first_.size(1), first_.size(0), second_.size(0)};
  check_sizes(s);
  MlpWeights w{};
  w.dtype = conv::dtype_of("first", first_);
  check_tensor("second", second_, first_, {s.O, s.H});
  const Tensor first = as_contiguous(first_), second = as_contiguous(second_);
  const MaybeTensor first_bias = conv::vector_of("first_bias", MaybeTensor(first_bias_), first, {s.H});
  const MaybeTensor second_bias = conv::vector_of("second_bias", MaybeTensor(second_bias_), first, {s.O});
  w.first = first.const_data_ptr(), w.second = second.const_data_ptr();
  w.first_bias = conv::floats(first_bias), w.second_bias = conv::floats(second_bias);
  const DeviceGuard guard(first.get_device_index());
  Tensor packed = empty(first, {MlpCudaLayout(s, w.dtype).floats}, ScalarType::Float);
  mlp_pack_cuda(s, w, packed.mutable_data_ptr<float>(), stream_of(first));
  return packed;
}

Tensor mlp_infer(Tensor input_, Tensor packed, MaybeTensor residual_, int64_t hidden, int64_t outputs, bool norm, double eps,
                 int64_t activation, double slope) {
  STD_TORCH_CHECK(input_.dim() == 2, "input: expected [rows, inputs]");
  Mlp p{};
  p.sizes = {input_.size(1), hidden, outputs}, p.M = input_.size(0);
  check_sizes(p.sizes);
  p.dtype = conv::dtype_of("input", input_), p.norm = norm, p.eps = static_cast<float>(eps), p.slope = static_cast<float>(slope);
  p.activation = conv::activation_of("activation", activation);
  STD_TORCH_CHECK(packed.device() == input_.device() && packed.scalar_type() == ScalarType::Float && packed.dim() == 1 &&
                      packed.is_contiguous() && packed.size(0) == MlpCudaLayout(p.sizes, p.dtype).floats &&
                      reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
                  "packed: not from mlp_pack for these sizes, with weights of input's dtype on its device");
  check_tensor("residual", residual_, input_, {p.M, outputs});
  const Tensor input = as_contiguous(input_);
  const MaybeTensor residual = as_contiguous(residual_);
  const DeviceGuard guard(input.get_device_index());
  Tensor output = empty(input, {p.M, outputs}, input.scalar_type());
  p.input = input.const_data_ptr(), p.residual = data(residual), p.packed = static_cast<const float*>(packed.const_data_ptr());
  p.output = output.mutable_data_ptr();
  mlp_cuda(p, stream_of(input));
  return output;
}

}  // namespace
}  // namespace pyops::linear

STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m) {
  m.impl("mlp_pack", TORCH_BOX(&pyops::linear::mlp_pack_tensors));
  m.impl("mlp_infer", TORCH_BOX(&pyops::linear::mlp_infer));
}
#endif  // PYOPS_CUDA
