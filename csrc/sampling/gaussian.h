// What sampling from diagonal normal distributions computes, and the parameter block that reaches it. No torch type below this line of the
// house.
//
//   z[n, i] = mean[n, i] + exp(log_var[n, i] / 2) * eps[n, i],   eps: pyops/ops/_philox.py's normal numbers of the seed
//   kl[n]   = sum over i of (mean^2 + (exp(log_var) - 1 - log_var)) / 2
//   gradient: grad_mean    = grad + grad_kl[n] * mean
//             grad_log_var = grad * exp(log_var / 2) * eps / 2 + grad_kl[n] * (exp(log_var) - 1) / 2
//
// exp(log_var) - 1 is formed from exp(log_var / 2) - 1 = e as e * (e + 2), so that one exponential serves all. Arithmetic is float. Floors:
// mean and log_var (and grad) read once, each result written once; some 65 operations an element, most of them Philox's and Box-Muller's.
#pragma once
#include "../conv/depthwise.h"

namespace pyops::sampling {

using conv::DType;

constexpr uint32_t kNormals = 0xFFFFFFFFu;  // the counter's last word
constexpr int64_t kMostColumns = int64_t{1} << 34, kMostRows = int64_t{1} << 32;

struct Gaussian {
  int64_t N, D;                             // rows, columns
  int64_t mean_row, log_var_row, grad_row;  // from one row to the next, elements; columns are neighbours
  DType dtype;                              // of all but kl and grad_kl
  const int64_t* seed;
  const void *mean, *log_var;
  void* z;    // [N, D]
  float* kl;  // [N]
  // of the gradient alone
  const void* grad;                // of z; null: none
  const float* grad_kl;            // [N]; null: none
  void *grad_mean, *grad_log_var;  // [N, D]
};

}  // namespace pyops::sampling
