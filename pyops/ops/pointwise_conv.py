"""1x1 convolution as one matrix product, with what comes before and after it done on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _channel_ops, _conv_call, _fused_ops, _pointwise_ops

OP = "pointwise_conv"


def pointwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layer_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    input_activation: str = "none",
    gate: Tensor | None = None,
    keep: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""``activation((conv1x1(a) + bias) * keep + residual)`` with ``a = input_activation(input * input_scale + input_shift) * gate``.

    Args:
        input: ``[N, C, H, W]``; float32, bfloat16, float16 or float64 (the last on "eager" only). Fast where channels are neighbours in
            memory: channels_last, or a slice of a channels_last tensor's channels, which is read in place. Others are copied.
        weight: ``[O, C]`` or ``[O, C, 1, 1]``, of input's dtype or float32.
        bias: ``[O]``.
        layer_norm: ``(weight, bias, eps)`` of a LayerNorm over channels in place of input_scale and input_shift; either tensor may be None.
        input_scale, input_shift: ``[C]`` each, for example a batch norm's ``weight / std`` and ``bias - mean * weight / std``.
        input_activation, activation: names as in `batch_norm_act`; negative_slope is leaky_relu's.
        gate: ``[N, C]``, squeeze-and-excitation's.
        keep: ``[N]``, drop path's multipliers. Not differentiated.
        residual: ``[N, O, H, W]``, added before the activation; may be a slice as input may.
        out: where to write, ``[N, O, H, W]`` in channels_last memory or a slice of such a tensor's channels. Not differentiable.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output ``[N, O, H, W]`` (``out`` itself if given), channels_last unless input is NCHW. Sums are in float32. With gradients
        input alone is saved, and the result before the activation where there is one; the rest is recomputed.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, out with gradients, or a named backend
        that cannot run the call. NotImplementedError: for gradients of gradients, but on "eager".

    Source: Lin et al., 2014 (1x1 convolution); Ba et al., 2016 (LayerNorm).
    """
    before, after = _activations.number(OP, input_activation, "input_activation"), _activations.number(OP, activation)
    tensors = (input, weight, bias, input_scale, input_shift, gate, keep, residual)
    _check(*tensors, layer_norm, out)
    weight = weight.flatten(1)
    input, weight, residual = _conv_call.autocast(input, weight, residual)
    for argument, t in (("residual", residual), ("out", out)):
        if t is not None and t.dtype != input.dtype:
            raise ValueError(f"{OP}: {argument}: expected input's dtype {input.dtype}, got {t.dtype}")
    if weight.dtype not in (input.dtype, torch.float32):
        raise ValueError(f"{OP}: weight: expected input's dtype {input.dtype} or float32, got {weight.dtype}")
    affine_of = layer_norm[:2] if layer_norm is not None else ()
    live = _conv_call.needs_grad(*tensors, *affine_of)
    if out is not None and live:
        raise ValueError(f"{OP}: out: writes are not differentiable; call under torch.no_grad() or without out")
    name = _conv_call.choose(OP, backend, input, live)  # with gradients 0.7 to 1.05 of PyTorch's speed (2 cores of Zen 4)
    if name != "eager" and not live:
        return _run(
            name, input, weight, bias, layer_norm, input_scale, input_shift, before, gate, keep, residual, after, negative_slope, out
        )
    if layer_norm is not None:
        scale, shift, eps = layer_norm
        x = F.layer_norm(input.permute(0, 2, 3, 1), input.shape[1:2], as_input(scale, input), as_input(shift, input), eps)
        input = x.permute(0, 3, 1, 2)
    if name == "eager":
        y = _eager(input, weight, bias, input_scale, input_shift, before, gate, keep, residual, after, negative_slope)
        return y if out is None else out.copy_(y)
    rest = (bias, input_scale, input_shift, before, gate, keep, residual, after, negative_slope)
    return _conv_call.in_layout_of(_differentiable(name, input, weight.to(input.dtype), *rest), input)


def as_input(t: Tensor | None, input: Tensor) -> Tensor | None:
    return None if t is None else t.to(input.dtype)


def _run(name, input, weight, bias, layer_norm, scale, shift, before, gate, keep, residual, after, slope, out) -> Tensor:
    vector: Any = lambda t: _conv_call.as_vector(t, input)  # noqa: E731
    rows = None
    if layer_norm is not None:
        scale, shift, eps = layer_norm
        var, mean = (
            torch.var_mean(input, 1, correction=0) if input.dtype == torch.float32 else torch.var_mean(input.float(), 1, correction=0)
        )
        rows = torch.stack([mean.flatten(), torch.rsqrt(var + eps).flatten()])
    affine = None
    if scale is not None or shift is not None:
        ones, zeros = (torch.full(input.shape[1:2], value, device=input.device) for value in (1.0, 0.0))
        affine = torch.stack([zeros, ones if scale is None else vector(scale), zeros if shift is None else vector(shift)])
    arguments = (
        input, weight, rows, affine, vector(gate), before, slope, vector(bias), vector(keep), residual, after, slope
    )  # fmt: skip
    overload, tf32 = _conv_call.overload(name), _pointwise_ops.tf32_allowed(input)
    if out is not None:
        getattr(torch.ops.pyops.pointwise_into, overload)(out, *arguments, tf32)
        return out
    output, _ = getattr(torch.ops.pyops.pointwise_run, overload)(*arguments, False, tf32)
    return output.contiguous() if _is_nchw(input) else output


def _is_nchw(t: Tensor) -> bool:
    return t.is_contiguous() and not t.is_contiguous(memory_format=torch.channels_last)


def _differentiable(name, input, weight, bias, scale, shift, before, gate, keep, residual, after, slope) -> Tensor:
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if gate is not None:
        if scale is not None or shift is not None or before != 0:
            input = kernels.batch_norm_act_fwd(input, _channel_ops.identity(input), scale, shift, None, None, before, slope, "")
        input = input * gate.to(input.dtype)[:, :, None, None]
        scale = shift = None
        before = 0
    norm = _channel_ops.identity(input) if scale is not None or shift is not None else None
    y, _, _ = kernels.pointwise_train_fwd(input, weight, norm, scale, shift, None, None, None, None, before, slope, 0, 0, "")
    if bias is None and keep is None and residual is None and after == 0:
        return y
    multipliers = _conv_call.as_vector(keep, input)
    return kernels.batch_norm_act_fwd(y, _channel_ops.identity(y), None, bias, multipliers, residual, after, slope, "")


def _eager(input, weight, bias, scale, shift, before, gate, keep, residual, after, slope) -> Tensor:
    a = input
    if scale is not None:
        a = a * scale.to(a.dtype)[:, None, None]
    if shift is not None:
        a = a + shift.to(a.dtype)[:, None, None]
    a = _activations.apply(a, before, slope)
    if gate is not None:
        a = a * gate.to(a.dtype)[:, :, None, None]
    y = F.conv2d(a, weight.to(a.dtype)[:, :, None, None], as_input(bias, a))
    if keep is not None:
        y = y * keep.detach().to(a.dtype)[:, None, None, None]
    return _activations.apply(y if residual is None else y + residual, after, slope)


def _check(input, weight, bias, scale, shift, gate, keep, residual, layer_norm, out) -> None:
    _conv_call.check_input(OP, input)
    N, C, H, W = input.shape
    _conv_call.check_tensor(OP, "weight", weight, input, optional=False)
    if weight.dim() not in (2, 4) or tuple(weight.shape[1:]) != (C, 1, 1)[: weight.dim() - 1] or 0 in weight.shape:
        raise ValueError(f"{OP}: weight: expected [O, C] or [O, C, 1, 1] with C = {C}, got shape {tuple(weight.shape)}")
    O = weight.shape[0]
    vectors = (("bias", bias, O), ("input_scale", scale, C), ("input_shift", shift, C))
    for name, t, size in vectors:
        _conv_call.check_tensor(OP, name, t, input, (size,))
    _conv_call.check_tensor(OP, "gate", gate, input, (N, C))
    _conv_call.check_tensor(OP, "keep", keep, input, (N,))
    for name, t in (("residual", residual), ("out", out)):
        _conv_call.check_tensor(OP, name, t, input, (N, O, H, W))
    if out is not None and out.numel() and _position_stride(out) is None:
        raise ValueError(f"{OP}: out: expected channels_last memory or a slice of its channels, got strides {tuple(out.stride())}")
    if layer_norm is None:
        return
    if not isinstance(layer_norm, tuple) or len(layer_norm) != 3:
        raise TypeError(f"{OP}: layer_norm: expected (weight, bias, eps), got {layer_norm!r}")
    if scale is not None or shift is not None:
        raise ValueError(f"{OP}: layer_norm: takes the place of input_scale and input_shift; give one or the other")
    for name, t in (("layer_norm[0]", layer_norm[0]), ("layer_norm[1]", layer_norm[1])):
        _conv_call.check_tensor(OP, name, t, input, (C,))


def _position_stride(t: Tensor) -> int | None:
    """Elements between neighbouring positions, None where positions are not evenly spaced rows of neighbouring channels."""
    N, C, H, W = t.shape
    stride = t.stride(3) if W > 1 else t.stride(2) if H > 1 else t.stride(0) if N > 1 else C
    even = (W <= 1 or t.stride(3) == stride) and (H <= 1 or t.stride(2) == stride * W) and (N <= 1 or t.stride(0) == stride * W * H)
    return stride if even and stride >= C and (C <= 1 or t.stride(1) == 1) else None


def _explain(input, weight, bias=None, *, backend=None, **options):
    _conv_call.check_input("explain", input)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, {weight.shape[0]} outputs"
    live = _conv_call.needs_grad(input, weight, bias, *(t for t in options.values() if isinstance(t, Tensor)))
    return _conv_call.explain(OP, facts, backend, input, live)


_backends.EXPLAINERS[OP] = _explain
