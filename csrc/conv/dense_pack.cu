// Packs filters for dense_conv.cu: sorted taps, channels innermost.
//
//   weight [O, C/groups, KH, KW] or transposed [C, O/groups, KH, KW], any strides  ->  packed [O, pitch]: taps x depth, zeros behind
//
// A thread copies an element; neighbouring threads write neighbouring channels. Floors: weight read and written once.
#include "../common/cuda_registry.h"
#include "dense_conv.cuh"
#include "dense_pack.cuh"

namespace pyops::conv {
namespace {

constexpr int kPackThreads = 256;

struct PackParams {
  const void* weight;
  void* packed;
  int64_t count, pitch;  // O * pitch elements
  int64_t group_stride, o_stride, c_stride, y_stride, x_stride;
  Axis y, x;
  int O, C, depth, columns;  // O, C: of a group; columns: taps of x that weight has, zeros for the rest
};

// Raw: an unsigned integer of the elements' size.
template <class Raw>
PYOPS_KERNEL(kPackThreads)
dense_pack(PackParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.count) return;
  const int o = static_cast<int>(i / p.pitch), k = static_cast<int>(i % p.pitch), tap = k / p.depth, c = k % p.depth;
  Raw* const row = static_cast<Raw*>(p.packed) + o * p.pitch;
  if (tap >= p.y.taps * p.x.taps) {
    row[k] = 0;
    return;
  }
  const int ky = tap / p.x.taps, kx = tap % p.x.taps, ry = ky % p.y.residues, rx = kx % p.x.residues;
  const int phase = taps_before(p.y, ry) * p.x.taps + taps_of(p.y, ry) * taps_before(p.x, rx);
  const int sorted = phase + ky / p.y.residues * taps_of(p.x, rx) + kx / p.x.residues;
  const int64_t from = o / p.O * p.group_stride + o % p.O * p.o_stride + c * p.c_stride + ky * p.y_stride + kx * p.x_stride;
  row[static_cast<int64_t>(sorted) * p.depth + c] = c < p.C && kx < p.columns ? static_cast<const Raw*>(p.weight)[from] : Raw{0};
}

template <class Raw>
void launch_pack(const PackParams& params, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(params.count, int64_t{kPackThreads}))), kPackThreads, 0};
  launch("dense_pack", dense_pack<Raw>, shape, stream, params);
}

}  // namespace

void pack_filters(const Dense& p, const Axis& y, const Axis& x, int depth, int64_t pitch, void* packed, cudaStream_t stream) {
  PackParams params{};
  const int64_t O = p.s.O / p.s.groups, C = p.s.C / p.s.groups, first = p.weight_strides[0], second = p.weight_strides[1];
  params.weight = p.weight, params.packed = packed, params.count = p.s.O * pitch, params.pitch = pitch;
  params.group_stride = (p.transposed ? C : O) * first;
  params.o_stride = p.transposed ? second : first, params.c_stride = p.transposed ? first : second;
  params.y_stride = p.weight_strides[2], params.x_stride = p.weight_strides[3];
  params.y = y, params.x = x, params.O = static_cast<int>(O), params.C = static_cast<int>(C), params.depth = depth;
  params.columns = p.s.KW;
  p.dtype == DType::f32 ? launch_pack<uint32_t>(params, stream) : launch_pack<uint16_t>(params, stream);
}

static const KernelRegistration registration({
    PYOPS_KERNEL_INFO(dense_pack, uint16_t),
    PYOPS_KERNEL_INFO(dense_pack, uint32_t),
});

}  // namespace pyops::conv
