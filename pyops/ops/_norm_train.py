"""The norms over an image's channels as differentiable torch ops, composed of `_norm_ops`.

    pyops::lrn_fwd         local response normalisation of input, or of relu(input)
    pyops::layer_norm_fwd  LayerNorm over each position's channels

Images are ``[N, C, *]`` in any layout; results keep it. Saved is the input alone (and LayerNorm's weight): backward computes sums and
statistics again. `lrn` and `layer_norm` are the same without gradients, for one overload's kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyops.ops import _channel_ops, _conv_call, _fused_ops


def _laid_out(image: Tensor, rows: bool) -> Tensor:
    """``[N, P, C]`` or ``[N, C, P]``: a view, but for strided images."""
    N, C, positions = *image.shape[:2], math.prod(image.shape[2:])
    if rows:
        return image.movedim(1, -1).reshape(N, positions, C).contiguous()
    return image.reshape(N, C, positions).contiguous()


def _is_rows(input: Tensor) -> bool:
    """Whether channels are neighbours in memory, and positions are not."""
    return input.stride(1) == 1 and not input.is_contiguous()


def _restored(output: Tensor, input: Tensor, rows: bool) -> Tensor:
    """A kernel's result in input's shape and layout."""
    if rows:
        return output.view(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)
    return output.view(input.shape)


def lrn(k, input: Tensor, size: int, alpha: float, beta: float, bias: float, relu: bool) -> Tensor:
    rows = _is_rows(input)
    return _restored(k.lrn_run(_laid_out(input, rows), rows, size, alpha, beta, bias, relu), input, rows)


def _lrn_backward(k, grad, input, *options):
    rows = _is_rows(input)
    return _restored(k.lrn_grad(_laid_out(grad, rows), _laid_out(input, rows), rows, *options), input, rows)


def layer_norm(k, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rows = _is_rows(input)
    vectors = _conv_call.as_vector(weight, input), _conv_call.as_vector(bias, input)
    return _restored(k.layer_norm_run(_laid_out(input, rows), rows, *vectors, eps), input, rows)


def _layer_norm_backward(k, grad, input, weight, eps, needs_input):
    rows = _is_rows(input)
    images = _laid_out(grad, rows), _laid_out(input, rows)
    grad_input, sums = k.layer_norm_grad(*images, rows, _conv_call.as_vector(weight, input), eps, needs_input)
    return _restored(grad_input, input, rows) if needs_input else grad_input, sums


def _fake(input, *_):
    rows = _is_rows(input)
    return _restored(torch.empty_like(_laid_out(input, rows)), input, rows)


def _fake_layer_norm_backward(grad, input, weight, eps, needs_input):
    return _fake(input) if needs_input else input.new_empty(0), _channel_ops.vector(input, 2, input.shape[1])


def _save_lrn(ctx, inputs, output):
    ctx.options = inputs[1:]
    ctx.save_for_backward(inputs[0])


def _autograd_lrn(ctx, op, grad):
    _fused_ops.refuse_second_order()
    return op(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)


def _save_layer_norm(ctx, inputs, output):
    input, weight, bias, ctx.eps = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    ctx.save_for_backward(input, weight)


def _autograd_layer_norm(ctx, op, grad):
    _fused_ops.refuse_second_order()
    needs = ctx.needs_input_grad
    grad_input, sums = op(grad, *ctx.saved_tensors, ctx.eps, needs[0])
    vectors = (sums[i].to(ctx.dtypes[i]) if needs[i + 1] else None for i in range(2))
    return grad_input if needs[0] else None, *vectors, None


_LRN = "Tensor input, int size, float alpha, float beta, float k, bool relu"
_fused_ops.define(
    "lrn", f"({_LRN})", "Tensor", _fake, lrn, _save_lrn, _autograd_lrn,
    (f"(Tensor grad, {_LRN}) -> Tensor", lambda grad, input, *_: _fake(input), _lrn_backward),
)  # fmt: skip
_fused_ops.define(
    "layer_norm", "(Tensor input, Tensor? weight, Tensor? bias, float eps)", "Tensor", _fake, layer_norm, _save_layer_norm,
    _autograd_layer_norm,
    (
        "(Tensor grad, Tensor input, Tensor? weight, float eps, bool needs_input) -> (Tensor, Tensor)",
        _fake_layer_norm_backward, _layer_norm_backward,
    ),
)  # fmt: skip
