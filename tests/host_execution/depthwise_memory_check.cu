// Runs the depthwise convolution's kernels on odd shapes with buffers of exactly the right size, for a build with
// -fsanitize=address,undefined. Each case runs twice, under two schedules; the results must be the same to the bit. Prints one line and
// returns 0, or fails.
#include <cstdio>

#include "../../csrc/conv/depthwise.cuh"
#include "exact_buffers.h"

using namespace pyops;
using namespace pyops::conv;

namespace {

struct Case {
  DepthwiseShape s;
  bool optional;  // the tensors that may be null are given
};

DepthwiseShape shape(int N, int C, int H, int W, int KH, int KW, int stride, int pad, int dilation) {
  auto out = [&](int size, int k) { return (size + 2 * pad - dilation * (k - 1) - 1) / stride + 1; };
  return {N, H, W, C, out(H, KH), out(W, KW), KH, KW, stride, stride, pad, pad, dilation, dilation};
}

std::vector<unsigned char> run(const Case& c, DType dtype, DType weight_dtype, uint64_t seed) {
  host::machine().seed = seed;
  host::machine().sm_count = 2;
  Buffers buffers;
  const DepthwiseShape& s = c.s;
  const size_t element = dtype == DType::f32 ? 4 : 2;
  const int64_t inputs = s.N * s.H * s.W * s.C, outputs = s.N * s.OH * s.OW * s.C, taps = int64_t{s.KH} * s.KW;
  std::vector<unsigned char> result;
  auto keep = [&](const void* data, size_t bytes) {
    result.resize(result.size() + bytes);
    std::memcpy(result.data() + result.size() - bytes, data, bytes);
  };
  DepthwiseForward f{};
  f.s = s, f.dtype = dtype, f.weight_dtype = weight_dtype;
  f.activation = c.optional ? Activation::silu : Activation::none;
  f.input = buffers.filled(inputs, dtype), f.weight = buffers.filled(s.C * taps, weight_dtype);
  f.bias = c.optional ? buffers.filled(s.C, weight_dtype) : nullptr;
  f.residual = c.optional ? buffers.filled(outputs, dtype) : nullptr;
  f.output = buffers.raw(static_cast<size_t>(outputs) * element);
  f.means = c.optional ? static_cast<float*>(buffers.raw(static_cast<size_t>(s.N * s.C) * 4)) : nullptr;
  depthwise_forward(f, buffers.raw(depthwise_forward_workspace(f)), nullptr);
  keep(f.output, static_cast<size_t>(outputs) * element);
  if (f.means) keep(f.means, static_cast<size_t>(s.N * s.C) * 4);

  DepthwiseBackward b{};
  b.s = s, b.dtype = dtype, b.weight_dtype = weight_dtype, b.activation = f.activation;
  b.grad_output = buffers.filled(outputs, dtype);
  b.grad_means = c.optional ? static_cast<const float*>(buffers.filled(s.N * s.C, DType::f32)) : nullptr;
  b.input = f.input, b.weight = f.weight, b.bias = f.bias, b.residual = f.residual;
  b.grad_input = buffers.raw(static_cast<size_t>(inputs) * element);
  b.grad_weight = static_cast<float*>(buffers.raw(static_cast<size_t>(s.C * taps) * 4));
  b.grad_bias = c.optional ? static_cast<float*>(buffers.raw(static_cast<size_t>(s.C) * 4)) : nullptr;
  b.grad_residual = c.optional ? buffers.raw(static_cast<size_t>(outputs) * element) : nullptr;
  depthwise_backward(b, buffers.raw(depthwise_backward_workspace(b)), nullptr);
  keep(b.grad_input, static_cast<size_t>(inputs) * element);
  keep(b.grad_weight, static_cast<size_t>(s.C * taps) * 4);
  if (b.grad_bias) keep(b.grad_bias, static_cast<size_t>(s.C) * 4);
  return result;
}

}  // namespace

int main() {
  std::vector<Case> cases = {
      {shape(2, 19, 5, 6, 3, 3, 1, 1, 1), true},  {shape(1, 16, 7, 6, 2, 4, 1, 1, 1), false}, {shape(2, 8, 9, 5, 3, 3, 1, 2, 2), true},
      {shape(1, 72, 3, 4, 3, 3, 1, 4, 1), false}, {shape(1, 8, 6, 7, 6, 6, 3, 3, 1), true},
  };
  for (int K : {3, 5, 7})
    for (int stride : {1, 2}) cases.push_back({shape(2, 72, 7, 6, K, K, stride, K / 2, 1), stride == 1});
  for (const Case& c : cases)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) try {
        const DType weight_dtype = c.optional ? DType::f32 : dtype;
        if (run(c, dtype, weight_dtype, 1) != run(c, dtype, weight_dtype, 2)) throw std::runtime_error("two runs gave different results");
      } catch (const std::exception& e) {
        std::printf("C %d K %d stride %d dtype %d: %s\n", static_cast<int>(c.s.C), c.s.KH, c.s.stride_h, static_cast<int>(dtype), e.what());
        return 1;
      }
  std::printf("%zu cases clean\n", 3 * cases.size());
}
