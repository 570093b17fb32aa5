// CPU side of MBConv: the entry points, the packed weights, and what mbconv_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "mbconv.h"

namespace pyops::conv {

constexpr int64_t kMBConvBlock = 16;  // channels

// First bytes of a packed buffer. The buffer belongs to one layout: `pairs` says whether the dense weights are bfloat16 pairs, which only
// kernels with vdpbf16ps read.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x31764e4f43424d70;  // "pMBCONv1"
  uint64_t magic;
  int64_t C, E, S, O;
  int32_t K, expand, pairs, reserved;
};

// Where the parts of a packed buffer start, in floats behind the header. Blocks are of 16 channels, zeros beyond the last.
//   expand     [E/16][C][16]  or, as pairs, [E/16][C/2][16][2];  depthwise [E/16][K*K][16]
//   squeeze    [S][E];  gate [E/16][S][16];  project [O/16][E][16] or [O/16][E/2][16][2];  biases [E], [E], [S], [E], [O]
struct PackedLayout {
  int64_t blocks, out_blocks, expand_lanes, project_lanes;  // lanes: of 32 bits along the summed dimension
  int64_t expand, expand_bias, depthwise, depthwise_bias, squeeze, squeeze_bias, gate, gate_bias, project, project_bias;
  int64_t floats;  // in all
  PackedLayout(const MBConvSizes& s, bool pairs);
};
constexpr int64_t kPackedHeaderBytes = 64;
static_assert(sizeof(PackedHeader) <= kPackedHeaderBytes);

bool mbconv_packs_pairs();  // whether the kernels in use want bfloat16 weights as pairs
int64_t mbconv_packed_bytes(const MBConvSizes& s, bool pairs);
void mbconv_pack(const MBConvSizes& s, const MBConvWeights& w, bool pairs, void* packed);
// Why `packed` cannot serve these sizes on this machine; null when it can. Sets `pairs`.
const char* mbconv_mismatch(const MBConvSizes& s, const void* packed, int64_t bytes, bool* pairs);
void mbconv_forward_cpu(const MBConvForward& p);

// How a crew shares an image: the first `whole` blocks of channels, a multiple of the crew, are dealt out for all rows; of the others,
// `units` members take a share each, and `bands` such groups a band of output rows each.
struct MBConvSplit {
  int64_t whole;
  int units, bands;
};
MBConvSplit split_mbconv(int64_t blocks, int64_t rows, int32_t stride, int32_t K, int threads);

#define PYOPS_MBCONV_KERNELS(isa)                          \
  namespace isa {                                          \
  void mbconv_forward(const MBConvForward& p, bool pairs); \
  }
PYOPS_MBCONV_KERNELS(baseline)
#if defined(__x86_64__)
PYOPS_MBCONV_KERNELS(avx2)
PYOPS_MBCONV_KERNELS(avx512)
#endif

}  // namespace pyops::conv
