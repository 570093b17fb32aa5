"""The activations that convolution kernels fuse: names, numbers, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE: dict[str, Callable[[Tensor, float], Tensor]] = {  # in the order of csrc/conv/depthwise.h's Activation
    "none": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "relu6": lambda x, slope: F.relu6(x),
    "silu": lambda x, slope: F.silu(x),
    "hardswish": lambda x, slope: F.hardswish(x),
    "gelu": lambda x, slope: F.gelu(x),
    "sigmoid": lambda x, slope: x.sigmoid(),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "tanh": lambda x, slope: x.tanh(),
    "hardsigmoid": lambda x, slope: F.hardsigmoid(x),
}
NAMES = tuple(REFERENCE)
_aten = torch.ops.aten
BACKWARD: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {  # of (gradient, the activation's input, slope)
    "none": lambda g, x, slope: g,
    "relu": lambda g, x, slope: _aten.threshold_backward(g, x, 0),
    "relu6": lambda g, x, slope: _aten.hardtanh_backward(g, x, 0, 6),
    "silu": lambda g, x, slope: _aten.silu_backward(g, x),
    "hardswish": lambda g, x, slope: _aten.hardswish_backward(g, x),
    "gelu": lambda g, x, slope: _aten.gelu_backward(g, x),
    "sigmoid": lambda g, x, slope: _aten.sigmoid_backward(g, x.sigmoid()),
    "leaky_relu": lambda g, x, slope: _aten.leaky_relu_backward(g, x, slope, False),
    "tanh": lambda g, x, slope: _aten.tanh_backward(g, x.tanh()),
    "hardsigmoid": lambda g, x, slope: _aten.hardsigmoid_backward(g, x),
}


def number(op: str, name: str, argument: str = "activation") -> int:
    """The kernels' number for a name. Raises ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(NAMES)}, got {name!r}")
    return NAMES.index(name)


def apply(x: Tensor, activation: int, slope: float) -> Tensor:
    return REFERENCE[NAMES[activation]](x, slope)


def apply_(x: Tensor, activation: int, slope: float) -> Tensor:
    """The same in place, without gradients."""
    if activation == 0:
        return x
    name = NAMES[activation]
    function = getattr(_aten, f"{name}_").default
    return function(x, slope) if name == "leaky_relu" else function(x)


def apply_backward(grad: Tensor, x: Tensor, activation: int, slope: float) -> Tensor:
    return BACKWARD[NAMES[activation]](grad, x, slope)
