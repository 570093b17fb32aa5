"""Cross entropy of a linear layer's logits as a differentiable torch op: products by PyTorch's GEMM into one buffer of a chunk of rows,
which `_cross_entropy_ops` turns into losses and gradients. The logits of all rows never exist.

    pyops::linear_cross_entropy_fwd  (loss, gradients by input, weight, bias: those that `needs` names, else empty)

A mean's or a sum's gradient is known up to one factor when its loss is, and costs one product less then: the forward forms it and the
backward multiplies. Losses of single rows and float16, whose range is too small for gradients without the factor, compute logits again.

Source: Hsu et al., "Liger Kernel", 2024; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyops.ops import _channel_ops, _fused_ops

REDUCTIONS = ("none", "mean", "sum")
NONE, MEAN, SUM = range(3)
CHUNK_BYTES = 32 << 20  # of logits


def is_ahead(dtype: torch.dtype, reduction: int) -> bool:
    """Whether the forward of a differentiated call forms the gradients."""
    return reduction != NONE and dtype != torch.float16


def chunk_rows(M: int, V: int, itemsize: int) -> int:
    """Rows of a chunk: chunks are even and, where a row allows it, within CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (V * itemsize))
    return math.ceil(M / max(1, math.ceil(M / most)))


def _run(k, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: Tensor | None, options, needs):
    """(losses [M], gradients by input, weight, bias where needed, else empty), gradients times scale [M]."""
    M, V, kind = input.shape[0], weight.shape[0], _channel_ops.vector_dtype(input.dtype)
    target = target.contiguous()
    rows = chunk_rows(M, V, input.element_size())
    buffer, losses = input.new_empty(rows, V), _channel_ops.vector(input, M)
    grad_input = input.new_empty(input.shape if needs[0] else (0,))
    wide = input.dtype if rows >= M else kind  # sums over chunks are not rounded in between
    grad_weight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] else weight.new_empty(0)
    grad_bias = weight.new_zeros(V, dtype=kind) if needs[2] else weight.new_empty(0)
    for begin in range(0, M, rows or 1):
        part = slice(begin, begin + rows)
        x, logits = input[part], buffer[: min(rows, M - begin)]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        losses[part] = k.cross_entropy_rows_(logits, target[part], None if scale is None else scale[part], *options)
        if needs[0]:
            torch.mm(logits, weight, out=grad_input[part])
        if needs[1]:
            if wide == input.dtype:
                grad_weight.addmm_(logits.t(), x)
            else:
                grad_weight += logits.t() @ x
        if needs[2]:
            grad_bias += logits.sum(0, dtype=kind)
    return losses, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _check_range(target: Tensor, V: int, ignore_index: int) -> None:
    """On a GPU it would have to wait; there the loss is NaN."""
    if target.is_cpu and target.numel():
        low, high = (int(bound) for bound in target.masked_fill(target == ignore_index, 0).aminmax())
        if low < 0 or high >= V:
            wrong = low if low < 0 else high
            raise IndexError(f"linear_cross_entropy: target: expected 0 to {V - 1} or ignore_index {ignore_index}, got {wrong}")


def _forward(k, input, weight, target, bias, ignore_index, label_smoothing, softcap, reduction, needs):
    _check_range(target, weight.shape[0], ignore_index)
    kind = _channel_ops.vector_dtype(input.dtype)
    ahead = is_ahead(input.dtype, reduction)
    needs = needs if ahead else [False] * 3
    count = (target != ignore_index).sum().to(kind) if reduction == MEAN else None
    scale = None
    if any(needs):
        scale = torch.ones_like(target, dtype=kind) if count is None else count.reciprocal().repeat(target.shape[0])
    losses, *grads = _run(k, input, weight, target, bias, scale, (ignore_index, label_smoothing, softcap), needs)
    if reduction == NONE:
        return losses, *grads
    total = losses.sum()
    return total if count is None else total / count, *grads


def _backward(k, grad, input, weight, target, bias, ignore_index, label_smoothing, softcap, reduction, needs):
    scale = grad / (target != ignore_index).sum() if reduction == MEAN else grad
    scale = scale.expand(target.shape).contiguous()
    return _run(k, input, weight, target, bias, scale, (ignore_index, label_smoothing, softcap), needs)[1:]


def _grads(input, weight, needs):
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _fake(input, weight, target, bias, ignore_index, label_smoothing, softcap, reduction, needs):
    loss = _channel_ops.vector(input, *(input.shape[:1] if reduction == NONE else ()))
    return loss, *_grads(input, weight, needs if is_ahead(input.dtype, reduction) else [False] * 3)


def _setup(ctx, inputs, output):
    ctx.options, ctx.ahead = inputs[4:], is_ahead(inputs[0].dtype, inputs[7])
    ctx.save_for_backward(*(output[1:] if ctx.ahead else inputs[:4]))


def _autograd(ctx, op, grad, *_):
    _fused_ops.refuse_second_order()
    saved, needs = ctx.saved_tensors, [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = [grad * each for each in saved] if ctx.ahead else op(grad, *saved, *ctx.options[:-1], needs)
    by_input, by_weight, by_bias = (each if need else None for each, need in zip(grads, needs, strict=True))
    return by_input, by_weight, None, by_bias, *[None] * len(ctx.options)


_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing, float softcap, "
    "int reduction, bool[] needs"
)
_fused_ops.define(
    "linear_cross_entropy", f"({_ARGUMENTS})", "(Tensor, Tensor, Tensor, Tensor)", _fake, _forward, _setup, _autograd,
    (
        f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
        lambda grad, input, weight, *rest: _grads(input, weight, rest[-1]), _backward,
    ),
)  # fmt: skip
