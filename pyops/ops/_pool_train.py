"""Batch norm, activation and pooling as one differentiable torch op, composed of `_pool_ops`' products.

    pyops::batch_norm_act_pool_fwd  (pool(activation(batch_norm(input))), the maxima's places in their windows)

Saved are the input and, of a maximum, a byte for each output; `norm` and `group` are `_fused_ops`', norm None leaves batch norm out.
"""

from __future__ import annotations

from pyops.ops import _channel_ops, _fused_ops, _pool_ops


def _forward(k, input, norm, weight, bias, maximum, kernel_size, stride, padding, activation, slope, group):
    affine = None if norm is None else k.channel_affine(norm, weight, bias)
    return k.pool_run(input, affine, maximum, kernel_size, stride, padding, activation, slope, maximum)


def _backward(k, grad, input, norm, weight, bias, index, maximum, kernel_size, stride, padding, activation, slope, group):
    place = (index if maximum else None, kernel_size, stride, padding, activation, slope)
    norm = _fused_ops.Norm.of(k, norm, weight, bias, group)
    if norm is None:
        return k.pool_grad(grad, input, None, None, *place), input.new_empty(0), input.new_empty(0)
    terms, *grads = norm.terms(k, k.pool_reduce(grad, input, norm.affine, *place))
    return k.pool_grad(grad, input, norm.affine, terms, *place), *grads


def _fake(input, norm, weight, bias, maximum, kernel_size, stride, padding, activation, slope, group):
    return _pool_ops._fake(input, None, maximum, kernel_size, stride, padding, activation, slope, maximum)


def _fake_backward(grad, input, norm, *_):
    vectors = (0,) if norm is None else (input.shape[1],)
    return _channel_ops.image_like(input), _channel_ops.vector(input, *vectors), _channel_ops.vector(input, *vectors)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1])


def _autograd(ctx, op, grad, _):
    _fused_ops.refuse_second_order()
    input, norm, weight, bias, index = ctx.saved_tensors
    grad_input, grad_weight, grad_bias = op(grad, input, norm, weight, bias, index, *ctx.options)
    vectors = (None if t is None else g.to(t.dtype) for t, g in ((weight, grad_weight), (bias, grad_bias)))
    return grad_input, None, *vectors, *[None] * len(ctx.options)


_OPTIONS = "bool maximum, int[] kernel_size, int[] stride, int[] padding, int activation, float slope, str group"
_TENSORS = "Tensor input, Tensor? norm, Tensor? weight, Tensor? bias"
_fused_ops.define(
    "batch_norm_act_pool", f"({_TENSORS}, {_OPTIONS})", "(Tensor, Tensor)", _fake, _forward, _setup_context, _autograd,
    (f"(Tensor grad, {_TENSORS}, Tensor index, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _fake_backward, _backward),
)  # fmt: skip
