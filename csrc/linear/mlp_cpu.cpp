// The fused MLP on the CPU: the layout of packed weights, how many threads, and the kernel of the machine's instruction set.
#include "mlp_cpu.h"
#include "../common/isa.h"

#include <algorithm>

namespace pyops::linear {

MlpLayout::MlpLayout(const MlpSizes& s, bool pairs) {
  hidden_blocks = (s.H + 15) / 16, out_blocks = (s.O + 15) / 16;
  lanes = pairs ? (s.C + 1) / 2 : s.C, hidden_lanes = hidden_blocks * 16 / (pairs ? 2 : 1);
  first = 0, first_bias = first + hidden_blocks * lanes * 16;
  second = first_bias + hidden_blocks * 16, second_bias = second + out_blocks * hidden_lanes * 16;
  floats = second_bias + out_blocks * 16;
}

bool mlp_packs_pairs(DType weights) { return weights == DType::bf16 && cpu::cpu_isa()[3] == '5'; }  // "avx512", "avx2", "baseline"

void mlp_pack(const MlpSizes& s, const MlpWeights& w, float* packed) {
  const bool pairs = mlp_packs_pairs(w.dtype);
  PYOPS_CPU_KERNEL(mlp_weights)(s, w, pairs, packed);
}

void mlp_cpu(const Mlp& p) {
  constexpr int64_t kPerThread = 400000;  // products, about 5 us
  const int64_t work = p.M * p.sizes.H * (p.sizes.C + p.sizes.O) / kPerThread;
  const int threads = static_cast<int>(std::clamp<int64_t>(work, 1, std::min<int64_t>(cpu::max_threads(), p.M)));
  PYOPS_CPU_KERNEL(mlp)(p, threads);
}

}  // namespace pyops::linear
