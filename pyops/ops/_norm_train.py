"""The norms over an image's channels as differentiable torch ops, composed of `_norm_ops`.

    pyops::lrn_fwd         local response normalisation of input, or of relu(input)
    pyops::layer_norm_fwd  LayerNorm over each position's channels

Images are ``[N, P, C]`` (`rows`) or ``[N, C, P]``, contiguous. Saved is the input alone (and LayerNorm's weight): backward computes sums
and statistics again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops.ops import _channel_ops, _fused_ops, _norm_ops  # noqa: F401


def laid_out(input: Tensor) -> tuple[Tensor, bool]:
    """``[N, C, *]`` as the ops take it, and `rows`: whether its channels are neighbours in memory. A view, but for strided inputs."""
    rows = input.stride(1) == 1
    N, C, positions = *input.shape[:2], input.shape[2:].numel()
    return (input.movedim(1, -1).reshape(N, positions, C) if rows else input.reshape(N, C, positions)).contiguous(), rows


def restored(output: Tensor, input: Tensor, rows: bool) -> Tensor:
    """An op's output in input's shape and layout."""
    if rows and (input.stride(-1) != 1 or input.shape[1] == 1):
        return output.view(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)
    return output.view(input.shape)  # with one position either layout has the same memory


def _save_lrn(ctx, inputs, output):
    ctx.options = inputs[1:]
    ctx.save_for_backward(inputs[0])


def _autograd_lrn(ctx, op, grad):
    _fused_ops.refuse_second_order()
    return op(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)


def _save_layer_norm(ctx, inputs, output):
    input, ctx.rows, weight, _, ctx.eps = inputs
    ctx.save_for_backward(input, weight)


def _autograd_layer_norm(ctx, op, grad):
    _fused_ops.refuse_second_order()
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_input, grad_weight, grad_bias = op(grad, input, ctx.rows, weight, ctx.eps, needs[0])
    return grad_input if needs[0] else None, None, grad_weight if needs[2] else None, grad_bias if needs[3] else None, None


def _layer_norm_backward(k, grad, input, rows, weight, eps, needs_input):
    grad_input, sums = k.layer_norm_grad(grad, input, rows, weight, eps, needs_input)
    return grad_input, sums[0].clone(), sums[1].clone()  # an op's results share no memory


def _fake_layer_norm_backward(grad, input, rows, weight, eps, needs_input):
    C = input.shape[2 if rows else 1]
    image = torch.empty_like(input) if needs_input else input.new_empty(0)
    return image, _channel_ops.vector(input, C), _channel_ops.vector(input, C)


_LRN = "bool rows, int size, float alpha, float beta, float k, bool relu"
_fused_ops.define(
    "lrn", f"(Tensor input, {_LRN})", "Tensor",
    lambda input, *_: torch.empty_like(input), lambda k, *args: k.lrn_run(*args), _save_lrn, _autograd_lrn,
    (f"(Tensor grad, Tensor input, {_LRN}) -> Tensor", lambda grad, input, *_: torch.empty_like(input), lambda k, *args: k.lrn_grad(*args)),
)  # fmt: skip
_fused_ops.define(
    "layer_norm", "(Tensor input, bool rows, Tensor? weight, Tensor? bias, float eps)", "Tensor",
    lambda input, *_: torch.empty_like(input), lambda k, *args: k.layer_norm_run(*args), _save_layer_norm, _autograd_layer_norm,
    (
        "(Tensor grad, Tensor input, bool rows, Tensor? weight, float eps, bool needs_input) -> (Tensor, Tensor, Tensor)",
        _fake_layer_norm_backward, _layer_norm_backward,
    ),
)  # fmt: skip
