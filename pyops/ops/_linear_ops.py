"""The torch op of a linear layer of a few rows on a CPU.

pyops::linear_rows  activation(input @ weight.t() + bias + residual), input [M, K] of at most 4 rows, weight [N, K]; bias is float32
                    (float64 for float64), sums are; not differentiable
"""

from __future__ import annotations

from pyops import _library
from pyops.ops import _activations, _channel_ops

MOST_ROWS = 4


def _reference(input, weight, bias, residual, activation, slope):
    kind = _channel_ops.vector_dtype(input.dtype)
    y = input.to(kind) @ weight.to(kind).t()
    y = y if bias is None else y + bias
    return _activations.apply(y if residual is None else y + residual, activation, slope).to(input.dtype)


_library.define(
    "linear_rows",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int activation, float slope) -> Tensor",
    fake=lambda input, weight, *_: input.new_empty(input.shape[0], weight.shape[0]),
    reference=_reference,
)
