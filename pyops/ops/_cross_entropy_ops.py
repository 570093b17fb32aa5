"""The torch op of cross entropy over rows of logits, which become their own gradient.

    pyops::cross_entropy_rows_  [M] losses of logits [M, V] and target [M] (int64), in float32 (float64 for float64). With `scale` [M] of
                                that dtype, logits become scale[m] times the loss's gradient by them; without it they stay.

    y = softcap * tanh(logits / softcap), or logits for a softcap of 0
    loss = lse(y) - (1 - label_smoothing) * y[target] - label_smoothing * mean(y)

A row whose target is `ignore_index` has loss and gradient zero; another target outside of 0 .. V - 1 makes both NaN. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops


def _reference(logits: Tensor, target: Tensor, scale: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float) -> Tensor:
    V = logits.shape[1]
    x = logits.to(_channel_ops.vector_dtype(logits.dtype))
    bend = torch.tanh(x / softcap) if softcap else None
    y = x if bend is None else softcap * bend
    ignored, strange = target == ignore_index, (target < 0) | (target >= V)
    index = target.masked_fill(strange | ignored, 0)[:, None]
    lse = y.logsumexp(1)
    losses = lse - (1 - label_smoothing) * y.gather(1, index)[:, 0]
    losses = losses - label_smoothing * y.mean(1) if label_smoothing else losses  # which may be infinite
    losses = losses.masked_fill(strange, float("nan")).masked_fill(ignored, 0)
    if scale is not None:
        grad = torch.exp(y - lse[:, None]) - label_smoothing / V
        grad = grad.scatter_add(1, index, grad.new_full(index.shape, label_smoothing - 1))
        grad = grad if bend is None else grad * (1 - bend.square())
        grad = (grad * scale[:, None]).masked_fill(strange[:, None], float("nan")).masked_fill(ignored[:, None], 0)
        logits.copy_(grad)
    return losses


_library.define(
    "cross_entropy_rows_",
    "(Tensor(a!) logits, Tensor target, Tensor? scale, int ignore_index, float label_smoothing, float softcap) -> Tensor",
    fake=lambda logits, *_: _channel_ops.vector(logits, logits.shape[0]),
    reference=_reference,
    overloads=("", "triton"),
)


def _triton(*args):
    from pyops.triton_kernels import cross_entropy  # imports triton, so only at first use

    return cross_entropy.cross_entropy_rows_(*args)


_library.implement("cross_entropy_rows_.triton", _triton, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
