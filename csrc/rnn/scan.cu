// Which path runs a recurrence, how much workspace it needs, and the two entry points. Host code only.
#include "paths.cuh"

namespace pyops::rnn {

const char* why_not(Path path, Cell cell, DType dtype, int64_t H, bool backward, int sm_count, int shared_bytes) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
    return "the GPU recurrence computes float32, bfloat16 and float16 only";
  if (H > (int64_t{1} << 24)) return "hidden sizes above 2^24 are not supported";
  if (path == Path::one_cta) {
    const int warps = dispatch(cell, dtype, [](auto kind, auto type) { return kManyWarps<decltype(kind)::kind, decltype(type)>; });
    if (H > warps * kTileUnits) return "one block has too few threads for this hidden size";
    const size_t needed = backward ? one_cta_backward_shared_bytes(cell, dtype, H) : one_cta_forward_shared_bytes(cell, dtype, H);
    if (needed > static_cast<size_t>(shared_bytes)) return "W_hh does not fit one block's registers and shared memory";
  }
  if (path == Path::grid) {
    if (ceil_div(H, kTileUnits) > sm_count) return "the device has fewer SMs than the layer has slices of 16 units";
    if (grid_shared_bytes(cell, dtype, H) > static_cast<size_t>(shared_bytes))
      return "a block's slice of W_hh does not fit its registers and shared memory";
  }
  return nullptr;
}

PathChoice choose_path(Cell cell, DType dtype, int64_t B, int64_t H, bool backward, int sm_count, int shared_bytes,
                       std::optional<Path> forced) {
  auto reason_against = [&](Path path) { return why_not(path, cell, dtype, H, backward, sm_count, shared_bytes); };
  if (forced) {
    if (const char* reason = reason_against(*forced)) throw std::runtime_error(reason);
    return {*forced, "asked for"};
  }
  if (!reason_against(Path::one_cta)) return {Path::one_cta, "W_hh fits one block: no block waits for another"};
  if (const char* reason = reason_against(Path::grid)) return {Path::step, reason};
  // A slice takes 8 rows at a time. Beyond this many the loop over them outweighs the launches it saves; the bound is an
  // estimate, to be measured.
  constexpr int kMostRowsPerSlice = 64;
  if (grid_shape(B, H, sm_count).rows > kMostRowsPerSlice) return {Path::step, "a large batch: one full GEMM per step wins"};
  return {Path::grid, "W_hh fits the registers and shared memory of all SMs"};
}

size_t scan_workspace(Cell cell, DType dtype, int64_t T, int64_t B, int64_t H, bool backward, std::optional<Path> forced) {
  (void)T;  // no path keeps anything per step
  const DeviceLimits limits = device_limits();
  switch (choose_path(cell, dtype, B, H, backward, limits.sm_count, limits.shared_bytes, forced).path) {
    case Path::one_cta: return 0;
    case Path::grid: return grid_workspace(cell, dtype, B, H, backward, limits.sm_count);
    default: return step_workspace(cell, dtype, B, H, backward);
  }
}

template <class Scan>
static Path path_of(const Scan& p, bool backward, std::optional<Path> forced) {
  const DeviceLimits limits = device_limits();
  return choose_path(p.cell, p.dtype, p.B, p.H, backward, limits.sm_count, limits.shared_bytes, forced).path;
}

void scan_forward(const ScanForward& p, cudaStream_t stream, std::optional<Path> forced) {
  switch (path_of(p, false, forced)) {
    case Path::one_cta: return one_cta_forward_launch(p, stream);
    case Path::grid: return grid_forward_launch(p, stream);
    default: return step_forward_launch(p, stream);
  }
}

void scan_backward(const ScanBackward& p, cudaStream_t stream, std::optional<Path> forced) {
  switch (path_of(p, true, forced)) {
    case Path::one_cta: return one_cta_backward_launch(p, stream);
    case Path::grid: return grid_backward_launch(p, stream);
    default: return step_backward_launch(p, stream);
  }
}

}  // namespace pyops::rnn
