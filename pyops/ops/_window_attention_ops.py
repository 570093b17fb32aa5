"""Torch ops of window attention's kernels (Swin), which write into tensors that the caller has laid out. None is differentiable.

    pyops::window_attention_into        output, and the logarithm of each row's sum of exponentials
    pyops::window_attention_grad_into   the gradients of qkv, qkv_bias, table and logit_scale

The map [B, H, W, 3C] is seen as one of P x Q, H and W rounded up to whole windows of `window` = (wh, ww) tokens; tokens beyond H or W have
q, k, v equal to qkv_bias. Token (i, j) of window (a, b) stands at ((a * wh + i + shift[0]) % P, (b * ww + j + shift[1]) % Q). Windows
are numbered (image, a, b), a window's N = wh * ww tokens (i, j). For query token t and key token u of a window, in head h:

    x[t, u] = scale * q[t] . k[u],  or  logit_scale[h] * (q[t] / max(|q[t]|, 1e-12)) . (k[u] / max(|k[u]|, 1e-12))
    score   = x + table[(ti - ui + wh - 1) * (2 * ww - 1) + tj - uj + ww - 1, h] - 100 where t and u are of different regions

The regions of a shifted map: rows below P - wh, those below P - shift[0] and the rest, all counted in the rolled map (a * wh + i), and the
same of columns; a dimension without shift is one region.

Arguments:
    qkv [B, H, W, 3C] contiguous: q, k, v of all heads, C = heads * D
    qkv_bias [3C] float32, or None (zeros)
    table [(2 * wh - 1) * (2 * ww - 1), heads] float32 contiguous, or None (zeros)
    logit_scale [heads] float32, or None
    seed [1] int64, read with dropout_p > 0: `_philox` says which scores are dropped, the window's number being that of the sequence
    output [B, H, W, C] contiguous, lse [windows, heads, N] float32
    grad (of output) contiguous; grad_qkv like qkv; grad_qkv_bias [3C], grad_table, grad_logit_scale float32 of their shapes, or None where
          they are not asked for. grad_qkv_bias is of the tokens beyond the map alone. All of each is written.

Softmax, sums and lse are float32. The same call gives the same bits, on any number of threads.

Source: Liu et al., 2021 (windows, shift, table); Liu et al., 2022 (cosine attention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _philox

MASKED = -100.0  # what torchvision and Swin's authors add between regions


class Windows(NamedTuple):
    """How a map is cut."""

    size: tuple[int, int]  # H, W
    padded: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @staticmethod
    def of(size, window, shift) -> Windows:
        padded = tuple(-(-extent // side) * side for extent, side in zip(size, window, strict=True))
        return Windows(tuple(size), padded, tuple(window), tuple(shift))

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def total(self) -> int:
        """Windows of an image."""
        return (self.padded[0] // self.window[0]) * (self.padded[1] // self.window[1])


def partition(t: Tensor, w: Windows) -> Tensor:
    """[B, P, Q, C] -> [windows, N, C]"""
    B, (P, Q), (wh, ww) = t.shape[0], w.padded, w.window
    if any(w.shift):
        t = t.roll((-w.shift[0], -w.shift[1]), (1, 2))
    return t.view(B, P // wh, wh, Q // ww, ww, t.shape[3]).transpose(2, 3).reshape(B * w.total, wh * ww, t.shape[3])


def reverse(t: Tensor, w: Windows, B: int) -> Tensor:
    """[windows, N, C] -> [B, P, Q, C]"""
    (P, Q), (wh, ww) = w.padded, w.window
    t = t.view(B, P // wh, Q // ww, wh, ww, t.shape[2]).transpose(2, 3).reshape(B, P, Q, t.shape[2])
    return t.roll(w.shift, (1, 2)) if any(w.shift) else t


def pad(qkv: Tensor, qkv_bias: Tensor | None, w: Windows) -> Tensor:
    """[B, H, W, 3C] -> [B, P, Q, 3C], beyond the map qkv_bias."""
    if w.padded == w.size:
        return qkv
    real = F.pad(qkv, (0, 0, 0, w.padded[1] - w.size[1], 0, w.padded[0] - w.size[0]))
    return real if qkv_bias is None else torch.where(inside(w, qkv.device), real, qkv_bias.to(qkv.dtype))


def inside(w: Windows, device) -> Tensor:
    """Which tokens of a padded map are real: bool [P, Q, 1]."""
    rows, columns = (torch.arange(extent, device=device) < real for extent, real in zip(w.padded, w.size, strict=True))
    return (rows[:, None] & columns)[:, :, None]


def relative_index(window: tuple[int, int], device) -> Tensor:
    """The table's row for each pair of a window's tokens: int64 [N, N]."""
    i, j = (torch.arange(side, device=device) for side in window)
    rows = (i[:, None] - i + window[0] - 1) * (2 * window[1] - 1)
    columns = j[:, None] - j + window[1] - 1
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def regions(w: Windows, device) -> Tensor | None:
    """Whether two tokens of a window lie in different regions: bool [windows of an image, N, N]; None without shift."""
    if not any(w.shift):
        return None
    ids = []
    for extent, side, shift in zip(w.padded, w.window, w.shift, strict=True):
        at = torch.arange(extent, device=device)
        ids.append(((at >= extent - side).long() + (at >= extent - shift).long()) if shift else torch.zeros_like(at))
    both = ids[0][:, None] * 3 + ids[1]
    own = partition(both[None, :, :, None], w._replace(shift=(0, 0)))[:, :, 0]
    return own[:, :, None] != own[:, None]


class _Scores(NamedTuple):
    query: Tensor  # [windows, heads, N, D]
    key: Tensor
    value: Tensor
    unit: tuple[Tensor, Tensor]  # query and key as they are multiplied: normalised with logit_scale
    cosines: Tensor  # their product, before any scale
    weights: Tensor
    keep: Tensor | None
    lse: Tensor


def _scores(qkv, qkv_bias, table, logit_scale, seed, w: Windows, heads: int, scale: float, dropout_p: float) -> _Scores:
    q, k, v = partition(pad(qkv, qkv_bias, w), w).unflatten(2, (3, heads, qkv.shape[3] // 3 // heads)).permute(2, 0, 3, 1, 4)
    unit = (q, k) if logit_scale is None else (F.normalize(q, dim=-1, eps=_least(q)), F.normalize(k, dim=-1, eps=_least(k)))
    cosines = unit[0] @ unit[1].transpose(-1, -2)
    s = cosines * (scale if logit_scale is None else logit_scale[:, None, None].to(q.dtype))
    if table is not None:
        s = s + table[relative_index(w.window, s.device)].permute(2, 0, 1).to(s.dtype)
    apart = regions(w, s.device)
    if apart is not None:
        masks = (apart.to(s.dtype) * MASKED)[:, None]
        s = (s.unflatten(0, (qkv.shape[0], w.total)) + masks).flatten(0, 1)
    keep = None
    if dropout_p:
        keep = _philox.keep(seed, dropout_p, s.shape[0], heads, w.tokens, w.tokens).to(s.dtype) / (1 - dropout_p)
    return _Scores(q, k, v, unit, cosines, s.softmax(-1), keep, s.logsumexp(-1))


def _crop(t: Tensor, w: Windows) -> Tensor:
    return t[:, : w.size[0], : w.size[1]]


def forward(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p) -> tuple[Tensor, Tensor]:
    w = Windows.of(qkv.shape[1:3], window, shift)
    s = _scores(qkv, qkv_bias, table, logit_scale, seed, w, heads, scale, dropout_p)
    p = s.weights if s.keep is None else s.weights * s.keep
    return _crop(reverse((p @ s.value).transpose(1, 2).flatten(2), w, qkv.shape[0]), w), s.lse


def _normalize_grad(grad: Tensor, t: Tensor, unit: Tensor) -> Tensor:
    norm, least = t.norm(dim=-1, keepdim=True), _least(t)
    along = torch.where(norm > least, (grad * unit).sum(-1, keepdim=True), 0.0)
    return (grad - unit * along) / norm.clamp_min(least)


def _least(t: Tensor) -> float:
    """The least norm to divide by, which float16 would round to zero."""
    numbers = torch.finfo(t.dtype)
    return max(1e-12, numbers.tiny * numbers.eps)


def backward(grad, qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p):
    """(qkv's gradient, qkv_bias', table's, logit_scale's)"""
    w = Windows.of(qkv.shape[1:3], window, shift)
    s = _scores(qkv, qkv_bias, table, logit_scale, seed, w, heads, scale, dropout_p)
    grad = partition(pad(grad, None, w), w).unflatten(2, (heads, grad.shape[3] // heads)).transpose(1, 2)
    p = s.weights if s.keep is None else s.weights * s.keep
    dp = grad @ s.value.transpose(-1, -2)
    dp = dp if s.keep is None else dp * s.keep
    ds = s.weights * (dp - (s.weights * dp).sum(-1, keepdim=True))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    sums = ds.to(wide).sum(0)
    entries = (2 * w.window[0] - 1) * (2 * w.window[1] - 1)
    index = relative_index(w.window, qkv.device).flatten()
    grad_table = sums.new_zeros(entries, heads).index_add(0, index, sums.flatten(1).t().contiguous())
    grad_logits = (ds * s.cosines).to(wide).sum((0, 2, 3))
    dx = ds * (scale if logit_scale is None else logit_scale[:, None, None].to(ds.dtype))
    dq, dk, dv = dx @ s.unit[1], dx.transpose(-1, -2) @ s.unit[0], p.transpose(-1, -2) @ grad
    if logit_scale is not None:
        dq, dk = _normalize_grad(dq, s.query, s.unit[0]), _normalize_grad(dk, s.key, s.unit[1])
    rows = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4).flatten(2)
    padded = reverse(rows, w, qkv.shape[0])
    beyond = padded.to(wide).masked_fill(inside(w, qkv.device), 0.0).sum((0, 1, 2))
    return _crop(padded, w), beyond, grad_table, grad_logits


_TENSORS = "Tensor qkv, Tensor? qkv_bias, Tensor? table, Tensor? logit_scale, Tensor? seed"
_OPTIONS = "int heads, int[] window, int[] shift, float scale, float dropout_p"


def _into(*arguments) -> None:
    *call, output, lse = arguments
    for to, y in zip((output, lse), forward(*call), strict=True):
        to.copy_(y)


def _grad_into(grad, qkv, qkv_bias, table, logit_scale, seed, lse, heads, window, shift, scale, dropout_p, *results) -> None:
    found = backward(grad, qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p)
    for to, y in zip(results, found, strict=True):
        if to is not None:
            to.copy_(y)


def _triton(name: str) -> Callable[..., Any]:
    def call(*args):
        from pyops.triton_kernels import window_attention  # imports triton, so only at first use

        return getattr(window_attention, name)(*args)

    return call


_library.define(
    "window_attention_into",
    f"({_TENSORS}, {_OPTIONS}, Tensor(a!) output, Tensor(b!) lse) -> ()",
    fake=lambda *_: None,
    reference=_into,
    overloads=("", "triton"),
)
_library.define(
    "window_attention_grad_into",
    f"(Tensor grad, {_TENSORS}, Tensor lse, {_OPTIONS}, Tensor(a!) grad_qkv, Tensor(b!)? grad_qkv_bias, Tensor(c!)? grad_table, "
    "Tensor(d!)? grad_logit_scale) -> ()",
    fake=lambda *_: None,
    reference=_grad_into,
    overloads=("", "triton"),
)
for _name in ("window_attention_into", "window_attention_grad_into"):
    _library.implement(f"{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
