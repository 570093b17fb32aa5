"""A convolution and what follows it on PyTorch's own engines: oneDNN's fused calls where they have one, else one op after another.

The fused calls are private to PyTorch: `fused_by` says whether one runs a call, and the plain ops are there where it does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops.ops import _activations, _conv_call

_onednn: Any = torch.ops.mkldnn


class Pool(NamedTuple):
    """The maximum or the average over windows of an image."""

    maximum: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def in_kernel(self) -> int:
        """The number that convolution kernels have for it; 0: they have none."""
        plain = self.kernel == self.stride == (2, 2) and self.padding == (0, 0)
        return (1 if self.maximum else 2) if plain else 0


UPSAMPLINGS = (None, "nearest", "bilinear")  # in the order of csrc/conv/winograd.h's Upsample


class Conv(NamedTuple):
    """A convolution's numbers, one per spatial dimension, and what comes before and after it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None  # of a transposed convolution; None: it is not one
    activation: int = 0
    slope: float = 0.0
    residual_last: bool = False
    upsample: int = 0  # of UPSAMPLINGS: the convolution's input is the given one enlarged twice
    pool: Pool | None = None  # of what is finished

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


def enlarge(input: Tensor, call: Conv) -> Tensor:
    """The image that the convolution sees, differentiable."""
    return F.interpolate(input, scale_factor=2, mode=str(UPSAMPLINGS[call.upsample])) if call.upsample else input


def pool(y: Tensor, call: Conv) -> Tensor:
    """What pooling makes of the finished image, differentiable."""
    return y if call.pool is None else pool_by(y, call.pool)


def pool_by(y: Tensor, pool: Pool) -> Tensor:
    return (F.max_pool2d if pool.maximum else F.avg_pool2d)(y, *pool[1:])


def seen(shape, call: Conv) -> tuple[int, ...]:
    """The shape of the image that the convolution sees."""
    return (*shape[:2], *(2 * n for n in shape[2:])) if call.upsample else tuple(shape)


_POST_OPS: dict[str, tuple[str, list]] = {  # ours -> oneDNN's, as ATen names them
    "none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0]), "silu": ("swish", []), "hardswish": ("hardswish", []),
    "gelu": ("gelu", []), "sigmoid": ("sigmoid", []), "tanh": ("tanh", []), "hardsigmoid": ("hardsigmoid", []),
}  # fmt: skip


def switches() -> tuple:
    """torch's global switches that a choice of kernels depends on."""
    backends: Any = torch.backends
    return backends.mkldnn.conv.fp32_precision, backends.mkldnn.enabled


def is_pointwise(weight: Tensor, call: Conv) -> bool:
    """Whether the convolution is a matrix product of the image's positions."""
    ones = all(k == 1 for k in weight.shape[2:]) and all(s == 1 for s in call.stride) and not any(call.padding)
    return ones and weight.dim() == 4 and call.groups == 1 and not call.transposed


def post_op(activation: int, slope: float) -> tuple[str, list]:
    """oneDNN's name for an activation, and its numbers."""
    name = _activations.NAMES[activation]
    return ("leaky_relu", [slope]) if name == "leaky_relu" else _POST_OPS[name]


def fused_by(input: Tensor, call: Conv) -> str | None:
    """ "onednn" where one call does the convolution and its activation, else None."""
    kind = input.dtype in (torch.float32, torch.bfloat16) and input.is_cpu and input.numel() > 0
    if not kind or call.transposed or _conv_call.is_followed():
        return None
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and hasattr(_onednn, "_convolution_pointwise")
    return "onednn" if there and (input.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()) else None


def keep(weight: Tensor, input: Tensor, call: Conv) -> Tensor:
    """The filter as `run` takes it soonest, for owners that keep it: in the layout that oneDNN wants for inputs like this one."""
    weight = weight.to(input.dtype)
    if fused_by(input, call) is None or not hasattr(_onednn, "_reorder_convolution_weight") or input.dim() != 4:
        return weight
    if is_pointwise(weight, call):  # as a linear layer: the call costs half as much
        return _onednn._reorder_linear_weight(weight.flatten(1), input.numel() // input.shape[1])
    return _onednn._reorder_convolution_weight(weight, call.padding, call.stride, call.dilation, call.groups, list(input.shape))


def run(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv) -> Tensor:
    """Convolution, bias, activation and residual without gradients; weight of input's dtype, or from `keep`."""
    if fused_by(input, call) is None:
        return finish(convolution(input, weight, bias, call), residual, call)
    return run_fused(input, weight, bias, residual, call)


def run_fused(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv) -> Tensor:
    """`run` where `fused_by` has said that oneDNN does it."""
    first = residual is not None and not call.residual_last
    attr, scalars = ("none", []) if first else post_op(call.activation, call.slope)
    if weight.dim() == 2:
        return _positions(input, weight, bias, residual, call, attr, scalars)
    numbers = (call.padding, call.stride, call.dilation, call.groups)
    if first and call.activation in (0, 1) and input.dim() > 3:  # none, relu
        bias = None if bias is None else bias.to(input.dtype)
        then: tuple[Any, ...] = ("relu" if call.activation else None, [], None)
        return _onednn._convolution_pointwise.binary(input, residual, weight, bias, *numbers, "add", None, *then)
    y = _onednn._convolution_pointwise(input, weight, bias, *numbers, attr, scalars, "none" if attr == "gelu" else "")
    if residual is None:
        return y
    y = y.add_(residual)
    return _activations.apply(y, call.activation, call.slope) if first else y


def _positions(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv, attr: str, scalars: list) -> Tensor:
    """A 1x1 convolution as a product of positions."""
    N, C, H, W = input.shape
    rows = input.permute(0, 2, 3, 1).reshape(-1, C)
    bias = None if bias is None else bias.to(input.dtype)
    if residual is None or call.residual_last:
        y = _onednn._linear_pointwise(rows, weight, bias, attr, scalars, "none" if attr == "gelu" else "")
    else:
        beside = residual.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        y = _activations.apply(_onednn._linear_pointwise.binary(rows, beside, weight, bias, "add"), call.activation, call.slope)
    output = y.view(N, H, W, -1).permute(0, 3, 1, 2)
    return output.add_(residual) if residual is not None and call.residual_last else output
