// The fused MLP on a GPU: what the torch glue calls, and how its weights are packed. Plain C++, no CUDA header needed.
#pragma once
#include <cstddef>

#include "mlp.h"

typedef struct CUstream_st* cudaStream_t;

namespace pyops::linear {

constexpr int64_t kMlpMost = 192;  // inputs, and outputs: a row of either stays in the registers of four lanes

// Packed weights, in pieces of 16 bytes: for each chunk of `unit` hidden units, one after another, what a block copies to shared memory
// for it. A lane (4*g + t of a warp) finds the operands of two products of tensor cores in a piece of its own:
//   first   [inputs][unit / 8][lane]: first[chunk * unit + 8*j + g][i * unit + t * piece + v], v < piece
//   second  [outputs][unit / 8][lane]: second[i * unit + g / 2 * piece + 2*j + g % 2][the hidden units that lane t's sums are of]
//   first_bias [unit] in float
// and behind the last chunk second_bias [outputs * unit] in float; zeros beyond the last input, hidden unit or output. Weights are of the
// rows' type, floats rounded to tf32. No other type's packed weights have as many floats.
struct MlpCudaLayout {
  int piece, unit;                // elements of 16 bytes; four of them: of a row's inputs, outputs or hidden units
  int inputs, outputs, chunks;    // units
  int first, second, chunk_size;  // pieces: of a chunk's first and second part, of all of it
  int64_t floats;                 // in all
  MlpCudaLayout(const MlpSizes& s, DType dtype) {
    piece = dtype == DType::f32 ? 4 : 8, unit = 4 * piece;
    const auto units = [&](int64_t n) { return static_cast<int>((n + unit - 1) / unit); };
    inputs = units(s.C), outputs = units(s.O), chunks = units(s.H);
    first = inputs * (unit / 8) * 32, second = outputs * (unit / 8) * 32, chunk_size = first + second + unit / 4;
    floats = int64_t{4} * chunks * chunk_size + outputs * unit + static_cast<int64_t>(dtype) * 4;
  }
};

// For the current device; weights of `w.dtype`, float32, bfloat16 or float16. All work is queued on `stream`: nothing is allocated, nothing
// waits, capturable into a CUDA graph. Throws std::runtime_error on a CUDA error. float32 is multiplied as tf32. The same call gives the
// same bits, and a row's do not depend on the others.
void mlp_pack_cuda(const MlpSizes& s, const MlpWeights& w, float* packed, cudaStream_t stream);
void mlp_cuda(const Mlp& p, cudaStream_t stream);

}  // namespace pyops::linear
