"""Depthwise convolution with batch norm, residual, activation and the means of its output, in one pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _conv_call, _depthwise_ops
from pyops.ops.batch_norm_act import batch_norm_act


def depthwise_conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    return_means: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``activation(batch_norm(conv(input)) + residual)`` where every channel has its own filter (torch's ``groups == C``).

    Args:
        input: ``[N, C, H, W]``; float32, bfloat16, float16 or float64 (not on "cpu", "cuda" and "triton"). channels_last is the fast
            layout; any other is copied to it, and the output comes back in input's. N may be 0.
        weight: ``[C, 1, KH, KW]``.
        bias: ``[C]`` or None.
        running_mean, running_var: ``[C]`` each; None for both leaves batch norm out, or with ``training``
            takes batch statistics and keeps none.
        bn_weight, bn_bias: ``[C]`` or None, as in `torch.nn.functional.batch_norm`.
        stride, dilation: one number or ``(height, width)``.
        padding: zeros on each side: one number, ``(height, width)``, "valid" or "same" (stride 1, odd kernels).
        training: batch statistics instead of the running ones, which are updated with ``momentum``.
        eps: added to the variance.
        residual: output's shape, added before the activation.
        activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (with erf), "sigmoid", "leaky_relu", "tanh" or "hardsigmoid".
        negative_slope: leaky_relu's.
        return_means: also return each image's channel means of the output, for squeeze-and-excitation.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output ``[N, C, OH, OW]``; with ``return_means`` ``(output, means)``, means ``[N, C]`` in float32 (float64 for float64).
        Products, sums and activation are computed in float32; running statistics are folded into the filter in float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.

    Source: Howard et al., 2017 (MobileNets); Ioffe and Szegedy, 2015. Twice differentiable.
    """
    op = "depthwise_conv_bn_act"
    call = _prepare(op, input, weight, bias, stride, padding, dilation, residual, activation)
    statistics = dict(running_mean=running_mean, running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias)
    check_statistics(op, statistics, weight, weight.shape[0], training)
    input, weight, bias, residual = _conv_call.autocast(input, weight, bias, residual)
    facts = facts_of(input, weight, bias, residual, call, bn_weight, bn_bias)
    name = _conv_call.choose(op, backend, input, _eager_first(facts))
    activation_and_slope = call.activation, float(negative_slope)
    normalise = running_mean is not None or training
    if normalise and training:
        y, _ = _convolve(name, facts, call, input, weight, bias, None, 0, 0.0, False)
        rest: dict[str, Any] = dict(residual=residual, activation=activation, negative_slope=negative_slope, backend=name)
        output = batch_norm_act(y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps, **rest)
        means = _depthwise_ops.mean_of(output) if return_means else None
    elif normalise and name == "eager":
        y, _ = _convolve(name, facts, call, input, weight, bias, None, 0, 0.0, False)
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, momentum, eps)
        output = _activations.apply(y if residual is None else y + residual, *activation_and_slope)
        means = _depthwise_ops.mean_of(output) if return_means else None
    else:
        if normalise:
            weight, bias = fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps)
        output, found = _convolve(name, facts, call, input, weight, bias, residual, *activation_and_slope, return_means)
        means = found if return_means else None
    return output if means is None else (output, means)


def run_folded(input, weight, bias, *, stride, padding, dilation, activation, means, backend) -> tuple[Tensor, Tensor | None]:
    """(output, means or None) with a filter and bias of `fold`: inference alone, for modules that keep them."""
    op = "depthwise_conv_bn_act"
    call = Call(stride, padding, dilation, _activations.number(op, activation))
    if input.dim() != 4 or input.shape[1] != weight.shape[0]:
        raise ValueError(f"{op}: input: expected [N, {weight.shape[0]}, H, W], got shape {tuple(input.shape)}")
    facts = facts_of(input, weight, bias, None, call)
    name = _conv_call.choose(op, backend, input)
    output, found = _convolve(name, facts, call, input, weight, bias, None, call.activation, 0.01, means)
    return output, found if means else None


def _convolve(name, facts, call, input, weight, bias, residual, activation, slope, means):
    args = (input, weight, bias, residual, list(call.stride), list(call.padding), list(call.dilation), activation, slope, means)
    if name == "eager":
        return _depthwise_ops.reference(*args)
    function = torch.ops.pyops.depthwise_fwd if facts.needs_grad else torch.ops.pyops.depthwise_infer
    output, found = (function.triton if name == "triton" else function.default)(*args)
    return _conv_call.in_layout_of(output, input), found


def fold(weight: Tensor, bias, running_mean, running_var, bn_weight, bn_bias, eps: float) -> tuple[Tensor, Tensor]:
    """A convolution's weight ``[C, ...]`` and bias with batch norm's running statistics folded in, in float32 (float64 for float64)."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(kind) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(kind)
    shift = -running_mean.to(kind) if bias is None else bias.to(kind) - running_mean.to(kind)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(kind)
    return weight.to(kind) * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift


# ------------------------------------------------------------------------------------------------------- what runs, and why


class Facts(NamedTuple):
    """What the choice of a backend may depend on: static facts of a call, no tensor."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    needs_grad: bool

    def __str__(self) -> str:
        N, C, H, W = self.shape
        KH, KW = self.kernel
        return f"{self.device}, {str(self.dtype)[6:]}, N={N}, C={C}, {H}x{W}, kernel {KH}x{KW}, stride {self.stride[0]}x{self.stride[1]}"


def _eager_first(facts: Facts) -> bool:
    """Folding batch norm at every call costs more than it saves on the smallest maps: 0.9 of PyTorch's speed (2 cores of Zen 4)."""
    return not facts.needs_grad and math.prod(facts.shape) < 2**16


class Call(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: int


def facts_of(input, weight, bias, residual, call: Call, *others: Tensor | None) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias, residual, *others))
    return Facts(input.device.type, input.dtype, tuple(input.shape), tuple(weight.shape[2:]), call.stride, needs_grad)


# ------------------------------------------------------------------------------------------------------------------ checking


def _pair(op: str, name: str, value, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise TypeError(f"{op}: {name}: expected an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{op}: {name}: expected {least} or more, got {value!r}")
    return pair


def _padding(op: str, value, kernel, stride, dilation) -> tuple[int, int]:
    if not isinstance(value, str):
        return _pair(op, "padding", value, 0)
    if value == "valid":
        return (0, 0)
    if value != "same":
        raise ValueError(f'{op}: padding: expected "same", "valid" or numbers, got {value!r}')
    if stride != (1, 1) or any(k % 2 == 0 and d % 2 for k, d in zip(kernel, dilation, strict=True)):
        raise ValueError(f'{op}: padding: "same" needs stride 1 and an odd kernel, got stride {stride} and kernel {tuple(kernel)}')
    return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))


def _prepare(op, input, weight, bias, stride, padding, dilation, residual, activation) -> Call:
    """Checks everything but batch norm's tensors and gives the numbers the ops take."""
    for name, t, optional in (("input", input, False), ("weight", weight, False), ("bias", bias, True), ("residual", residual, True)):
        if not isinstance(t, Tensor) and not (t is None and optional):
            raise TypeError(f"{op}: {name}: expected a Tensor{' or None' if optional else ''}, got {type(t).__name__}")
    if input.dim() != 4:
        raise ValueError(f"{op}: input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    if input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{op}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    C = input.shape[1]
    if weight.dim() != 4 or weight.shape[0] != C or weight.shape[1] != 1 or 0 in weight.shape[2:]:
        raise ValueError(f"{op}: weight: expected [C, 1, KH, KW] with C = {C}, got shape {tuple(weight.shape)}")
    kernel = tuple(weight.shape[2:])
    stride, dilation = _pair(op, "stride", stride, 1), _pair(op, "dilation", dilation, 1)
    call = Call(stride, _padding(op, padding, kernel, stride, dilation), dilation, _activations.number(op, activation))
    size = _depthwise_ops.output_size(input.shape[2:], kernel, call.stride, call.padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"{op}: input: {tuple(input.shape[2:])} is too small for kernel {kernel}, dilation {dilation}, padding {call.padding}"
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    shapes = dict(weight=tuple(weight.shape), bias=(C,), residual=(input.shape[0], C, *size))
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is None:
            continue
        if tuple(t.shape) != shapes[name]:
            raise ValueError(f"{op}: {name}: expected shape {shapes[name]} for input {tuple(input.shape)}, got {tuple(t.shape)}")
        if t.dtype != input.dtype and not (autocast and t.is_floating_point()):
            raise ValueError(f"{op}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")
        if t.device != input.device:
            raise ValueError(f"{op}: {name}: expected input's device {input.device}, got {t.device}")
    return call


def check_statistics(op: str, tensors: dict[str, Tensor | None], weight: Tensor, channels: int, training: bool) -> None:
    if (tensors["running_mean"] is None) != (tensors["running_var"] is None):
        raise ValueError(f"{op}: running_mean, running_var: expected both or neither")
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}: expected a Tensor or None, got {type(t).__name__}")
        if tuple(t.shape) != (channels,) or not t.is_floating_point():
            raise ValueError(f"{op}: {name}: expected a floating tensor of shape ({channels},), got {t.dtype} {tuple(t.shape)}")
        if t.device != weight.device:
            raise ValueError(f"{op}: {name}: expected weight's device {weight.device}, got {t.device}")
        if name.startswith("bn_") and tensors["running_mean"] is None and not training:
            raise ValueError(f"{op}: {name}: batch norm needs running_mean and running_var, or training=True")


def _explain(input, weight, bias=None, *_, stride=1, padding=0, dilation=1, residual=None, activation="none", backend=None, **__):
    call = _prepare("explain", input, weight, bias, stride, padding, dilation, residual, activation)
    facts = facts_of(input, weight, bias, residual, call)
    return _conv_call.explain("depthwise_conv_bn_act", str(facts), backend, input, _eager_first(facts))


_backends.EXPLAINERS["depthwise_conv_bn_act"] = _explain
