"""Attention in plain PyTorch: what every kernel must compute, forward and backward. `_attention_ops` says what the arguments are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyops.ops import _philox


class Options(NamedTuple):
    scale: float
    left: int  # keys visible before a query's own position, -1: all
    right: int
    softcap: float
    dropout_p: float


class Scores(NamedTuple):
    """What forward and backward both need of the scores ``[B, H, N, M]``."""

    capped: Tensor  # scale * q k^T, after the soft cap
    masked: Tensor  # with biases, -inf where nothing is seen
    dead: Tensor  # [B, H, N, 1]: rows that see nothing
    keep: Tensor | None  # dropout's factors

    def weights(self) -> Tensor:
        return self.masked.masked_fill(self.dead, 0.0).softmax(-1).masked_fill(self.dead, 0.0)


def visible(device, n, m, rows: int, columns: int, left: int, right: int) -> Tensor:
    """Which key each query sees: bool, ``[..., rows, columns]``. n, m: real rows and columns, ints or tensors ``[..., 1, 1]``."""
    i, j = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    distance = j - i - (m - n)
    seen = (i < n) & (j < m)
    seen = seen if left < 0 else seen & (distance >= -left)
    return seen if right < 0 else seen & (distance <= right)


def _scores(query, key, bias, slopes, lengths, keep, o: Options) -> Scores:
    (_, H, N, _), M = query.shape, key.shape[2]
    n, m = (N, M) if lengths is None else (t[:, None, None, None] for t in lengths)
    s = query @ key.transpose(-1, -2) * o.scale
    capped = s if o.softcap == 0 else o.softcap * torch.tanh(s / o.softcap)
    s = capped
    if slopes is not None:
        i, j = torch.arange(N, device=s.device)[:, None], torch.arange(M, device=s.device)
        s = s - (slopes.view(-1, H, 1, 1) * (i + (m - n) - j).abs()).to(s.dtype)
    if bias is not None:
        bias = bias[..., :N, :M]
        s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias.to(s.dtype)
    if lengths is not None or o.left >= 0 or o.right >= 0:
        s = torch.where(visible(s.device, n, m, N, M, o.left, o.right), s, -math.inf)
    factors = None if keep is None else keep.to(s.dtype) / (1 - o.dropout_p)
    return Scores(capped, s, (s == -math.inf).all(-1, keepdim=True), factors)


def _heads(t: Tensor, H: int) -> Tensor:
    """Key or value heads, one for each query head."""
    return t if t.shape[1] == H else t.repeat_interleave(H // t.shape[1], 1)


def _real(t: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros beyond the lengths, where anything may stand."""
    if lengths is None:
        return t
    return torch.where((torch.arange(t.shape[2], device=t.device) < lengths[:, None])[:, None, :, None], t, 0)


def _dense(query, key, value, bias, slopes, lengths, keep, o: Options) -> tuple[Tensor, Tensor]:
    H = query.shape[1]
    n, m = (None, None) if lengths is None else lengths
    query, key, value = _real(query, n), _heads(_real(key, m), H), _heads(_real(value, m), H)
    s = _scores(query, key, bias, slopes, lengths, keep, o)
    p = s.weights() if s.keep is None else s.weights() * s.keep
    return p @ value, s.masked.masked_fill(s.dead, 0.0).logsumexp(-1).masked_fill(s.dead[..., 0], -math.inf)


def _dense_grad(grad, grad_lse, query, key, value, bias, slopes, lengths, keep, o: Options):
    """(query's, key's, value's gradient, the scores' before they are summed to the bias')"""
    (H, G), (n, m) = (query.shape[1], key.shape[1]), (None, None) if lengths is None else lengths
    grad, query, key, value = _real(grad, n), _real(query, n), _heads(_real(key, m), H), _heads(_real(value, m), H)
    s = _scores(query, key, bias, slopes, lengths, keep, o)
    p = s.weights()
    dropped = p if s.keep is None else p * s.keep
    dp = grad @ value.transpose(-1, -2)
    dp = dp if s.keep is None else dp * s.keep
    delta = (p * dp).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None].to(p.dtype)
    ds = p * (dp - delta)
    dx = (ds if o.softcap == 0 else ds * (1 - (s.capped / o.softcap).square())) * o.scale
    group = lambda t: t.unflatten(1, (G, H // G)).sum(2)  # noqa: E731
    return dx @ key, group(dx.transpose(-1, -2) @ query), group(dropped.transpose(-1, -2) @ grad), ds


def _sum_to(t: Tensor, size) -> Tensor:
    """Summed over the dimensions that `size` has once."""
    dims = [d for d in range(t.dim()) if size[d] == 1 and t.shape[d] != 1]
    return t.sum(dims, keepdim=True) if dims else t


def _sequences(spans: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(number, rows, columns) of each sequence of a packed batch."""
    for number, (q, n, k, m) in enumerate(spans.tolist()):
        yield number, slice(q, q + n), slice(k, k + m)


def _per_batch(t: Tensor | None, number: int) -> Tensor | None:
    """`t` for one sequence: a dimension of one stands for all."""
    return t if t is None or t.shape[0] == 1 else t[number : number + 1]


def _walk(each: Callable, query, key, seed, spans, o: Options):
    """`each(number, rows, columns, lengths, keep)` for every sequence of a packed batch, or once, with number None, for a padded one."""
    H = query.shape[1]
    sizes = (H, query.shape[2], key.shape[2])
    if spans is None or spans.shape[0] == query.shape[0] != 1:
        S = query.shape[0]
        keep = None if o.dropout_p == 0 else _philox.keep(seed, o.dropout_p, S, *sizes)
        each(None, slice(None), slice(None), None if spans is None else (spans[:, 1], spans[:, 3]), keep)
        return
    for number, rows, columns in _sequences(spans):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        keep = None if o.dropout_p == 0 else _philox.keep(seed, o.dropout_p, number + 1, H, n, m)[number:]
        each(number, rows, columns, None, keep)


def forward(query, key, value, bias, slopes, spans, seed, o: Options) -> tuple[Tensor, Tensor]:
    """(output [B, H, N, D], lse [B, H, N])"""
    found: list[tuple[slice, Tensor, Tensor]] = []

    def each(number, rows, columns, lengths, keep):
        b, s = (t if number is None else _per_batch(t, number) for t in (bias, slopes))
        output, lse = _dense(query[:, :, rows], key[:, :, columns], value[:, :, columns], b, s, lengths, keep, o)
        found.append((rows, output, lse.to(torch.promote_types(lse.dtype, torch.float32))))

    _walk(each, query, key, seed, spans, o)
    if len(found) == 1 and found[0][1].shape[2] == query.shape[2]:
        return found[0][1:]
    # not written in place: the pieces may carry gradients
    shape = (*query.shape[:3], value.shape[3])
    output = query.new_zeros(shape)
    lse = output.new_full(shape[:3], -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    if not found:
        return output, lse
    rows = torch.cat([torch.arange(query.shape[2], device=query.device)[r] for r, *_ in found])
    return output.index_copy(2, rows, torch.cat([y for _, y, _ in found], 2)), lse.index_copy(2, rows, torch.cat([l for *_, l in found], 2))


def backward(grad, grad_lse, query, key, value, bias, slopes, spans, seed, o: Options, needs_bias: bool):
    """(query's, key's, value's gradient, bias' or None)"""
    grads = [torch.zeros_like(t) for t in (query, key, value)]
    grad_bias = bias.new_zeros(bias.shape, dtype=torch.promote_types(query.dtype, torch.float32)) if needs_bias else None

    def each(number, rows, columns, lengths, keep):
        b, s = (t if number is None else _per_batch(t, number) for t in (bias, slopes))
        g, g_lse, q = (None if t is None else t[:, :, rows] for t in (grad, grad_lse, query))
        *found, ds = _dense_grad(g, g_lse, q, key[:, :, columns], value[:, :, columns], b, s, lengths, keep, o)
        for total, part, where in zip(grads, found, (rows, columns, columns), strict=True):
            total[:, :, where] += part
        if grad_bias is not None:
            to = grad_bias if number is None or grad_bias.shape[0] == 1 else grad_bias[number : number + 1]
            to = to[..., : ds.shape[2], : ds.shape[3]]
            to += _sum_to(ds.to(to.dtype), to.shape)

    _walk(each, query, key, seed, spans, o)
    return *grads, grad_bias
