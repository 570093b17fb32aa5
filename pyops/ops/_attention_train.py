"""Attention as a differentiable torch op, composed of `_attention_ops`, which says what the arguments are.

    pyops::attention_fwd   (output, lse) for query, key and value [B, H, N, D], or for a packed query [B, N, 3, H, D] without key and value

A packed query's gradient is packed as well: nothing is split, copied or added up. Saved: the arguments, output and lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops.ops import _attention_ops, _fused_ops


def heads(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
    """query, key, value as [B, H, N, D] views."""
    if key is not None:
        return query, key, value  # type: ignore[return-value]
    return tuple(query[:, :, i].transpose(1, 2) for i in range(3))


def _output(query: Tensor, value: Tensor) -> Tensor:
    """Contiguous as [B, H, N, D], or as [B, N, H, D] where the query's heads are nearer neighbours than its rows."""
    (B, H, N, _), D = query.shape, value.shape[3]
    if query.stride(1) < query.stride(2):
        return query.new_empty(B, N, H, D).transpose(1, 2)
    return query.new_empty(B, H, N, D)


def forward(k, query, key, value, bias, slopes, spans, seed, *options):
    output, lse = _fake(query, key, value)
    k.attention_into(*heads(query, key, value), bias, slopes, spans, seed, *options, output, lse)
    return output, lse


def _like(t: Tensor) -> Tensor:
    """For the gradient of `t`: in its layout, but with neighbouring elements of a row."""
    return torch.empty_like(t) if t.stride(-1) == 1 else t.new_empty(t.shape)


def _gradients(query, key, value, bias, needs_bias: bool) -> list[Tensor]:
    """query's, key's and value's, and bias'; empty where there is none."""
    grads = [_like(t) if t is not None else query.new_empty(0) for t in (query, key, value)]
    return [*grads, _attention_ops.vector(query, *bias.shape) if needs_bias else query.new_empty(0)]


def _backward(k, grad, grad_lse, query, key, value, bias, slopes, spans, seed, output, lse, *rest):
    *options, needs_bias = rest
    found = _gradients(query, key, value, bias, needs_bias)
    split = heads(found[0], *(None if key is None else t for t in found[1:3]))
    tensors = (*heads(query, key, value), bias, slopes, spans, seed, output, lse)
    k.attention_grad_into(grad, grad_lse, *tensors, *options, *split, found[3] if needs_bias else None)
    return tuple(found)


def _fake(query, key, value, *options) -> tuple[Tensor, Tensor]:
    q, _, v = heads(query, key, value)
    return _output(q, v), _attention_ops.vector(q, *q.shape[:3])


def _fake_backward(grad, grad_lse, query, key, value, bias, slopes, spans, seed, output, lse, *rest):
    return tuple(_gradients(query, key, value, bias, rest[-1]))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output)


def _autograd(ctx, op, grad, grad_lse):
    _fused_ops.refuse_second_order()
    query, key, value, bias, *rest = ctx.saved_tensors
    if grad is None:
        if grad_lse is None:
            return (None,) * 12
        grad = torch.zeros_like(rest[3])
    needs = ctx.needs_input_grad
    *grads, grad_bias = op(grad, grad_lse, query, key, value, bias, *rest, *ctx.options, needs[3])
    found = (g if need and t is not None else None for g, need, t in zip(grads, needs, (query, key, value), strict=False))
    return *found, grad_bias.to(bias.dtype) if needs[3] else None, *[None] * 8


_TENSORS = "Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor? slopes, Tensor? spans, Tensor? seed"
_OPTIONS = "float scale, int left, int right, float softcap, float dropout_p"
_fused_ops.define(
    "attention", f"({_TENSORS}, {_OPTIONS})", "(Tensor, Tensor)", _fake, forward, _save, _autograd,
    (
        f"(Tensor grad, Tensor? grad_lse, {_TENSORS}, Tensor output, Tensor lse, {_OPTIONS}, bool needs_bias) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _fake_backward, _backward,
    ),
    differentiable=2,
)  # fmt: skip
