// The recurrence of one layer on a GPU: what the torch glue calls. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>
#include <optional>

#include "rnn.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::rnn {

enum class Path : int32_t {
  one_cta = 0,  // the whole time loop in one block per 8 rows, weights on chip
  grid = 1,     // the whole time loop in one cooperative launch, each block holds 16 units' weights
  step = 2,     // one launch per step (two for gru_reset_before), weights from L2
};

struct PathChoice {
  Path path;
  const char* reason;
};

// Whether this path can hold the layer on such a device; null when it can, else why not.
const char* why_not(Path path, Cell cell, DType dtype, int64_t H, bool backward, int sm_count, int shared_bytes);

// Static facts only, so that the choice is the same on every call of a shape. `forced` wins where the path fits and throws
// std::runtime_error with the reason where it does not.
PathChoice choose_path(Cell cell, DType dtype, int64_t B, int64_t H, bool backward, int sm_count, int shared_bytes,
                       std::optional<Path> forced = std::nullopt);

// For the current device. `forced` must be the same in both calls. All work is queued on `stream`: nothing is allocated,
// nothing waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error. T, B, H >= 1.
size_t scan_workspace(Cell cell, DType dtype, int64_t T, int64_t B, int64_t H, bool backward, std::optional<Path> forced = std::nullopt);
void scan_forward(const ScanForward& p, cudaStream_t stream, std::optional<Path> forced = std::nullopt);
void scan_backward(const ScanBackward& p, cudaStream_t stream, std::optional<Path> forced = std::nullopt);

}  // namespace pyops::rnn
