// C interface to the kernels, compiled for the host or for a GPU: what the tests call through ctypes.
#include <cstdio>

#include "../../csrc/attention/attention_backward_cuda.h"
#include "../../csrc/attention/attention_cuda.h"
#include "../../csrc/capsule/routing_cuda.h"
#include "../../csrc/common/cuda_registry.h"
#include "../../csrc/common/launch.cuh"
#include "../../csrc/conv/channel_cuda.h"
#include "../../csrc/conv/dense_cuda.h"
#include "../../csrc/conv/depthwise_cuda.h"
#include "../../csrc/conv/expand_depthwise_cuda.h"
#include "../../csrc/conv/pointwise_cuda.h"
#include "../../csrc/conv/pool_cuda.h"
#include "../../csrc/linear/cross_entropy_cuda.h"
#include "../../csrc/linear/mlp_cuda.h"
#include "../../csrc/norm/channel_norms_cuda.h"
#include "../../csrc/rnn/scan.cuh"
#include "../../csrc/sampling/gaussian_cuda.h"

using namespace pyops;
using namespace pyops::rnn;

namespace {

template <class F>
int guarded(char* error, int error_bytes, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, static_cast<size_t>(error_bytes), "%s", e.what());
    return 1;
  }
}

std::optional<Path> path_or_auto(int path) { return path < 0 ? std::nullopt : std::optional<Path>(static_cast<Path>(path)); }

std::optional<conv::DensePath> dense_path(int path) {
  return path < 0 ? std::nullopt : std::optional<conv::DensePath>(static_cast<conv::DensePath>(path));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The schedule and the size of the machine to run on; a GPU has its own.
void host_machine(uint64_t seed, int sm_count, int shared_limit) {
#if defined(__CUDACC__)
  (void)seed, (void)sm_count, (void)shared_limit;
#else
  host::machine().seed = seed;
  host::machine().sm_count = sm_count;
  host::machine().shared_limit = shared_limit;
#endif
}

int host_scan_workspace(int cell, int dtype, int64_t T, int64_t B, int64_t H, int backward, int path, int64_t* bytes, char* error,
                        int error_bytes) {
  return guarded(error, error_bytes, [&] {
    *bytes = static_cast<int64_t>(
        scan_workspace(static_cast<Cell>(cell), static_cast<DType>(dtype), T, B, H, backward != 0, path_or_auto(path)));
  });
}

int host_scan_forward(const ScanForward* p, int path, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { scan_forward(*p, nullptr, path_or_auto(path)); });
}

int host_scan_backward(const ScanBackward* p, int path, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { scan_backward(*p, nullptr, path_or_auto(path)); });
}

int host_choose_path(int cell, int dtype, int64_t B, int64_t H, int backward, int sm_count, int shared_bytes) {
  return static_cast<int>(
      choose_path(static_cast<Cell>(cell), static_cast<DType>(dtype), B, H, backward != 0, sm_count, shared_bytes).path);
}

// Starts the count of launches anew.
void host_forget_launches() {
#if !defined(__CUDACC__)
  host::machine().launched.clear();
#endif
}

// Bytes of workspace: of the forward pass, or where that is null of the backward pass.
int host_depthwise_workspace(const conv::DepthwiseForward* forward, const conv::DepthwiseBackward* backward, int64_t* bytes, char* error,
                             int error_bytes) {
  return guarded(error, error_bytes, [&] {
    *bytes = static_cast<int64_t>(forward ? conv::depthwise_forward_workspace(*forward) : conv::depthwise_backward_workspace(*backward));
  });
}

int host_depthwise_forward(const conv::DepthwiseForward* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::depthwise_forward(*p, workspace, nullptr); });
}

int host_depthwise_backward(const conv::DepthwiseBackward* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::depthwise_backward(*p, workspace, nullptr); });
}

// op: moments, apply, totals, reduce, gradient.
int host_channel_workspace(int op, const conv::Channelwise* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] {
    *bytes = static_cast<int64_t>(op == 0   ? conv::channel_moments_workspace(*p)
                                  : op == 2 ? conv::channel_totals_workspace(*p)
                                  : op == 3 ? conv::channel_reduce_workspace(*p)
                                            : 0);
  });
}

int host_channel(int op, const conv::Channelwise* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] {
    switch (op) {
      case 0: return conv::channel_moments(*p, workspace, nullptr);
      case 1: return conv::channel_apply(*p, nullptr);
      case 2: return conv::channel_totals(*p, workspace, nullptr);
      case 3: return conv::channel_reduce(*p, workspace, nullptr);
      default: return conv::channel_gradient(*p, nullptr);
    }
  });
}

// op: run, reduce, gradient.
int host_pool_workspace(int op, const conv::Pooling* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(op == 1 ? conv::pool_reduce_workspace(*p) : 0); });
}

int host_pool(int op, const conv::Pooling* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] {
    switch (op) {
      case 0: return conv::pool_run(*p, nullptr);
      case 1: return conv::pool_reduce(*p, workspace, nullptr);
      default: return conv::pool_gradient(*p, nullptr);
    }
  });
}

int host_pointwise_workspace(const conv::Pointwise* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(conv::pointwise_workspace(*p)); });
}

int host_pointwise(const conv::Pointwise* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::pointwise_run(*p, workspace, nullptr); });
}

int host_expand_depthwise_workspace(const conv::ExpandDepthwise* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(conv::expand_depthwise_workspace(*p)); });
}

int host_expand_depthwise(const conv::ExpandDepthwise* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::expand_depthwise_run(*p, workspace, nullptr); });
}

int host_expand_depthwise_tile(const conv::ExpandDepthwise* p, conv::ExpandDepthwiseTile* tile, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *tile = conv::expand_depthwise_tile(*p); });
}

int host_dense_workspace(const conv::Dense* p, int path, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(conv::dense_workspace(*p, dense_path(path))); });
}

int host_dense(const conv::Dense* p, int path, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::dense_run(*p, workspace, nullptr, dense_path(path)); });
}

int host_dense_wgrad_workspace(const conv::DenseGradient* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(conv::dense_wgrad_workspace(*p)); });
}

int host_dense_wgrad(const conv::DenseGradient* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { conv::dense_wgrad(*p, workspace, nullptr); });
}

// gradient: of the norm, else the norm itself, which needs no workspace.
int host_lrn_workspace(const norm::LocalResponse* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(norm::lrn_gradient_workspace(*p)); });
}

int host_lrn(int gradient, const norm::LocalResponse* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { gradient ? norm::lrn_gradient(*p, workspace, nullptr) : norm::lrn(*p, nullptr); });
}

int host_layer_norm_workspace(const norm::LayerNorm* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(norm::layer_norm_gradient_workspace(*p)); });
}

int host_layer_norm(int gradient, const norm::LayerNorm* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { gradient ? norm::layer_norm_gradient(*p, workspace, nullptr) : norm::layer_norm(*p, nullptr); });
}

int host_gaussian_workspace(const sampling::Gaussian* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(sampling::gaussian_workspace(*p)); });
}

// gradient: of the sample, which needs no workspace.
int host_gaussian(int gradient, const sampling::Gaussian* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes,
                 [&] { gradient ? sampling::gaussian_gradient(*p, nullptr) : sampling::gaussian(*p, workspace, nullptr); });
}

int host_capsule_workspace(int gradient, const capsule::Routing* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(capsule::routing_workspace(*p, gradient != 0)); });
}

int host_capsule(int gradient, const capsule::Routing* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes,
                 [&] { gradient ? capsule::routing_gradient(*p, workspace, nullptr) : capsule::routing(*p, workspace, nullptr); });
}

int host_mlp_floats(const linear::MlpSizes* sizes, int dtype, int64_t* floats, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *floats = linear::MlpCudaLayout(*sizes, static_cast<linear::DType>(dtype)).floats; });
}

int host_mlp_pack(const linear::MlpSizes* sizes, const linear::MlpWeights* weights, float* packed, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { linear::mlp_pack_cuda(*sizes, *weights, packed, nullptr); });
}

int host_mlp(const linear::Mlp* p, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { linear::mlp_cuda(*p, nullptr); });
}

int host_cross_entropy(const linear::CrossEntropy* p, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { linear::cross_entropy_cuda(*p, nullptr); });
}

int host_attention(const attention::Attention* p, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { attention::attention_cuda(*p, nullptr); });
}

int host_window_attention(const attention::WindowAttention* p, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { attention::window_attention_cuda(*p, nullptr); });
}

int host_attention_gradient_workspace(const attention::AttentionGradient* g, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(attention::attention_gradient_workspace(*g)); });
}

int host_attention_gradient(const attention::AttentionGradient* g, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { attention::attention_gradient_cuda(*g, workspace, nullptr); });
}

int host_window_attention_gradient_workspace(const attention::WindowAttention* p, int64_t* bytes, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { *bytes = static_cast<int64_t>(attention::window_attention_gradient_workspace(*p)); });
}

int host_window_attention_gradient(const attention::WindowAttention* p, void* workspace, char* error, int error_bytes) {
  return guarded(error, error_bytes, [&] { attention::window_attention_gradient_cuda(*p, workspace, nullptr); });
}

// The names, one per line, of kernels that were launched on the host and are not in the registry. Returns the text's length.
int host_unregistered_launches(char* text, int bytes) {
  int used = 0;
  text[0] = 0;
#if !defined(__CUDACC__)
  int count = 0;
  const KernelInfo* kernels = kernel_table(&count);
  for (const auto& [function, seen] : host::machine().launched) {
    bool known = false;
    for (int i = 0; i < count; ++i) known |= kernels[i].function == function;
    if (!known && used < bytes) used += std::snprintf(text + used, static_cast<size_t>(bytes - used), "%s\n", seen.name);
  }
#endif
  return used;
}

// One line a registered kernel: its name, its portable substitute, how often it was launched (counted on the host alone), and
// the most threads and dynamic shared memory it was launched with. Returns the text's length, -1 where it does not fit.
int host_kernel_table(char* text, int bytes) {
  int count = 0, used = 0;
  const KernelInfo* kernels = kernel_table(&count);
  for (int i = 0; i < count; ++i) {
    int launches = 0, threads = 0;
    size_t shared = 0;
#if !defined(__CUDACC__)
    const auto& launched = host::machine().launched;
    const auto found = launched.find(kernels[i].function);
    const host::Launched seen = found == launched.end() ? host::Launched{} : found->second;
    launches = seen.launches, threads = seen.threads, shared = seen.shared_bytes;
#endif
    const char* portable = kernels[i].portable ? kernels[i].portable : "";
    used += std::snprintf(text + used, static_cast<size_t>(bytes - used), "%s\t%s\t%d\t%d\t%zu\n", kernels[i].name, portable, launches,
                          threads, shared);
    if (used >= bytes) return -1;
  }
  return used;
}

}  // extern "C"
#pragma GCC visibility pop
