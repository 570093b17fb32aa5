"""The torch ops of the depthwise convolution: schemas, fakes, gradients, and who computes them.

    pyops::depthwise_infer  forward; not differentiable, so a call under no_grad skips Python's autograd wrapper
    pyops::depthwise_fwd    forward
    pyops::depthwise_bwd    all gradients; recomputes what the activation needs, so forward keeps nothing but its arguments

Outputs are channels_last. `activation` is an index into `_activations.NAMES`; `means` asks for the float32 [N, C] means of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations

_FORWARD = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int activation, "
    "float slope, bool means) -> (Tensor output, Tensor means)"
)


def output_size(size, kernel, stride, padding, dilation) -> list:
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]


def reference(input, weight, bias, residual, stride, padding, dilation, activation, slope, means):
    """What the kernels compute, in plain PyTorch: (output, float32 means [N, C] or an empty tensor)."""
    weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups=weight.shape[0])
    output = _activations.apply(y if residual is None else y + residual, activation, slope)
    return output, mean_of(output) if means else output.new_empty(0, dtype=torch.promote_types(output.dtype, torch.float32))


def mean_of(output: Tensor) -> Tensor:
    return output.mean((2, 3), dtype=torch.promote_types(output.dtype, torch.float32))


def _kernel_reference(input, weight, bias, residual, stride, padding, dilation, activation, slope, means):
    output, means = reference(input, weight, bias, residual, stride, padding, dilation, activation, slope, means)
    return output.contiguous(memory_format=torch.channels_last), means


def _kernel_reference_backward(
    grad_output, grad_means, input, weight, bias, residual, stride, padding, dilation, activation, slope, needs_input, needs_weight
):  # fmt: skip
    z, _ = reference(input, weight, bias, residual, stride, padding, dilation, 0, slope, False)
    grad = torch.zeros_like(z) if grad_output is None else grad_output
    if grad_means is not None:
        grad = grad + (grad_means / (z.shape[2] * z.shape[3])).to(z.dtype)[:, :, None, None]
    grad = _activations.apply_backward(grad, z, activation, slope)
    mask = [needs_input, needs_weight, needs_weight and bias is not None]
    C, kernel = weight.shape[0], weight.to(input.dtype)
    found = torch.ops.aten.convolution_backward(grad, input, kernel, [C], stride, padding, dilation, False, [0, 0], C, mask)
    return (
        found[0].contiguous(memory_format=torch.channels_last) if needs_input else input.new_empty(0),
        found[1].to(weight.dtype).contiguous() if needs_weight else input.new_empty(0),
        found[2].to(weight.dtype) if mask[2] else input.new_empty(0),
        input.new_empty(0) if residual is None else grad.clone(memory_format=torch.channels_last),
    )


def _gradients(tensors, wanted, options, grad_output, grad_means):
    """Differentiable gradients of `reference` for the wanted ones of (input, weight, bias, residual)."""
    input, weight, bias, residual = tensors
    stride, padding, dilation, activation, slope = options
    output, means = reference(input, weight, bias, residual, stride, padding, dilation, activation, slope, grad_means is not None)
    pairs = [(y, g) for y, g in ((output, grad_output), (means, grad_means)) if g is not None]
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
    return torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, materialize_grads=True)


def _empty(like: Tensor, *sizes) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(input, weight, bias, residual, stride, padding, dilation, activation, slope, means):
    N, C = input.shape[:2]
    output = _empty(input, N, C, *output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation))
    return output, input.new_empty(
        (N, C) if means else (0,), dtype=torch.promote_types(input.dtype, torch.float32) if means else torch.float32
    )


def _fake_backward(
    grad_output, grad_means, input, weight, bias, residual, stride, padding, dilation, activation, slope, needs_input, needs_weight
):  # fmt: skip
    return (
        _empty(input, *input.shape) if needs_input else input.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else input.new_empty(0),
        bias.new_empty(bias.shape) if needs_weight and bias is not None else input.new_empty(0),
        _empty(input, *residual.shape) if residual is not None else input.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    input, weight, bias, residual, *ctx.options, _ = inputs
    ctx.save_for_backward(input, weight, bias, residual)


def _backward_through(op):
    def backward(ctx, grad_output, grad_means):
        tensors = ctx.saved_tensors
        if grad_means is not None and grad_means.numel() == 0:
            grad_means = None
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again, through the reference
            wanted = [t is not None and t.requires_grad for t in tensors]
            found = iter(_gradients(tensors, wanted, ctx.options, grad_output, grad_means))
            grads = [next(found) if want else None for want in wanted]
        else:
            needs = ctx.needs_input_grad
            grads = op(grad_output, grad_means, *tensors, *ctx.options, needs[0], needs[1] or needs[2])
            grads = [grad if need and t is not None else None for grad, need, t in zip(grads, needs[:4], tensors, strict=True)]
        return *grads, None, None, None, None, None, None

    return backward


_library.define("depthwise_infer", _FORWARD, fake=_fake, reference=_kernel_reference, overloads=("", "triton"))
_library.define(
    "depthwise_bwd",
    "(Tensor? grad_output, Tensor? grad_means, Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int activation, float slope, bool needs_input, bool needs_weight) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    fake=_fake_backward,
    reference=_kernel_reference_backward,
    overloads=("", "triton"),
)
for _overload in ("default", "triton"):
    _library.define(
        "depthwise_fwd",
        _FORWARD,
        fake=_fake,
        reference=_kernel_reference,
        setup_context=_setup_context,
        backward=_backward_through(getattr(torch.ops.pyops.depthwise_bwd, _overload)),
        overloads=("" if _overload == "default" else _overload,),
    )


def _triton_forward(*args):
    from pyops.triton_kernels import depthwise_conv  # imports triton, so only at first use

    return depthwise_conv.forward(*args)


def _triton_backward(*args):
    from pyops.triton_kernels import depthwise_conv

    return depthwise_conv.backward(*args)


for _name, _function in (("infer", _triton_forward), ("fwd", _triton_forward), ("bwd", _triton_backward)):
    _library.implement(f"depthwise_{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
