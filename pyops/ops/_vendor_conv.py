"""A convolution and what follows it on PyTorch's own engines: oneDNN's fused calls where they have one, else one op after another.

The fused calls are private to PyTorch: `fused_by` says whether one runs a call, and the plain ops are there where it does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyops.ops import _activations, _conv_call

_onednn: Any = torch.ops.mkldnn


class Conv(NamedTuple):
    """A convolution's numbers, one per spatial dimension, and its epilogue's."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None  # of a transposed convolution; None: it is not one
    activation: int = 0
    slope: float = 0.0
    residual_last: bool = False

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, call: Conv) -> Tensor:
    """The convolution alone, differentiable."""
    bias = None if bias is None else bias.to(weight.dtype)
    rest = call.output_padding or (0,) * len(call.stride)
    return torch.convolution(input, weight, bias, call.stride, call.padding, call.dilation, call.transposed, rest, call.groups)


def finish(y: Tensor, residual: Tensor | None, call: Conv) -> Tensor:
    """What follows the convolution and its bias."""
    if residual is not None and not call.residual_last:
        y = y + residual
    y = _activations.apply(y, call.activation, call.slope)
    return y + residual if residual is not None and call.residual_last else y


_POST_OPS: dict[str, tuple[str, list]] = {  # ours -> oneDNN's, as ATen names them
    "none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0]), "silu": ("swish", []), "hardswish": ("hardswish", []),
    "gelu": ("gelu", []), "sigmoid": ("sigmoid", []), "tanh": ("tanh", []), "hardsigmoid": ("hardsigmoid", []),
}  # fmt: skip


def post_op(activation: int, slope: float) -> tuple[str, list]:
    """oneDNN's name for an activation, and its numbers."""
    name = _activations.NAMES[activation]
    return ("leaky_relu", [slope]) if name == "leaky_relu" else _POST_OPS[name]


def fused_by(input: Tensor, call: Conv) -> str | None:
    """ "onednn" where one call does the convolution and its activation, else None."""
    kind = input.dtype in (torch.float32, torch.bfloat16) and input.is_cpu and input.numel() > 0
    if not kind or call.transposed or torch.compiler.is_compiling() or _conv_call.is_recorded():
        return None
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and hasattr(_onednn, "_convolution_pointwise")
    return "onednn" if there and (input.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()) else None


def keep(weight: Tensor, input: Tensor, call: Conv) -> Tensor:
    """The filter as `run` takes it soonest, for owners that keep it: in the layout that oneDNN wants for inputs like this one."""
    weight = weight.to(input.dtype)
    if fused_by(input, call) is None or not hasattr(_onednn, "_reorder_convolution_weight") or input.dim() != 4:
        return weight
    return _onednn._reorder_convolution_weight(weight, call.padding, call.stride, call.dilation, call.groups, list(input.shape))


def run(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv) -> Tensor:
    """Convolution, bias, activation and residual without gradients; weight of input's dtype, or from `keep`."""
    if fused_by(input, call) is None:
        return finish(convolution(input, weight, bias, call), residual, call)
    name = _activations.NAMES[call.activation]
    numbers = (call.padding, call.stride, call.dilation, call.groups)
    first = residual is not None and not call.residual_last
    if first and name in ("none", "relu"):
        bias = None if bias is None else bias.to(input.dtype)
        then: tuple[Any, ...] = (None if name == "none" else name, [], None)
        return _onednn._convolution_pointwise.binary(input, residual, weight, bias, *numbers, "add", None, *then)
    attr, scalars = ("none", []) if first else post_op(call.activation, call.slope)
    y = _onednn._convolution_pointwise(input, weight, bias, *numbers, attr, scalars, "none" if attr == "gelu" else "")
    if residual is None:
        return y
    y = y.add_(residual)
    return _activations.apply(y, call.activation, call.slope) if first else y
