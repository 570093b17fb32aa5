"""Swin's window attention on the map as the qkv layer leaves it: no roll, no partition, no copies."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyops import _backends
from pyops.ops import (
    _attention_checks,
    _attention_limits,
    _conv_call,
    _fused_ops,
    _philox,
    _window_attention_ops,
    _window_attention_train,
)
from pyops.ops._sharding import is_sharded

OP = "window_attention"
_MOST_LOGIT = math.log(100.0)  # Liu et al., 2022


class _Call(NamedTuple):
    qkv: Tensor
    qkv_bias: Tensor | None
    table: Tensor | None
    logit_scale: Tensor | None
    seed: Tensor | None
    heads: int
    window: list[int]
    shift: list[int]
    scale: float
    dropout_p: float


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    relative_position_bias_table: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    *,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention within the (shifted) windows of a map: what stands between Swin's ``qkv`` and ``proj`` layers.

    Args:
        qkv: ``[B, H, W, 3 * C]``, what the qkv layer (bias included) makes of the map in its own order; float32, bfloat16, float16 or
            float64 (the last on "eager" only).
        num_heads: heads; C is a multiple of it. A head's C / num_heads values are neighbours, as in torchvision.
        window_size: tokens of a window, one int or (height, width).
        shift_size: how far the map is rolled up and left first; less than the window. A side whose window covers the padded map is not
            shifted.
        relative_position_bias_table: ``[(2 * wh - 1) * (2 * ww - 1), num_heads]``, read by relative position; its gradient is
            deterministic. For Swin v2 ``16 * sigmoid(cpb_mlp(coordinates))``.
        qkv_bias: ``[3 * C]``, the qkv layer's bias: q, k and v of the tokens that fill up the last windows where the window does not
            divide the map. They are not masked, as in torchvision. None: zeros. Its gradient is the share of those tokens.
        logit_scale: ``[num_heads]`` (or ``[num_heads, 1, 1]``), Swin v2: cosine attention with scores times
            ``exp(min(logit_scale, log 100))`` instead of `scale`.
        scale: of the products; None: ``1 / sqrt(C / num_heads)``.
        dropout_p, seed: as of `flash_attention`, for softmax's results.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        ``[B, H, W, C]`` in qkv's dtype, heads beside one another. The same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run the
            call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Liu et al., 2021; Liu et al., 2022; torchvision's `shifted_window_attention` for padding and masks.
    """
    call = prepare(qkv, num_heads, window_size, shift_size, relative_position_bias_table, qkv_bias, logit_scale, scale, dropout_p, seed)
    reasons = lambda name: _unsupported(call, name)  # noqa: E731
    order = _conv_call.order(qkv.device.type, _conv_call.is_recorded(), is_sharded(qkv))
    name = _backends.select(OP, _backends.requested(backend), order, reasons)
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, qkv.device.type, name)
    if name == "eager":
        return _window_attention_ops.forward(*call)[0]
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if torch.compiler.is_compiling() or _conv_call.needs_grad(*call[:4]) or is_sharded(call.qkv):
        return kernels.window_attention_fwd(*call)[0]
    return _window_attention_train.forward(kernels, *call)[0]


def _unsupported(call: _Call, backend: str) -> str | None:
    reason = _conv_call.unsupported(call.qkv.device.type, call.qkv.dtype, backend)
    return reason if reason is not None or backend == "eager" else _attention_limits.window_unsupported(call, backend)


def _pair(name: str, value, least: int) -> list[int]:
    sides = [value, value] if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) for s in sides):
        raise TypeError(f"{OP}: {name}: expected an int or two, got {value!r}")
    if min(sides) < least:
        raise ValueError(f"{OP}: {name}: expected {least} or more, got {value}")
    return list(sides)


def _vector(name: str, t, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    _conv_call.check_tensor(OP, name, t, like, shape)
    return None if t is None else t.to(torch.promote_types(like.dtype, torch.float32)).contiguous()


def prepare(qkv, num_heads, window_size, shift_size, table, qkv_bias, logit_scale, scale, dropout_p, seed) -> _Call:
    _conv_call.check_tensor(OP, "qkv", qkv, optional=False)
    if qkv.dim() != 4:
        raise ValueError(f"{OP}: qkv: expected [B, H, W, 3 * C], got shape {tuple(qkv.shape)}")
    if qkv.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: qkv: expected float32, bfloat16, float16 or float64, got {qkv.dtype}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{OP}: num_heads: expected an int, got {num_heads!r}")
    if num_heads < 1 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(
            f"{OP}: num_heads: expected a number with qkv's {qkv.shape[3]} channels a multiple of 3 * num_heads, got {num_heads}"
        )
    window, shift = _pair("window_size", window_size, 1), _pair("shift_size", shift_size, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"{OP}: shift_size: expected less than the window {tuple(window)}, got {shift_size}")
    shift = [0 if side >= extent else by for side, extent, by in zip(window, qkv.shape[1:3], shift, strict=True)]
    (qkv,) = _conv_call.autocast(qkv)
    if isinstance(logit_scale, Tensor) and logit_scale.dim() == 3:
        logit_scale = logit_scale.flatten(0) if logit_scale.shape[1:] == (1, 1) else logit_scale
    logits = _vector("logit_scale", logit_scale, qkv, (num_heads,))
    if scale is not None and logits is not None:
        raise ValueError(f"{OP}: scale: expected None beside logit_scale, got {scale}")
    D = qkv.shape[3] // 3 // num_heads
    p = _attention_checks.check_dropout(OP, dropout_p)
    return _Call(
        qkv.contiguous(),
        _vector("qkv_bias", qkv_bias, qkv, (qkv.shape[3],)),
        _vector("relative_position_bias_table", table, qkv, ((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)),
        None if logits is None else logits.clamp(max=_MOST_LOGIT).exp(),
        _attention_checks.drawn(_philox.as_seed(OP, seed, qkv), p, qkv),
        num_heads,
        window,
        shift,
        1 / math.sqrt(D) if scale is None else _attention_checks.number(OP, "scale", scale, -math.inf, math.inf),
        p,
    )


def _explain(
    qkv, num_heads, window_size, shift_size=0, relative_position_bias_table=None, qkv_bias=None, *, logit_scale=None, scale=None,
    dropout_p=0.0, seed=None, backend=None,
):  # fmt: skip
    call = prepare(qkv, num_heads, window_size, shift_size, relative_position_bias_table, qkv_bias, logit_scale, scale, dropout_p, seed)
    facts = f"{qkv.device.type}, {str(qkv.dtype)[6:]}, map {tuple(qkv.shape)}, window {tuple(call.window)}"
    reasons = lambda name: _unsupported(call, name)  # noqa: E731
    return _backends.build_explanation(OP, facts, _backends.requested(backend), _conv_call.order(qkv.device.type), reasons)


_backends.EXPLAINERS[OP] = _explain
