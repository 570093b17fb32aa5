// MBConv on the CPU: packing (one layout for every instruction set, but for bfloat16 pairs), checks, and the kernel of the machine's
// instruction set.
#include "mbconv_cpu.h"
#include "../common/isa.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pyops::conv {
namespace {

constexpr int64_t B = kMBConvBlock;

int64_t blocks_of(int64_t channels) { return (channels + B - 1) / B; }

uint16_t to_bf16(float x) {  // to nearest even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// w [rows, columns] -> [rows/16][lanes][16] (pairs: [rows/16][lanes][16][2])
void pack_blocks(const float* w, int64_t rows, int64_t columns, bool pairs, float* to, int64_t lanes) {
  std::memset(to, 0, blocks_of(rows) * lanes * B * sizeof(float));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; ++k) {
      const float value = w[r * columns + k];
      if (pairs) {
        const uint16_t half = to_bf16(value);
        std::memcpy(reinterpret_cast<char*>(to + (r / B * lanes + k / 2) * B + r % B) + k % 2 * 2, &half, 2);
      } else {
        to[(r / B * lanes + k) * B + r % B] = value;
      }
    }
}

void pack_row(const float* from, int64_t count, int64_t padded, float* to) {
  std::memcpy(to, from, count * sizeof(float));
  std::memset(to + count, 0, (padded - count) * sizeof(float));
}

PackedHeader header_of(const MBConvSizes& s, bool pairs) { return {PackedHeader::kMagic, s.C, s.E, s.S, s.O, s.K, s.expand, pairs, 0}; }

}  // namespace

PackedLayout::PackedLayout(const MBConvSizes& s, bool pairs) {
  blocks = blocks_of(s.E), out_blocks = blocks_of(s.O);
  expand_lanes = s.expand ? (pairs ? (s.C + 1) / 2 : s.C) : 0;
  project_lanes = blocks * B / (pairs ? 2 : 1);
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    const int64_t start = at;
    at += (count + B - 1) / B * B;
    return start;
  };
  expand = take(blocks * expand_lanes * B), expand_bias = take(s.expand ? blocks * B : 0);
  depthwise = take(blocks * s.K * s.K * B), depthwise_bias = take(blocks * B);
  squeeze = take(s.S * blocks * B), squeeze_bias = take(s.S);
  gate = take(blocks * s.S * B), gate_bias = take(s.S ? blocks * B : 0);
  project = take(out_blocks * project_lanes * B), project_bias = take(out_blocks * B);
  floats = at;
}

bool mbconv_packs_pairs() { return cpu::cpu_isa()[3] == '5'; }  // "avx512", "avx2", "baseline"

int64_t mbconv_packed_bytes(const MBConvSizes& s, bool pairs) {
  return kPackedHeaderBytes + PackedLayout(s, pairs).floats * static_cast<int64_t>(sizeof(float));
}

void mbconv_pack(const MBConvSizes& s, const MBConvWeights& w, bool pairs, void* packed) {
  const PackedLayout at(s, pairs);
  const PackedHeader header = header_of(s, pairs);
  std::memset(packed, 0, kPackedHeaderBytes);
  std::memcpy(packed, &header, sizeof header);
  float* to = reinterpret_cast<float*>(static_cast<char*>(packed) + kPackedHeaderBytes);
  const int64_t E16 = at.blocks * B;
  if (s.expand) {
    pack_blocks(w.expand, s.E, s.C, pairs, to + at.expand, at.expand_lanes);
    pack_row(w.expand_bias, s.E, E16, to + at.expand_bias);
  }
  pack_blocks(w.depthwise, s.E, int64_t{s.K} * s.K, false, to + at.depthwise, int64_t{s.K} * s.K);
  pack_row(w.depthwise_bias, s.E, E16, to + at.depthwise_bias);
  if (s.S) {
    for (int64_t j = 0; j < s.S; ++j) pack_row(w.squeeze + j * s.E, s.E, E16, to + at.squeeze + j * E16);
    pack_row(w.squeeze_bias, s.S, blocks_of(s.S) * B, to + at.squeeze_bias);
    pack_blocks(w.gate, s.E, s.S, false, to + at.gate, s.S);
    pack_row(w.gate_bias, s.E, E16, to + at.gate_bias);
  }
  pack_blocks(w.project, s.O, s.E, pairs, to + at.project, at.project_lanes);
  pack_row(w.project_bias, s.O, at.out_blocks * B, to + at.project_bias);
}

const char* mbconv_mismatch(const MBConvSizes& s, const void* packed, int64_t bytes, bool* pairs) {
  PackedHeader header;
  if (bytes < kPackedHeaderBytes) return "too short";
  std::memcpy(&header, packed, sizeof header);
  if (header.magic != PackedHeader::kMagic) return "not from mbconv_pack";
  *pairs = header.pairs != 0;
  const PackedHeader wanted = header_of(s, *pairs);
  if (std::memcmp(&header, &wanted, sizeof header) != 0) return "packed for other sizes";
  if (bytes != mbconv_packed_bytes(s, *pairs)) return "not the size that mbconv_pack returned";
  if (*pairs && !mbconv_packs_pairs()) return "packed for a CPU with bfloat16 products";
  return nullptr;
}

MBConvSplit split_mbconv(int64_t blocks, int64_t rows, int32_t stride, int32_t K, int threads) {
  MBConvSplit best{0, 1, 1};
  int64_t best_cost = INT64_MAX;
  for (const int64_t whole : {blocks / threads * threads, int64_t{0}})
    for (int bands = 1; bands <= threads && bands <= rows; ++bands) {
      const int64_t rest = blocks - whole;
      const int units = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(rest, threads / bands)));
      // Expanded rows times blocks of the busiest member; a band expands rows of its neighbours' again.
      const int64_t band = (rows + bands - 1) / bands * stride + (bands > 1 ? K - 1 : 0);
      const int64_t cost = whole / threads * rows * stride + band * ((rest + units - 1) / units);
      if (cost < best_cost) best = {whole, units, bands}, best_cost = cost;
    }
  return best;
}

void mbconv_forward_cpu(const MBConvForward& p) {
  const MBConvSizes& s = p.sizes;
  if (p.N < 0 || p.H < 0 || p.W < 0 || s.C < 1 || s.E < 1 || s.S < 0 || s.O < 1 || s.K < 1 || s.K % 2 == 0 || p.stride < 1 ||
      (!s.expand && s.E != s.C) || (p.residual && (s.C != s.O || p.stride != 1)))
    throw std::runtime_error("mbconv: bad sizes");
  if (p.N == 0 || p.H == 0 || p.W == 0) return;
  PackedHeader header;
  std::memcpy(&header, p.packed, sizeof header);
  const bool pairs = header.pairs != 0;
  if (pairs && (p.dtype != DType::bf16 || !mbconv_packs_pairs())) throw std::runtime_error("mbconv: bfloat16 weights need bfloat16 input");
  PYOPS_CPU_KERNEL(mbconv_forward)(p, pairs);
}

}  // namespace pyops::conv
