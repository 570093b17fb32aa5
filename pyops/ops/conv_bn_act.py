"""Convolution with batch norm, residual and activation, and its transposed twin."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _conv_call, _conv_checks, _conv_run, _fused_ops, _vendor_conv
from pyops.ops._vendor_conv import UPSAMPLINGS, Conv
from pyops.ops.batch_norm_act import batch_norm_act, constant_statistics, statistics_of
from pyops.ops.depthwise_conv import check_statistics


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_last: bool = False,
    activation: str = "none",
    negative_slope: float = 0.01,
    upsample: str | None = None,
    pool: str | None = None,
    pool_size: int | tuple[int, int] = 2,
    pool_stride: int | tuple[int, int] | None = None,
    pool_padding: int | tuple[int, int] = 0,
    backend: str | None = None,
) -> Tensor:
    r"""``pool(activation(batch_norm(conv(upsample(input)) + bias) + residual))`` in one, two or three spatial dimensions.

    Args:
        input: ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``; float32, bfloat16, float16 or float64 (the last on "eager" only).
            channels_last is the fast layout; the output comes back in input's. N may be 0.
        weight: ``[O, C/groups, *kernel]``, any kernel, of input's dtype.
        bias: ``[O]`` or None.
        running_mean, running_var: ``[O]`` each; None for both leaves batch norm out, or with ``training`` takes batch statistics and
            keeps none.
        bn_weight, bn_bias: ``[O]`` or None, as in `torch.nn.functional.batch_norm`.
        stride, dilation: one number, or one per spatial dimension.
        padding: zeros on each side: one number, one per dimension, "valid" or "same" (stride 1; where the kernel is even the one zero
            more is at the end, as torch has it).
        groups: divides C and O.
        training: batch statistics instead of the running ones, which are updated with ``momentum``.
        eps: added to the variance.
        residual: shape of what the convolution gives and input's dtype, added before the activation, or after it with ``residual_last``.
        activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (with erf), "sigmoid", "leaky_relu", "tanh" or "hardsigmoid".
        negative_slope: leaky_relu's.
        upsample: "nearest" or "bilinear" (``align_corners=False``): the convolution's input is the given one, enlarged twice in both
            dimensions of an image.
        pool: "max" or "average" over windows of ``pool_size``, ``pool_stride`` (None: the size) apart, of the finished image with
            ``pool_padding`` around (zeros count in an average), as `torch.nn.functional.max_pool2d` and `avg_pool2d` have it.
        backend: "cpu", "cuda", "triton", "vendor" (oneDNN's or cuDNN's convolution) or "eager"; None lets pyops choose.

    Returns:
        output ``[N, O, *size]``. Running statistics are folded into the filter in float32. With gradients the convolution's input and
        output are saved, and a byte for each maximum. On a CPU 3x3 filters of stride 1 may run by Winograd's method, at up to 4 times
        fewer products and a relative error (L2) up to 5e-6 in float32; ``torch.backends.fp32_precision = "ieee"`` rules it out.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, one value per channel in training, or a
        named backend that cannot run the call. NotImplementedError: for gradients of gradients, but on "vendor" and "eager".

    Source: Ioffe and Szegedy, 2015 (batch norm); Lavin and Gray, 2016 (Winograd's method).
    """
    op = "conv_bn_act"
    numbers = _conv_checks.stride_and_dilation(op, input, weight, stride, dilation, groups)
    pads, extra = _conv_checks.pads(op, padding, weight.shape[2:], *numbers)
    rank, ends = input.dim() - 2, (_activations.number(op, activation), negative_slope, residual_last)
    enlarged = _conv_checks.upsampling(op, upsample, rank)
    pooled = _conv_checks.pooling(op, pool, rank, pool_size, pool_stride, pool_padding)
    call = Conv(numbers[0], pads, numbers[1], groups, None, *ends, enlarged, pooled)
    if any(extra):
        input, call = _vendor_conv.enlarge(input, call), call._replace(upsample=0)
        input = F.pad(input, [n for e in reversed(extra) for n in (0, e)])
    return _call(
        op, call, (input, weight, bias, residual), (running_mean, running_var, bn_weight, bn_bias), training, momentum, eps, backend
    )


def conv_transpose_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_last: bool = False,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    r"""``activation(batch_norm(conv_transpose(input) + bias) + residual)`` in one, two or three spatial dimensions.

    weight is ``[C, O/groups, *kernel]``, stride, padding and output_padding are those of `torch.nn.functional.conv_transpose2d`;
    everything else is as in `conv_bn_act`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `conv_bn_act`.

    Source: Zeiler et al., 2010 (transposed convolution); Ioffe and Szegedy, 2015.
    """
    op = "conv_transpose_bn_act"
    stride, dilation = _conv_checks.stride_and_dilation(op, input, weight, stride, dilation, groups, transposed=True)
    pads, rest = (
        _conv_checks.numbers_of(op, name, value, input.dim() - 2, 0)
        for name, value in (("padding", padding), ("output_padding", output_padding))
    )
    if any(r >= max(s, d) for r, s, d in zip(rest, stride, dilation, strict=True)):
        raise ValueError(f"{op}: output_padding: expected less than stride or dilation, got {output_padding!r}")
    call = Conv(stride, pads, dilation, groups, rest, _activations.number(op, activation), negative_slope, residual_last)
    return _call(
        op, call, (input, weight, bias, residual), (running_mean, running_var, bn_weight, bn_bias), training, momentum, eps, backend
    )


# ------------------------------------------------------------------------------------------------------------- running a call


def _call(op: str, call: Conv, tensors, statistics, training: bool, momentum: float, eps: float, backend: str | None) -> Tensor:
    size, O = _conv_checks.check(op, call, *tensors)
    names = ("running_mean", "running_var", "bn_weight", "bn_bias")
    check_statistics(op, dict(zip(names, statistics, strict=True)), tensors[1], O, training)
    input, weight, bias, residual = _conv_call.autocast(*tensors)
    facts = _conv_run.facts_of(op, input, (*tensors, *statistics[2:]))
    name = facts.choose(backend)
    running_mean, running_var, bn_weight, bn_bias = statistics
    normalise = running_mean is not None or training
    if name == "eager":
        y = _vendor_conv.convolution(_vendor_conv.enlarge(input, call), weight, bias, call)
        if normalise:
            y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return _vendor_conv.pool(_vendor_conv.finish(y, residual, call), call)
    if not facts.differentiable and not training:
        if normalise:
            weight, bias = _conv_run.fold_convolution(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, call)
        output = _conv_run.infer(name, input, weight.to(input.dtype), bias, residual, call, size)
        return _conv_call.in_layout_of(output, input) if output.dim() == 4 else output
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    pool = call.pool if name != "vendor" and residual is None and call.pool is not None and _conv_run.pools(call.pool) else None
    y, moments = _conv_run.convolve(kernels, input, weight, bias, call, size, training, name in ("cuda", "triton"), name != "vendor")
    running, ends = (running_mean, running_var), (call.activation, call.slope)
    norm = None
    if normalise and (pool is not None or moments is not None):
        if training:
            moments = kernels.channel_moments(y.detach()) if moments is None else moments
            norm = statistics_of(moments, y.numel() // O, eps, "", running, momentum)
        else:
            norm = constant_statistics(running_mean, running_var, eps, y)
    if pool is not None:
        output, _ = kernels.batch_norm_act_pool_fwd(y, norm, bn_weight, bn_bias, *_conv_run.windows(pool), *ends, "")
        return _conv_call.in_layout_of(output, input)
    before = None if call.residual_last else residual
    if not normalise:
        output = _vendor_conv.finish(y, before, call._replace(residual_last=False))
    elif norm is None:
        wish = None if _backends.requested(backend) == "auto" or name == "vendor" else name
        rest: dict[str, Any] = dict(
            residual=before, activation=_activations.NAMES[call.activation], negative_slope=call.slope, backend=wish
        )
        output = batch_norm_act(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, **rest)
    else:
        output = kernels.batch_norm_act_fwd(y, norm, bn_weight, bn_bias, None, before, *ends, "")
        output = _conv_call.in_layout_of(output, input)
    if call.residual_last and residual is not None:
        output = output + residual
    return _vendor_conv.pool(output, call)


# -------------------------------------------------------------------------------------------------------- what runs, and why


def _describe(call: Conv, input: Tensor, weight: Tensor, training: bool) -> str:
    kernel = "x".join(map(str, weight.shape[2:]))
    text = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, kernel {kernel}, stride {call.stride}"
    text += f", {UPSAMPLINGS[call.upsample]} upsampling" if call.upsample else ""
    if call.pool is not None:
        text += f", {'max' if call.pool.maximum else 'average'} pooling {call.pool.kernel}"
    return text + (", training" if training else "") + (f", cpu is {_way_on_cpu(call, input, weight)}" if input.is_cpu else "")


def _way_on_cpu(call: Conv, input: Tensor, weight: Tensor) -> str:
    """What the CPU's kernels are for a call, and why."""
    m, times = _conv_run.winograd(input, weight, call), _conv_run.winograd_times(input, weight, call)
    engine = "oneDNN, fused" if _vendor_conv.fused_by(input, call) else "PyTorch's convolution"
    if not m and _conv_run.repeats(weight, call):
        engine = "PyTorch's transposed convolution of the small image"
    if not times:
        return engine
    found = ", ".join(f"{name} {times[n] * 1e3:.3g} ms" for n, name in ((4, "F(4x4)"), (2, "F(2x2)"), (0, "direct")))
    return f"{f'Winograd F({m}x{m}, 3x3)' if m else engine} (expected: {found})"


def _explainer(op: str, transposed: bool):
    def explain(input, weight, bias=None, *statistics, backend=None, **options):
        stride, padding, dilation = (options.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
        groups = options.get("groups", 1)
        stride, dilation = _conv_checks.stride_and_dilation("explain", input, weight, stride, dilation, groups, transposed)
        pads, _ = _conv_checks.pads("explain", padding, weight.shape[2:], stride, dilation)
        call = Conv(stride, pads, dilation, groups, (0,) * len(stride) if transposed else None)
        rank, windows = len(stride), {name: options[f"pool_{name}"] for name in ("size", "stride", "padding") if f"pool_{name}" in options}
        pool = _conv_checks.pooling("explain", options.get("pool"), rank, **windows)
        call = call._replace(upsample=_conv_checks.upsampling("explain", options.get("upsample"), rank), pool=pool)
        vectors = (options.get(name) for name in ("bn_weight", "bn_bias", "residual"))
        tensors = (input, weight, bias, *statistics, *vectors)
        facts, text = _conv_run.facts_of(op, input, tensors), _describe(call, input, weight, options.get("training", False))
        return _backends.build_explanation(op, text, _backends.requested(backend), facts.order(), facts.unsupported)

    return explain


for _op, _is_transposed in (("conv_bn_act", False), ("conv_transpose_bn_act", True)):
    _backends.EXPLAINERS[_op] = _explainer(_op, _is_transposed)
