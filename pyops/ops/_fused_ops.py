"""Differentiable torch ops for training convolutional blocks, composed of `_channel_ops`, `_depthwise_ops`, `_composed_ops` and
`_pointwise_ops`.

Batch norm and the activation live in the op that reads the convolution's output, so that output is all that is saved; backward
recomputes the rest and forms the convolution's incoming gradient, batch statistics' share included, in two passes.

    pyops::batch_norm_act_fwd   activation(batch_norm(input) * keep + residual)
    pyops::depthwise_train_fwd  depthwise convolution of activation(batch_norm(input)), and the moments of its result
    pyops::pointwise_train_fwd  1x1 convolution of activation(batch_norm(input)) * gate, where squeeze-excitation computes the gate from
                                the channel means of activation(batch_norm(input)); and the moments of its result

`norm` is ``[3, C]``: mean, 1/std and 1/count of the values they were computed from, or 0 for constants (running statistics);
None leaves batch norm out. A gradient that flows back through batch statistics is part of the input's, so `norm` and moments carry
none themselves. `group` names a process group of `_groups` whose processes share the statistics, or is "".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import (  # noqa: F401  (registers the ops that `Kernels` looks up)
    _activations,
    _attention_ops,
    _capsule_ops,
    _channel_ops,
    _composed_ops,
    _conv_call,
    _cross_entropy_ops,
    _dense_ops,
    _depthwise_ops,
    _groups,
    _norm_ops,
    _pointwise_ops,
    _pool_ops,
    _sampling_ops,
    _window_attention_ops,
)
from pyops.ops._channel_ops import image_like, vector
from pyops.ops._sharding import is_sharded

_PARTS = (
    "channel_moments", "channel_apply", "channel_sums", "channel_reduce", "channel_grad", "channel_grad_",
    "depthwise_infer", "depthwise_bwd", "depthwise_after", "depthwise_after_bwd", "pointwise_run", "pointwise_into", "pointwise_back",
    "conv_run", "conv_transpose_run", "conv_wgrad", "pool_run", "pool_reduce", "pool_grad",
    "lrn_run", "lrn_grad", "layer_norm_run", "layer_norm_grad",
    "attention_into", "attention_grad_into", "window_attention_into", "window_attention_grad_into",
    "cross_entropy_rows_",
    "gaussian_run", "gaussian_grad",
    "capsule_run", "capsule_grad",
)  # fmt: skip
_SMALL = ("channel_norm", "channel_affine", "channel_terms")  # whose default overload serves every backend


class Kernels:
    """The ops of one overload, by name; `define` adds the ``_fwd`` ones."""

    def __init__(self, overload: str):
        for name in _PARTS:
            setattr(self, name, getattr(getattr(torch.ops.pyops, name), overload))
        for name in _SMALL:
            setattr(self, name, getattr(torch.ops.pyops, name).default)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable: ...


KERNELS = {overload: Kernels(overload) for overload in ("default", "triton")}


class Norm(NamedTuple):
    """Batch norm as the kernels take it."""

    statistics: Tensor  # [3, C]
    affine: Tensor  # [3, C]: mean, scale, bias
    group: str

    @staticmethod
    def of(k: Kernels, norm: Tensor | None, weight: Tensor | None, bias: Tensor | None, group: str) -> Norm | None:
        return None if norm is None else Norm(norm, k.channel_affine(norm, weight, bias), group)

    def terms(self, k: Kernels, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what the batch statistics' share takes from the input's gradient: `channel_grad`'s terms; weight's gradient; bias's)"""
        if not self.group:
            return k.channel_terms(sums, self.statistics, self.affine)
        own = k.channel_terms(sums, self.statistics, self.affine)
        return k.channel_terms(_groups.summed(sums, self.group), self.statistics, self.affine)[0], *own[1:]


def _nothing(like: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) for _ in range(count))


def _affine(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.affine


def backward_of_input(k, grad, input, norm: Norm | None, gate, offset, activation, slope):
    """(the input's gradient, written over `grad`; weight's; bias's) for the gradient of what `channel_apply` made of input."""
    if norm is None:
        if activation or gate is not None or offset is not None:
            k.channel_grad_(grad, input, None, None, None, None, gate, offset, activation, slope)
        return grad, *_nothing(input, 2)
    sums = k.channel_reduce(grad, input, norm.affine, None, None, gate, offset, activation, slope)
    terms, *grads = norm.terms(k, sums)
    k.channel_grad_(grad, input, norm.affine, terms, None, None, gate, offset, activation, slope)
    return grad, *grads


# ---------------------------------------------------------------------------------------------------------- batch norm + activation


def _batch_norm_act(k, input, norm, weight, bias, keep, residual, activation, slope, group):
    return k.channel_apply(input, k.channel_affine(norm, weight, bias), keep, residual, None, None, activation, slope)


def _batch_norm_act_backward(k, grad, input, norm, weight, bias, keep, residual, activation, slope, group, needs_residual):
    norm = Norm.of(k, norm, weight, bias, group)
    sums = k.channel_reduce(grad, input, norm.affine, keep, residual, None, None, activation, slope)
    terms, *grads = norm.terms(k, sums)
    rest = (keep, residual, None, None, activation, slope, needs_residual and activation != 0)
    grad_input, grad_residual = k.channel_grad(grad, input, norm.affine, terms, *rest)
    return grad_input, *grads, grad_residual


# ------------------------------------------------------------------------------------------------------------ depthwise convolution


def _depthwise(k, input, weight, norm, bn_weight, bn_bias, stride, padding, dilation, activation, slope, group):
    norm = Norm.of(k, norm, bn_weight, bn_bias, group)
    if norm is None and activation == 0:
        output, _ = k.depthwise_infer(input, weight, None, None, stride, padding, dilation, 0, 0.0, False)
    else:
        affine = _channel_ops.identity(input) if norm is None else norm.affine
        output = k.depthwise_after(input, affine, activation, slope, weight, stride, padding, dilation)
    return output, k.channel_moments(output)


def _depthwise_backward(k, grad, input, weight, norm, bn_weight, bn_bias, stride, padding, dilation, activation, slope, group):
    norm = Norm.of(k, norm, bn_weight, bn_bias, group)
    if norm is None and activation == 0:
        grad_input, grad_weight, *_ = k.depthwise_bwd(grad, None, input, weight, None, None, stride, padding, dilation, 0, 0.0, True, True)
        return grad_input, grad_weight, *_nothing(input, 2)
    affine = _channel_ops.identity(input) if norm is None else norm.affine
    found, grad_weight = k.depthwise_after_bwd(grad, input, affine, activation, slope, weight, stride, padding, dilation)
    grad_input, *grads = backward_of_input(k, found, input, norm, None, None, activation, slope)
    return grad_input, grad_weight, *grads


# ----------------------------------------------------------------------------------- 1x1 convolution, perhaps after squeeze-excitation


class Squeeze(NamedTuple):
    """Squeeze-excitation's two layers in the vectors' dtype."""

    fc1: Tensor  # [S, C]
    bias1: Tensor
    fc2: Tensor  # [C, S]
    bias2: Tensor
    activation: int
    gate_activation: int

    def run(self, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(before the first activation, before the second, gate)"""
        first = F.linear(means, self.fc1, self.bias1)
        second = F.linear(_activations.apply(first, self.activation, 0.0), self.fc2, self.bias2)
        return first, second, _activations.apply(second, self.gate_activation, 0.0)

    def backward(self, grad_gate: Tensor, means: Tensor) -> tuple[Tensor, ...]:
        """Gradients of (means, fc1, bias1, fc2, bias2)."""
        first, second, _ = self.run(means)
        hidden = _activations.apply(first, self.activation, 0.0)
        grad_second = _activations.apply_backward(grad_gate, second, self.gate_activation, 0.0)
        grad_first = _activations.apply_backward(grad_second @ self.fc2, first, self.activation, 0.0)
        return (
            grad_first @ self.fc1, grad_first.t() @ means, grad_first.sum(0), grad_second.t() @ hidden, grad_second.sum(0)
        )  # fmt: skip


def positions(image: Tensor) -> int:
    return max(1, image.shape[2] * image.shape[3])


def _pointwise(
    k, input, weight, norm, bn_weight, bn_bias, fc1, bias1, fc2, bias2, activation, slope, squeeze_activation, gate_activation, group
):  # fmt: skip
    norm = Norm.of(k, norm, bn_weight, bn_bias, group)
    gate, means = None, input.new_empty(0, dtype=_channel_ops.vector_dtype(input.dtype))
    if fc1 is not None:
        means = k.channel_sums(input, None, _affine(norm), None, None, activation, slope) / positions(input)
        gate = Squeeze(fc1, bias1, fc2, bias2, squeeze_activation, gate_activation).run(means)[2]
    tf32 = _pointwise_ops.tf32_allowed(input)
    run = k.pointwise_run(input, weight, None, _affine(norm), gate, activation, slope, None, None, None, 0, 0.0, True, tf32)
    return *run, means


def _pointwise_backward(
    k, grad, input, weight, norm, bn_weight, bn_bias, fc1, bias1, fc2, bias2, means, activation, slope, squeeze_activation,
    gate_activation, group, needs_input,
):  # fmt: skip
    norm = Norm.of(k, norm, bn_weight, bn_bias, group)
    squeeze = None if fc1 is None else Squeeze(fc1, bias1, fc2, bias2, squeeze_activation, gate_activation)
    gate = None if squeeze is None else squeeze.run(means)[2]
    # the CPU's one pass is for float32: 16-bit products are faster in PyTorch's GEMM
    fused = input.dtype == torch.float32 or not input.is_cpu
    back = k.pointwise_back if fused else _composed_ops.compose_pointwise_back
    da, grad_weight, grad_gate = back(grad, input, weight, _affine(norm), gate, activation, slope, needs_input, squeeze is not None)
    if not needs_input:  # the first layer of a network
        return da, grad_weight, *_nothing(input, 6)
    offset, layers = None, _nothing(input, 4)
    if squeeze is not None:
        grad_means, *found = squeeze.backward(grad_gate, means)
        offset, layers = grad_means / positions(input), tuple(found)
    grad_input, *grads = backward_of_input(k, da, input, norm, gate, offset, activation, slope)
    return grad_input, grad_weight, *grads, *layers


# ------------------------------------------------------------------------------------------------------------------- registration


def _norm_vectors(input: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    if norm is None:
        return input.new_empty(0), input.new_empty(0)
    return vector(input, input.shape[1]), vector(input, input.shape[1])


def _fake_batch_norm_act_backward(grad, input, *options):
    with_residual = options[-1] and options[5] != 0
    C = input.shape[1]
    return image_like(input), vector(input, C), vector(input, C), image_like(input) if with_residual else input.new_empty(0)


def _fake_depthwise(input, weight, norm, bn_weight, bn_bias, stride, padding, dilation, *_):
    size = _depthwise_ops.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return image_like(input, *input.shape[:2], *size), vector(input, 2, input.shape[1])


def _fake_depthwise_backward(grad, input, weight, norm, *_):
    return image_like(input), torch.empty_like(weight, memory_format=torch.contiguous_format), *_norm_vectors(input, norm)


def _fake_pointwise(input, weight, norm, bn_weight, bn_bias, fc1, *_):
    N, C, H, W = input.shape
    O = weight.shape[0]
    return image_like(input, N, O, H, W), vector(input, 2, O), vector(input, *((0,) if fc1 is None else (N, C)))


def _fake_pointwise_backward(grad, input, weight, norm, bn_weight, bn_bias, fc1, bias1, fc2, bias2, *options):
    if not options[-1]:
        return input.new_empty(0), torch.empty_like(weight), *_nothing(input, 6)
    layers = _nothing(input, 4) if fc1 is None else tuple(torch.empty_like(t) for t in (fc1, bias1, fc2, bias2))
    return image_like(input), torch.empty_like(weight), *_norm_vectors(input, norm), *layers


def refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError('gradients of gradients: this kernel has none; ask for backend="eager" (create_graph=True needs it)')


def wanted(ctx, grads) -> list:
    """Each gradient where it is asked for and exists; the input's may be of no images."""
    pairs = zip(ctx.needs_input_grad, grads, strict=False)
    return [g if need and (g.numel() or not index) else None for index, (need, g) in enumerate(pairs)]


def _composed(function, k: Kernels):
    """`function` on some kernels; the dtypes within are its own business, whatever autocast says outside."""

    def call(*args):
        device = args[0].device.type
        if not _conv_call.is_autocast(device):
            return function(k, *args)
        with torch.autocast(device, enabled=False):
            return function(k, *args)

    return call


def _direct(name: str, forward, run_backward, setup_context, autograd, differentiable: int) -> Callable:
    """The op as a function that torch.library's own autograd (about 0.1 ms a step) does not stand in the way of; not for the compiler."""

    def forward_static(ctx, *args):
        output = forward(*args)
        setup_context(ctx, args, output)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[differentiable:])
        return output

    body = dict(forward=staticmethod(forward_static), backward=staticmethod(lambda ctx, *grads: autograd(ctx, run_backward, *grads)))
    function: Any = type(f"pyops_{name}", (torch.autograd.Function,), body)
    return function.apply


def _either(registered, direct) -> Callable:
    return lambda *args: registered(*args) if torch.compiler.is_compiling() or is_sharded(args[0]) else direct(*args)


def define(name: str, schema: str, results: str, fake, forward, setup_context, autograd, backward: tuple, differentiable: int = 1) -> None:
    """A differentiable op and its backward op, for both overloads. `differentiable`: how many of the results carry gradients."""
    backward_schema, fake_backward, run_backward = backward
    for overload in ("default", "triton"):
        k = KERNELS[overload]
        compose, compose_backward = _composed(forward, k), _composed(run_backward, k)
        direct = _direct(name, compose, compose_backward, setup_context, autograd, differentiable)
        plain = overload == "default"
        overloads = ("" if plain else overload,)
        _library.define(
            f"{name}_bwd", backward_schema, fake=fake_backward, reference=compose_backward if plain else None, overloads=overloads
        )
        op = getattr(getattr(torch.ops.pyops, f"{name}_bwd"), overload)
        _library.define(
            f"{name}_fwd",
            f"{schema} -> {results}",
            fake=fake,
            reference=compose if plain else None,
            setup_context=setup_context,
            backward=lambda ctx, *grads, op=op: autograd(ctx, op, *grads),
            overloads=overloads,
        )
        registered = getattr(getattr(torch.ops.pyops, f"{name}_fwd"), overload)
        setattr(k, f"{name}_fwd", _either(registered, direct))
        if not plain:
            _library.implement(f"{name}_fwd.triton", compose, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
            _library.implement(f"{name}_bwd.triton", compose_backward, "CUDA", "CPU")


def _save(tensors: int):
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors])

    return setup_context


def _setup_batch_norm_act(ctx, inputs, output):
    *tensors, residual = inputs[:6]
    ctx.options = inputs[6:]
    ctx.save_for_backward(*tensors, None if ctx.options[0] == 0 else residual)  # no activation: nobody reads it again


def _autograd_batch_norm_act(ctx, op, grad):
    refuse_second_order()
    saved = ctx.saved_tensors  # once: hooks on saved tensors (checkpointing) unpack at every look
    found = list(op(grad, *saved, *ctx.options, ctx.needs_input_grad[5]))
    if ctx.needs_input_grad[5] and ctx.options[0] == 0:  # without an activation the residual's gradient is the incoming one
        found[3] = grad
    grad_input, grad_weight, grad_bias, grad_residual = found
    weight, bias = saved[2:4]
    grads = (
        grad_input, None,
        None if weight is None else grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype),
        None, grad_residual if ctx.needs_input_grad[5] else None,
    )  # fmt: skip
    return *grads, None, None, None


def _autograd_depthwise(ctx, op, grad, _):
    refuse_second_order()
    grad_input, grad_weight, grad_scale, grad_bias = op(grad, *ctx.saved_tensors, *ctx.options)
    return *wanted(ctx, (grad_input, grad_weight, grad_input.new_empty(0), grad_scale, grad_bias)), *[None] * 6


def _setup_pointwise(ctx, inputs, output):
    ctx.options = inputs[9:]
    ctx.save_for_backward(*inputs[:9], output[2])


def _autograd_pointwise(ctx, op, grad, *_):
    refuse_second_order()
    first = op(grad, *ctx.saved_tensors, *ctx.options, any(ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6, 7, 8)))
    return *wanted(ctx, (*first[:2], grad.new_empty(0), *first[2:])), *[None] * 5


_NORM = "Tensor? norm, Tensor? bn_weight, Tensor? bn_bias"
_TAIL = "int activation, float slope, str group"
_BATCH_NORM = f"Tensor input, Tensor norm, Tensor? weight, Tensor? bias, Tensor? keep, Tensor? residual, {_TAIL}"
define(
    "batch_norm_act", f"({_BATCH_NORM})", "Tensor",
    lambda input, *_: image_like(input), _batch_norm_act, _setup_batch_norm_act, _autograd_batch_norm_act,
    (
        f"(Tensor grad, {_BATCH_NORM}, bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_batch_norm_act_backward, _batch_norm_act_backward,
    ),
)  # fmt: skip
_DEPTHWISE = f"Tensor input, Tensor weight, {_NORM}, int[] stride, int[] padding, int[] dilation, {_TAIL}"
define(
    "depthwise_train", f"({_DEPTHWISE})", "(Tensor, Tensor)",
    _fake_depthwise, _depthwise, _save(5), _autograd_depthwise,
    (f"(Tensor grad, {_DEPTHWISE}) -> (Tensor, Tensor, Tensor, Tensor)", _fake_depthwise_backward, _depthwise_backward),
)  # fmt: skip
_LAYERS = "Tensor? fc1, Tensor? bias1, Tensor? fc2, Tensor? bias2"
_GATES = "int activation, float slope, int squeeze_activation, int gate_activation, str group"
define(
    "pointwise_train", f"(Tensor input, Tensor weight, {_NORM}, {_LAYERS}, {_GATES})", "(Tensor, Tensor, Tensor)",
    _fake_pointwise, _pointwise, _setup_pointwise, _autograd_pointwise,
    (
        f"(Tensor grad, Tensor input, Tensor weight, {_NORM}, {_LAYERS}, Tensor means, {_GATES}, bool needs_input) "
        f"-> ({', '.join(['Tensor'] * 8)})",
        _fake_pointwise_backward, _pointwise_backward,
    ),
)  # fmt: skip
