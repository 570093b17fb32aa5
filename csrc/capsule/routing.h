// What dynamic routing between capsules computes, and the parameter block that reaches its kernels. No torch type below this line.
//
// N samples, I input capsules, J output capsules of D elements, T iterations. u [N, I, J, D], or [I, N, J, D] with `by_input`; dense.
//   iteration t: c_ij = softmax over j of u_ij . V_tj,  V_t = v_0 + .. + v_(t-1),  s_tj = sum over i of c_ij u_ij,  v_tj = squash(s_tj)
//   squash(s) = s * |s| / (1 + |s|^2);   output = v_(T-1)
// gradient, with h_t = squash'(s_t) * (the gradient of v_t), of t = T-1 .. 0:
//   l_ij = c_ij * (u_ij . h_tj - sum over k of c_ik * u_ik . h_tk)   (none with `stop_gradient`, which ends after the first t)
//   output_ij += c_ij * h_tj + l_ij * V_tj;   sum over i of l_ij u_ij is added to the gradients of all v before v_t
// Floors: u read once for each iteration (from memory once, where a sample's predictions stay in cache), the gradient written once.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::capsule {

using conv::DType;

struct Routing {
  int64_t N, I, J, D, T;
  DType dtype;                      // of input, grad, output
  int32_t by_input, stop_gradient;  // of bool
  const void *input, *grad;         // u; [N, J, D], in the gradient alone
  float* sums;                      // [N, T, J, D]: each s, written forwards and read by the gradient
  void* output;                     // [N, J, D], or the gradient of u, laid out as it is
};

}  // namespace pyops::capsule
