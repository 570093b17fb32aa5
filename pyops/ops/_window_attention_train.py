"""Window attention as a differentiable torch op, composed of `_window_attention_ops`, which says what the arguments are.

    pyops::window_attention_fwd   (output [B, H, W, C], lse)

Saved: the arguments and lse, which the caller has no use for.
"""

from __future__ import annotations

from torch import Tensor

from pyops.ops import _fused_ops
from pyops.ops._attention_ops import vector
from pyops.ops._window_attention_ops import Windows


def forward(k, qkv, qkv_bias, table, logit_scale, seed, *options):
    output, lse = _fake(qkv, qkv_bias, table, logit_scale, seed, *options)
    k.window_attention_into(qkv, qkv_bias, table, logit_scale, seed, *options, output, lse)
    return output, lse


def _fake(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, *_):
    w = Windows.of(qkv.shape[1:3], window, shift)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), vector(qkv, qkv.shape[0] * w.total, heads, w.tokens)


def _gradients(qkv, vectors, needs) -> list[Tensor]:
    """qkv's, and those of the vectors that need one; empty where there is none."""
    return [
        qkv.new_empty(qkv.shape),
        *(vector(qkv, *t.shape) if need else qkv.new_empty(0) for t, need in zip(vectors, needs, strict=True)),
    ]


def _backward(k, grad, qkv, qkv_bias, table, logit_scale, seed, lse, *rest):
    *options, needs = rest
    found = _gradients(qkv, (qkv_bias, table, logit_scale), needs)
    to = [found[0], *(t if need else None for t, need in zip(found[1:], needs, strict=True))]
    k.window_attention_grad_into(grad.contiguous(), qkv, qkv_bias, table, logit_scale, seed, lse, *options, *to)
    return tuple(found)


def _fake_backward(grad, qkv, qkv_bias, table, logit_scale, seed, lse, *rest):
    return tuple(_gradients(qkv, (qkv_bias, table, logit_scale), rest[-1]))


def _save(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])


def _autograd(ctx, op, grad, _):
    _fused_ops.refuse_second_order()
    needs = ctx.needs_input_grad[:4]
    found = op(grad, *ctx.saved_tensors, *ctx.options, list(needs[1:]))
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * (1 + len(ctx.options))


_TENSORS = "Tensor qkv, Tensor? qkv_bias, Tensor? table, Tensor? logit_scale, Tensor? seed"
_OPTIONS = "int heads, int[] window, int[] shift, float scale, float dropout_p"
_fused_ops.define(
    "window_attention", f"({_TENSORS}, {_OPTIONS})", "(Tensor, Tensor)", _fake, forward, _save, _autograd,
    (
        f"(Tensor grad, {_TENSORS}, Tensor lse, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_backward, _backward,
    ),
)  # fmt: skip
