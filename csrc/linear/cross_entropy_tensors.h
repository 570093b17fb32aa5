// The torch face of cross entropy over rows, on any device: checks tensors, allocates losses and fills cross_entropy.h's block. An Engine
// runs it: cross_entropy(p, logits). Schema, fake and reference are in pyops/ops/_cross_entropy_ops.py.
#pragma once
#include "conv/channel_tensors.h"
#include "linear/cross_entropy.h"

namespace pyops::linear {

template <class Engine>
Tensor cross_entropy_rows_(Tensor logits, Tensor target, MaybeTensor scale_, int64_t ignore_index, double smoothing, double softcap) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits: expected [M, V], contiguous");
  STD_TORCH_CHECK(softcap >= 0, "softcap: expected 0 or more, got ", softcap);
  CrossEntropy p{};
  p.M = logits.size(0), p.V = logits.size(1), p.ignore_index = ignore_index;
  p.dtype = conv::dtype_of("logits", logits);
  p.smoothing = static_cast<float>(smoothing), p.softcap = static_cast<float>(softcap);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.device() == logits.device() && target.dim() == 1 &&
                      target.size(0) == p.M && target.is_contiguous(),
                  "target: expected int64 [M] on logits' device, contiguous");
  const MaybeTensor scale = conv::vector_of("scale", scale_, logits, {p.M});
  Tensor losses = empty(logits, {p.M}, ScalarType::Float);
  p.logits = logits.mutable_data_ptr(), p.target = static_cast<const int64_t*>(target.const_data_ptr()), p.scale = conv::floats(scale);
  p.losses = losses.mutable_data_ptr<float>();
  if (p.M > 0) Engine::cross_entropy(p, logits);
  return losses;
}

}  // namespace pyops::linear
