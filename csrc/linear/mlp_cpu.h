// CPU side of the fused MLP: the entry points, the packed weights, and what mlp_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "mlp.h"

namespace pyops::linear {

// Where the parts of packed weights start, in floats: blocks of 16 outputs, [H/16][C][16] and [O/16][H16][16] with H16 = H rounded up to
// 16, or as bfloat16 pairs along the summed dimension, [C/2][16][2]; zeros beyond the last. Biases [H16], [O16].
struct MlpLayout {
  int64_t hidden_blocks, out_blocks, lanes, hidden_lanes;  // lanes: of 32 bits along the summed dimension
  int64_t first, first_bias, second, second_bias;
  int64_t floats;  // in all
  MlpLayout(const MlpSizes& s, bool pairs);
};

bool mlp_packs_pairs(DType weights);  // whether the kernels in use multiply such weights as pairs
void mlp_pack(const MlpSizes& s, const MlpWeights& w, float* packed);
void mlp_cpu(const Mlp& p);

#define PYOPS_MLP_KERNELS(isa)                                                         \
  namespace isa {                                                                      \
  void mlp(const Mlp& p, int threads);                                                 \
  void mlp_weights(const MlpSizes& s, const MlpWeights& w, bool pairs, float* packed); \
  }
PYOPS_MLP_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_MLP_KERNELS(avx2)
PYOPS_MLP_KERNELS(avx512)
#endif

}  // namespace pyops::linear
