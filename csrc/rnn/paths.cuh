// What the kernel files and the host code that chooses between them share.
#pragma once
#include <type_traits>

#include "../common/cuda_registry.h"
#include "../common/launch.cuh"
#include "cell.cuh"
#include "scan.cuh"
#include "tile.cuh"

namespace pyops::rnn {

// one_cta: a warp per 16 units. An SM's registers give a thread 255 in a block of 8 warps, 168 in one of 9 to 12, 128 in one
// of 13 to 16; the weights take 8 per tile and block of K. So 16-bit kernels come in two sizes, and a small layer (H <= 128)
// keeps all its weights in registers. Float weights are in shared memory anyway: one size.
template <Kind K, class T>
constexpr int kFewWarps = K == Kind::rnn ? 16
                          : is_16bit<T>  ? 8
                                         : 12;
template <Kind K, class T>
constexpr int kManyWarps = K == Kind::rnn ? 16 : 12;

constexpr int kGridThreads = 256;
constexpr int kStepThreads = 256;

// Elements per row of the states that blocks exchange through the workspace; a multiple of every kBlockK.
PYOPS_HOST_DEVICE constexpr int64_t padded_hidden(int64_t H) { return round_up(H, 32); }

// How the grid path cuts a batch: slices do not wait for each other.
struct GridShape {
  int unit_slices, row_slices, rows;  // rows per slice, a multiple of kTileRows
};
inline GridShape grid_shape(int64_t B, int64_t H, int sm_count) {
  const int units = static_cast<int>(ceil_div(H, kTileUnits)), tiles = static_cast<int>(ceil_div(B, kTileRows));
  const int room = sm_count / units > 0 ? sm_count / units : 1;
  const int per_slice = ceil_div(tiles, room < tiles ? room : tiles);
  return {units, ceil_div(tiles, per_slice), per_slice * kTileRows};
}

// Bytes, and where the parts of a workspace begin; each part 256-byte aligned.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base_ + size_);
    size_ += round_up(static_cast<size_t>(count) * sizeof(T), size_t{256});
    return part;
  }
  size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

size_t one_cta_forward_shared_bytes(Cell cell, DType dtype, int64_t H);
size_t one_cta_backward_shared_bytes(Cell cell, DType dtype, int64_t H);
size_t grid_shared_bytes(Cell cell, DType dtype, int64_t H);
size_t grid_workspace(Cell cell, DType dtype, int64_t B, int64_t H, bool backward, int sm_count);
size_t step_workspace(Cell cell, DType dtype, int64_t B, int64_t H, bool backward);

void one_cta_forward_launch(const ScanForward& p, cudaStream_t stream);
void one_cta_backward_launch(const ScanBackward& p, cudaStream_t stream);
void grid_forward_launch(const ScanForward& p, cudaStream_t stream);
void grid_backward_launch(const ScanBackward& p, cudaStream_t stream);
void step_forward_launch(const ScanForward& p, cudaStream_t stream);
void step_backward_launch(const ScanBackward& p, cudaStream_t stream);

// Calls f(KindTag, a value of the storage type).
template <Kind K>
struct KindTag {
  static constexpr Kind kind = K;
};
template <class F>
auto dispatch(Cell cell, DType dtype, F&& f) {
  auto with_type = [&](auto kind) {
    if (dtype == DType::f32) return f(kind, float{});
    if (dtype == DType::bf16) return f(kind, bf16{});
    if (dtype == DType::f16) return f(kind, f16{});
    throw std::runtime_error("the GPU recurrence computes float32, bfloat16 and float16 only");
  };
  switch (kind_of(cell)) {
    case Kind::lstm: return with_type(KindTag<Kind::lstm>{});
    case Kind::gru: return with_type(KindTag<Kind::gru>{});
    case Kind::gru_before: return with_type(KindTag<Kind::gru_before>{});
    default: return with_type(KindTag<Kind::rnn>{});
  }
}

// Calls f(KindTag, T, warps as std::integral_constant) for the smallest one_cta instance that has a warp per 16 units.
template <class F>
auto dispatch_one_cta(Cell cell, DType dtype, int64_t H, F&& f) {
  return dispatch(cell, dtype, [&](auto kind, auto type) {
    constexpr int kFew = kFewWarps<decltype(kind)::kind, decltype(type)>, kMany = kManyWarps<decltype(kind)::kind, decltype(type)>;
    if (H <= kFew * kTileUnits) return f(kind, type, std::integral_constant<int, kFew>{});
    return f(kind, type, std::integral_constant<int, kMany>{});
  });
}

}  // namespace pyops::rnn
