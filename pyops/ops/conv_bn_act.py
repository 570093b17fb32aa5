"""Convolution with batch norm, residual and activation, and its transposed twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _conv_call, _dense_train, _fused_ops, _pointwise_ops, _vendor_conv, _winograd_ops  # noqa: F401
from pyops.ops._vendor_conv import Conv
from pyops.ops.batch_norm_act import batch_norm_act, statistics_of
from pyops.ops.depthwise_conv import check_statistics, fold


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
    backend: str | None = None,
) -> Tensor:
    r"""``activation(batch_norm(conv(input) + bias) + residual)`` in one, two or three spatial dimensions.

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
        residual: output's shape and input's dtype, added before the activation, or after it with ``residual_last``.
        activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (with erf), "sigmoid", "leaky_relu", "tanh" or "hardsigmoid".
        negative_slope: leaky_relu's.
        backend: "cpu", "cuda", "triton", "vendor" (oneDNN's or cuDNN's convolution) or "eager"; None lets pyops choose.

    Returns:
        output ``[N, O, *size]``. Running statistics are folded into the filter in float32. With gradients the convolution's input and
        output are saved. On a CPU 3x3 filters of stride 1 may run by Winograd's method, at up to 4 times fewer products and a relative
        error (L2) up to 5e-6 in float32; ``torch.backends.fp32_precision = "ieee"`` rules it out.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, one value per channel in training, or a
        named backend that cannot run the call. NotImplementedError: for gradients of gradients, but on "vendor" and "eager".

    Source: Ioffe and Szegedy, 2015 (batch norm); Lavin and Gray, 2016 (Winograd's method).
    """
    op = "conv_bn_act"
    numbers = _numbers(op, input, weight, stride, dilation, groups)
    pads, extra = _padding(op, padding, weight.shape[2:], *numbers[:2])
    call = Conv(numbers[0], pads, numbers[1], groups, None, _activations.number(op, activation), negative_slope, residual_last)
    if any(extra):
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
    stride, dilation = _numbers(op, input, weight, stride, dilation, groups, transposed=True)
    rank = input.dim() - 2
    pads, rest = _tuple(op, "padding", padding, rank, 0), _tuple(op, "output_padding", output_padding, rank, 0)
    if any(r >= max(s, d) for r, s, d in zip(rest, stride, dilation, strict=True)):
        raise ValueError(f"{op}: output_padding: expected less than stride or dilation, got {output_padding!r}")
    call = Conv(stride, pads, dilation, groups, rest, _activations.number(op, activation), negative_slope, residual_last)
    return _call(
        op, call, (input, weight, bias, residual), (running_mean, running_var, bn_weight, bn_bias), training, momentum, eps, backend
    )


# ------------------------------------------------------------------------------------------------------------- running a call


def _call(op: str, call: Conv, tensors, statistics, training: bool, momentum: float, eps: float, backend: str | None) -> Tensor:
    size, O = _check(op, call, *tensors)
    names = ("running_mean", "running_var", "bn_weight", "bn_bias")
    check_statistics(op, dict(zip(names, statistics, strict=True)), tensors[1], O, training)
    input, weight, bias, residual = _conv_call.autocast(*tensors)
    facts = _facts_of(op, input, (*tensors, *statistics[2:]))
    name = facts.choose(backend)
    running_mean, running_var, bn_weight, bn_bias = statistics
    normalise = running_mean is not None or training
    if name == "eager":
        y = _vendor_conv.convolution(input, weight, bias, call)
        if normalise:
            y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return _vendor_conv.finish(y, residual, call)
    if not facts.differentiable and not training:
        if normalise:
            weight, bias = fold_convolution(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, call)
        output = infer(name, input, weight.to(input.dtype), bias, residual, call, size)
        return _conv_call.in_layout_of(output, input) if output.dim() == 4 else output
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    y, moments = convolve(kernels, input, weight, bias, call, size, training, name in ("cuda", "triton"), name != "vendor")
    if not normalise:
        return _vendor_conv.finish(y, residual, call)
    before = None if call.residual_last else residual
    if moments is None:
        wish = None if _backends.requested(backend) == "auto" or name == "vendor" else name
        rest: dict[str, Any] = dict(
            residual=before, activation=_activations.NAMES[call.activation], negative_slope=call.slope, backend=wish
        )
        output = batch_norm_act(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, **rest)
    else:
        norm = statistics_of(moments, y.numel() // O, eps, "", (running_mean, running_var), momentum)
        output = kernels.batch_norm_act_fwd(y, norm, bn_weight, bn_bias, None, before, call.activation, call.slope, "")
        output = _conv_call.in_layout_of(output, input)
    return output + residual if call.residual_last and residual is not None else output


MOST_PLANS = 64  # shapes that a module remembers


def run_folded(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, call: Conv, kept: dict, backend: str | None) -> Tensor:
    """Inference with a filter and bias of `fold`, for modules, which keep in `kept` what is made of them for the machine: the filters in
    the layouts that kernels want, and what runs a call, by its shape."""
    if torch.compiler.is_compiling() or backend is not None or _backends.overridden():
        return _conv_call.in_layout_of(_plan(input, weight, bias, residual, call, kept, backend)(input, residual), input)
    plans = kept.setdefault("plans", {})
    key = (input.shape, input.dtype, None if residual is None else residual.shape, _vendor_conv.switches())
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plan = plans[key] = _plan(input, weight, bias, residual, call, kept, backend)
    return _conv_call.in_layout_of(plan(input, residual), input)


def _plan(input, weight, bias, residual, call: Conv, kept: dict, backend: str | None) -> Callable[[Tensor, Tensor | None], Tensor]:
    if input.dim() != 4 or input.shape[1] != weight.shape[1] * call.groups:
        raise ValueError(f"ConvBNAct: input: expected [N, {weight.shape[1] * call.groups}, H, W], got shape {tuple(input.shape)}")
    size, O = _check("conv_bn_act", call, input, weight.to(input.dtype), None, residual)
    name = _facts_of("conv_bn_act", input, ()).choose(backend)
    m = winograd(input, weight, call, keeps=True) if name == "cpu" else 0
    if m:
        points = _kept(kept, m, lambda: torch.ops.pyops.winograd_pack.default(weight, m))
        infer_points, epilogue = torch.ops.pyops.winograd_infer.default, (*call.padding, call.activation, call.slope, call.residual_last)
        return lambda x, beside: infer_points(x, points, bias, beside, O, *epilogue)
    small = math.prod(size) * input.shape[0] * weight.numel() < 3e6  # products; oneDNN's fused call takes 30 us longer to start
    if name == "cpu" and not small and _vendor_conv.fused_by(input, call) is not None:
        packed = _kept(kept, input.dtype, lambda: _vendor_conv.keep(weight, input, call))
        return lambda x, beside: _vendor_conv.run_fused(x, packed, bias, beside, call)
    filter = _kept(kept, ("plain", input.dtype), lambda: weight.to(input.dtype))
    if name == "eager" or (name == "cpu" and small):
        return lambda x, beside: _vendor_conv.finish(_vendor_conv.convolution(x, filter, bias, call), beside, call)
    return lambda x, beside: infer(name, x, filter, bias, beside, call, size)


def _kept(kept: dict, key, compute):
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def infer(name: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv, size) -> Tensor:
    """Convolution and epilogue without gradients; weight of input's dtype."""
    if name == "cpu" and input.dim() == 4:
        return _kernel(_fused_ops.KERNELS["default"], input, weight, bias, residual, call, size)
    if name in ("cpu", "vendor"):
        return _vendor_conv.run(input, weight, bias, residual, call)
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    image, filter, beside = (None if t is None else _with_rows(t) for t in (input, weight, residual))
    return _kernel(kernels, image, filter, bias, beside, _in_two_dimensions(call), _rows(size)).reshape(input.shape[0], -1, *size)


def _kernel(kernels, input, weight, bias, residual, call: Conv, size) -> Tensor:
    epilogue = (call.activation, call.slope, call.residual_last, False, _pointwise_ops.tf32_allowed(input))
    bias = _conv_call.as_vector(bias, input)
    if call.transposed:
        rest = (call.stride, call.padding, size, call.dilation, call.groups)
        return kernels.conv_transpose_run(input, weight, bias, residual, *rest, *epilogue)[0]
    return kernels.conv_run(input, weight, bias, residual, call.stride, call.padding, call.dilation, call.groups, *epilogue)[0]


def convolve(
    kernels, input: Tensor, weight: Tensor, bias: Tensor | None, call: Conv, size, moments: bool, dense: bool, ours: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The convolution with gradients, and its moments where asked for and where its own kernel gives them: `dense`, on a GPU."""
    if call.output_padding is not None and any(r >= s for r, s in zip(call.output_padding, call.stride, strict=True)):
        dense = ours = False  # positions that no stride of the gradient's convolution reaches
    if not dense and not (ours and winograd(input, weight, call)):
        return _vendor_conv.convolution(input, weight, bias, call), None
    image, filter, two = _with_rows(input), _with_rows(weight), _in_two_dimensions(call)
    shape = (two.stride, two.padding, *([_rows(size)] if call.transposed else []), two.dilation, two.groups)
    function = kernels.conv_transpose_train_fwd if call.transposed else kernels.conv_train_fwd
    y, found = function(image, filter, bias, *(list(n) if isinstance(n, tuple) else n for n in shape), dense and moments)
    return y.reshape(input.shape[0], -1, *size), found if dense and moments and input.dim() == 4 else None


def winograd(input: Tensor, weight: Tensor, call: Conv, keeps: bool = False) -> int:
    """m of the Winograd convolution that is fastest; 0: none. keeps: the points of the filters are kept."""
    if call.transposed or input.dim() != 4 or _conv_call.is_recorded():
        return 0
    return _winograd_ops.size_of_tile(input.shape, weight, call.stride, call.padding, call.dilation, call.groups, keeps)


def _with_rows(t: Tensor) -> Tensor:
    return t.unsqueeze(2) if t.dim() == 3 else t


def _rows(size) -> tuple[int, ...]:
    return (1, *size) if len(size) == 1 else tuple(size)


def _in_two_dimensions(call: Conv) -> Conv:
    if len(call.stride) == 2:
        return call
    rest = None if call.output_padding is None else (0, *call.output_padding)
    one: dict[str, Any] = dict(stride=(1, *call.stride), padding=(0, *call.padding), dilation=(1, *call.dilation), output_padding=rest)
    return call._replace(**one)


def fold_convolution(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps: float, call: Conv) -> tuple[Tensor, Tensor]:
    """`fold` of either kind of filter."""
    if not call.transposed:
        return fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps)
    grouped = weight.unflatten(0, (call.groups, -1)).transpose(1, 2)  # [groups, O/groups, C/groups, *kernel]
    folded, bias = fold(grouped.flatten(0, 1), bias, running_mean, running_var, bn_weight, bn_bias, eps)
    return folded.unflatten(0, (call.groups, -1)).transpose(1, 2).flatten(0, 1), bias


# -------------------------------------------------------------------------------------------------------- what runs, and why

# Nothing of ours has been measured on a GPU yet, so there PyTorch's convolutions come first.
ORDER = {"cpu": ("cpu", "vendor", "eager"), "cuda": ("vendor", "eager", "cuda", "triton")}


class _Facts(NamedTuple):
    op: str
    device: str
    dtype: torch.dtype
    rank: int
    differentiable: bool

    def unsupported(self, backend: str) -> str | None:
        if backend == "vendor":
            return None
        if backend in ("cuda", "triton") and self.rank == 3:
            return f"its {backend} kernel has no third dimension"
        return _conv_call.unsupported(self.device, self.dtype, backend)

    def choose(self, backend: str | None) -> str:
        name = _backends.select(self.op, _backends.requested(backend), self.order(), self.unsupported)
        if not torch.compiler.is_compiling():
            _backends.log_choice(self.op, self.device, name)
        return name

    def order(self) -> tuple[str, ...]:
        return ("eager",) if _conv_call.is_recorded() or self.dtype == torch.float64 else ORDER.get(self.device, ("vendor", "eager"))


def _facts_of(op: str, input: Tensor, tensors) -> _Facts:
    return _Facts(op, input.device.type, input.dtype, input.dim() - 2, _conv_call.needs_grad(*tensors))


def _describe(call: Conv, input: Tensor, weight: Tensor, training: bool) -> str:
    m = winograd(input, weight, call)
    kernel = "x".join(map(str, weight.shape[2:]))
    text = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, kernel {kernel}, stride {call.stride}"
    if input.is_cpu:
        way = f"Winograd F({m}x{m}, 3x3)" if m else "oneDNN, fused" if _vendor_conv.fused_by(input, call) else "PyTorch's convolution"
        text += f", cpu is {way}"
    return text + (", training" if training else "")


def _explainer(op: str, transposed: bool):
    def explain(input, weight, bias=None, *statistics, backend=None, **options):
        stride, padding, dilation = (options.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
        groups = options.get("groups", 1)
        stride, dilation = _numbers("explain", input, weight, stride, dilation, groups, transposed)
        pads, _ = _padding("explain", padding, weight.shape[2:], stride, dilation)
        call = Conv(stride, pads, dilation, groups, (0,) * len(stride) if transposed else None)
        vectors = (options.get(name) for name in ("bn_weight", "bn_bias", "residual"))
        tensors = (input, weight, bias, *statistics, *vectors)
        facts, text = _facts_of(op, input, tensors), _describe(call, input, weight, options.get("training", False))
        return _backends.build_explanation(op, text, _backends.requested(backend), facts.order(), facts.unsupported)

    return explain


for _op, _is_transposed in (("conv_bn_act", False), ("conv_transpose_bn_act", True)):
    _backends.EXPLAINERS[_op] = _explainer(_op, _is_transposed)

# ------------------------------------------------------------------------------------------------------------------ checking


def _tuple(op: str, name: str, value, rank: int, least: int) -> tuple[int, ...]:
    found = (value,) * rank if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(found) != rank or not all(isinstance(v, int) for v in found):
        raise TypeError(f"{op}: {name}: expected an int or {rank} ints, got {value!r}")
    if min(found) < least:
        raise ValueError(f"{op}: {name}: expected {least} or more, got {value!r}")
    return found


def _numbers(op: str, input, weight, stride, dilation, groups, transposed: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stride, dilation), after input, weight and groups were found to go together."""
    _conv_call.check_tensor(op, "input", input, optional=False)
    _conv_call.check_tensor(op, "weight", weight, input, optional=False)
    if not 3 <= input.dim() <= 5:
        raise ValueError(f"{op}: input: expected [N, C] and one to three spatial dimensions, got shape {tuple(input.shape)}")
    if input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{op}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    if not isinstance(groups, int):
        raise TypeError(f"{op}: groups: expected an int, got {groups!r}")
    C = input.shape[1]
    if groups < 1 or C % groups or (weight.dim() > 0 and not transposed and weight.shape[0] % groups):
        raise ValueError(f"{op}: groups: expected a divisor of input's {C} channels and of weight's outputs, got {groups}")
    channels = weight.dim() == input.dim() and weight.shape[0 if transposed else 1] == (C if transposed else C // groups)
    if not channels or 0 in weight.shape:
        form = f"[{C}, O/groups" if transposed else f"[O, {C // groups}"
        raise ValueError(f"{op}: weight: expected {form}, *kernel] for input {tuple(input.shape)}, got shape {tuple(weight.shape)}")
    rank = input.dim() - 2
    return _tuple(op, "stride", stride, rank, 1), _tuple(op, "dilation", dilation, rank, 1)


def _padding(op: str, value, kernel, stride, dilation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(zeros on each side, zeros more at the end)"""
    rank = len(kernel)
    if not isinstance(value, str):
        return _tuple(op, "padding", value, rank, 0), (0,) * rank
    if value == "valid":
        return (0,) * rank, (0,) * rank
    if value != "same":
        raise ValueError(f'{op}: padding: expected "same", "valid" or numbers, got {value!r}')
    if any(s != 1 for s in stride):
        raise ValueError(f'{op}: padding: "same" needs stride 1, got {stride}')
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in total), tuple(t % 2 for t in total)


def _check(op: str, call: Conv, input, weight, bias, residual) -> tuple[tuple[int, ...], int]:
    """(output's size, its channels)"""
    kernel = weight.shape[2:]
    if call.output_padding is None:
        O = weight.shape[0]
        numbers = zip(input.shape[2:], kernel, call.stride, call.padding, call.dilation, strict=True)
        size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in numbers)
    else:
        O = weight.shape[1] * call.groups
        transposed = zip(input.shape[2:], kernel, call.stride, call.padding, call.output_padding, call.dilation, strict=True)
        size = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + r for n, k, s, p, r, d in transposed)
    if min(size) < 1:
        raise ValueError(f"{op}: input: {tuple(input.shape[2:])} is too small for kernel {tuple(kernel)} and padding {call.padding}")
    _conv_call.check_tensor(op, "bias", bias, input, (O,))
    _conv_call.check_tensor(op, "residual", residual, input, (input.shape[0], O, *size))
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != input.dtype and not _conv_call.is_autocast(input.device.type):
            raise ValueError(f"{op}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")
    return size, O
