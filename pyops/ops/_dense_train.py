"""The convolution and its transpose as differentiable torch ops, composed of `_dense_ops`' products.

    pyops::conv_train_fwd            conv(input) + bias, and its moments [2, O] where asked for
    pyops::conv_transpose_train_fwd  the same of the transposed convolution

Saved are input and weight alone. Moments carry no gradient: whoever normalises with them makes their share part of the output's.
"""

from __future__ import annotations

from pyops.ops import _channel_ops, _dense_ops, _fused_ops, _pointwise_ops


def _forward(k, input, weight, bias, stride, padding, dilation, groups, moments):
    tf32 = _pointwise_ops.tf32_allowed(input)
    return k.conv_run(input, weight, bias, None, stride, padding, dilation, groups, 0, 0.0, False, moments, tf32)


def _backward(k, grad, input, weight, stride, padding, dilation, groups, moments, needs_input, needs_weight):
    tf32 = _pointwise_ops.tf32_allowed(input)
    found = _empty(input), _empty(weight)
    if needs_input:
        size, epilogue = input.shape[2:], (0, 0.0, False, False, tf32)
        found = k.conv_transpose_run(grad, weight, None, None, stride, padding, size, dilation, groups, *epilogue)[0], found[1]
    if needs_weight:
        found = found[0], k.conv_wgrad(grad, input, weight.shape[2:], stride, padding, dilation, groups, tf32)
    return found


def _forward_transposed(k, input, weight, bias, stride, padding, output_size, dilation, groups, moments):
    tf32 = _pointwise_ops.tf32_allowed(input)
    return k.conv_transpose_run(input, weight, bias, None, stride, padding, output_size, dilation, groups, 0, 0.0, False, moments, tf32)


def _backward_transposed(k, grad, input, weight, stride, padding, output_size, dilation, groups, moments, needs_input, needs_weight):
    tf32 = _pointwise_ops.tf32_allowed(input)
    found = _empty(input), _empty(weight)
    if needs_input:
        found = k.conv_run(grad, weight, None, None, stride, padding, dilation, groups, 0, 0.0, False, False, tf32)[0], found[1]
    if needs_weight:
        found = found[0], k.conv_wgrad(input, grad, weight.shape[2:], stride, padding, dilation, groups, tf32)
    return found


def _empty(like):
    return like.new_empty(0)


def _fake(input, weight, bias, stride, padding, dilation, groups, moments):
    return _dense_ops._fake(input, weight, bias, None, stride, padding, dilation, groups, 0, 0.0, False, moments)


def _fake_transposed(input, weight, bias, stride, padding, output_size, dilation, groups, moments):
    return _dense_ops._fake_transpose(input, weight, bias, None, stride, padding, output_size, dilation, groups, 0, 0.0, False, moments)


def _fake_backward(grad, input, weight, *options):
    image = _channel_ops.image_like(input) if options[-2] else _empty(input)
    return image, weight.new_empty(weight.shape) if options[-1] else _empty(weight)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[3:]
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx, op, grad, _):
    _fused_ops.refuse_second_order()
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = op(grad, input, weight, *ctx.options, needs[0], needs[1])
    bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype) if needs[2] else None
    return found[0] if needs[0] else None, found[1] if needs[1] else None, bias, *[None] * len(ctx.options)


def _define(name: str, numbers: str, fake, forward, backward) -> None:
    _fused_ops.define(
        name, f"(Tensor input, Tensor weight, Tensor? bias, {numbers}, bool moments)", "(Tensor, Tensor)",
        fake, forward, _setup_context, _autograd,
        (
            f"(Tensor grad, Tensor input, Tensor weight, {numbers}, bool moments, bool needs_input, bool needs_weight) -> (Tensor, Tensor)",
            _fake_backward, backward,
        ),
    )  # fmt: skip


_define("conv_train", "int[] stride, int[] padding, int[] dilation, int groups", _fake, _forward, _backward)
_define(
    "conv_transpose_train", "int[] stride, int[] padding, int[] output_size, int[] dilation, int groups",
    _fake_transposed, _forward_transposed, _backward_transposed,
)  # fmt: skip
