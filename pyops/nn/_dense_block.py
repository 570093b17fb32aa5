"""Training of DenseNet's blocks: one result that every layer reads a prefix of and adds to, and one backward through all of it.

Saved are the result, each layer's output of its 1x1 convolution, and statistics: memory grows by what a layer adds. What batch norm and
ReLU make of a prefix is computed on the way into the 1x1 convolution, and again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyops.nn import _training
from pyops.nn._derived import has_hooks
from pyops.ops import _activations, _channel_ops, _composed_ops, _conv_call, _fused_ops, _pointwise_ops, _winograd_ops
from pyops.ops._fused_ops import KERNELS, Kernels, Norm
from pyops.ops.batch_norm_act import check_count

RELU = _activations.NAMES.index("relu")
_PARAMETERS = 6  # of a layer: norm1's weight and bias, conv1's weight, norm2's weight and bias, conv2's weight
_CONV = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups of the 3x3


def can_train(name: str, layers: list[Any], input: Tensor) -> bool:
    """Whether `train` stands for the layers: batch statistics in all of them, one dtype, nobody who follows the call op by op."""
    if name == "eager" or torch.compiler.is_compiling() or _conv_call.is_recorded() or not torch.is_grad_enabled():
        return False
    if not all(layer.is_standard() and not has_hooks(layer) for layer in layers):
        return False
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
    batch = all(norm.training and norm.weight is not None for norm in norms) and not any(layer.drop_rate for layer in layers)
    if _conv_call.is_autocast(input.device.type):  # PyTorch's layers would give input's dtype where that is the wider
        return batch and input.dtype == torch.get_autocast_dtype(input.device.type)
    return batch and all(p.dtype == input.dtype for layer in layers for p in (layer.conv1.weight, layer.conv2.weight))


def train(k: Kernels, layers: list[Any], input: Tensor) -> Tensor:
    """The block's output; the layers' running statistics move as PyTorch's do."""
    check_count(input.shape[0] * input.shape[2] * input.shape[3])
    parameters = [p for layer in layers for p in _parameters(layer)]
    with torch.autocast(input.device.type, enabled=False):
        output, *statistics = _DenseBlock.apply(k, [(layer.norm1.eps, layer.norm2.eps) for layer in layers], input, *parameters)
    count = input.numel() // input.shape[1]
    for layer, (first, second) in zip(layers, zip(statistics[::2], statistics[1::2], strict=True), strict=True):
        for norm, moments in ((layer.norm1, first), (layer.norm2, second)):
            _training.batch_statistics(norm, moments, count)
    return _conv_call.in_layout_of(output, input)


def _parameters(layer: Any) -> tuple[Tensor, ...]:
    return (layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, layer.norm2.weight, layer.norm2.bias, layer.conv2.weight)


class _Layer:
    """What a layer's forward and backward share."""

    def __init__(self, k: Kernels, parameters: tuple[Any, ...], eps: tuple[float, float], dtype: torch.dtype):
        self.k, self.eps = k, eps
        self.norm1, self.norm2 = (parameters[0], parameters[1]), (parameters[3], parameters[4])
        self.weight1, self.weight2 = parameters[2].to(dtype).flatten(1), parameters[5].to(dtype)

    def norm(self, which: int, moments: Tensor, count: int) -> Norm:
        statistics = self.k.channel_norm(moments, count, self.eps[which], None, None, 0.0)
        weight, bias = (self.norm1, self.norm2)[which]
        found = Norm.of(self.k, statistics, weight, bias, "")
        assert found is not None
        return found


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Kernels, eps: list[tuple[float, float]], input: Tensor, *parameters: Any):
        N, channels, H, W = input.shape
        tf32, count = _pointwise_ops.tf32_allowed(input), N * H * W
        growths = [parameters[i].shape[0] for i in range(5, len(parameters), _PARAMETERS)]
        total = channels + sum(growths)
        features = _channel_ops.image_like(input, N, total, H, W)
        moments = _channel_ops.vector(input, 2, total)
        features[:, :channels].copy_(input)
        moments[:, :channels] = k.channel_moments(features[:, :channels])
        mids, statistics = [], []
        for i, growth in enumerate(growths):
            layer = _Layer(k, parameters[_PARAMETERS * i : _PARAMETERS * (i + 1)], eps[i], input.dtype)
            first = moments[:, :channels].contiguous()
            affine = layer.norm(0, first, count).affine
            before, after = (None, affine, None, RELU, 0.0), (None, None, None, 0, 0.0)
            mid, second = k.pointwise_run(features[:, :channels], layer.weight1, *before, *after, True, tf32)
            a = k.channel_apply(mid, layer.norm(1, second, count).affine, None, None, None, None, RELU, 0.0)
            new, _ = k.conv_run(a, layer.weight2, None, None, *_CONV, 0, 0.0, False, False, tf32)
            features[:, channels : channels + growth].copy_(new)
            moments[:, channels : channels + growth] = k.channel_moments(new)
            mids.append(mid)
            statistics += [first, second]
            channels += growth
        ctx.k, ctx.eps, ctx.growths = k, eps, growths
        ctx.save_for_backward(features, moments, *mids, *statistics[1::2], *parameters)
        ctx.mark_non_differentiable(*statistics)
        return features, *statistics

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        _fused_ops.refuse_second_order()
        k, layers = ctx.k, len(ctx.growths)
        features, moments, *rest = ctx.saved_tensors
        mids, seconds, parameters = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        count, tf32 = features.numel() // features.shape[1], _pointwise_ops.tf32_allowed(features)
        grad = grad.clone(memory_format=torch.channels_last)
        grads: list[Any] = [None] * len(parameters)
        fused = features.dtype == torch.float32 or not features.is_cpu
        channels = features.shape[1]
        for i in reversed(range(layers)):
            at = slice(_PARAMETERS * i, _PARAMETERS * (i + 1))
            layer = _Layer(k, parameters[at], ctx.eps[i], features.dtype)
            channels -= ctx.growths[i]
            new = grad[:, channels : channels + ctx.growths[i]].contiguous(memory_format=torch.channels_last)
            norm1 = layer.norm(0, moments[:, :channels].contiguous(), count)
            norm2 = layer.norm(1, seconds[i], count)
            a = k.channel_apply(mids[i], norm2.affine, None, None, None, None, RELU, 0.0)
            da, grad_weight2 = _conv_backward(layer, new, a, tf32, ctx.needs_input_grad[3 + at.stop - 1])
            del a
            dmid, *second = _fused_ops.backward_of_input(k, da, mids[i], norm2, None, None, RELU, 0.0)
            prefix = features[:, :channels].contiguous(memory_format=torch.channels_last)
            back = k.pointwise_back if fused else _composed_ops.compose_pointwise_back
            da, grad_weight1, _ = back(dmid, prefix, layer.weight1, norm1.affine, None, RELU, 0.0, True, False)
            dprefix, *first = _fused_ops.backward_of_input(k, da, prefix, norm1, None, None, RELU, 0.0)
            grad[:, :channels].add_(dprefix)
            found = (*first, grad_weight1.view(parameters[at][2].shape), *second, grad_weight2)
            grads[at] = [None if p is None or g is None else g.to(p.dtype) for g, p in zip(found, parameters[at], strict=True)]
        return None, None, grad[:, :channels].contiguous(memory_format=torch.channels_last), *grads


def _conv_backward(layer: _Layer, grad: Tensor, a: Tensor, tf32: bool, needs_weight: bool) -> tuple[Tensor, Tensor | None]:
    """(gradient of a, of the filter) of the 3x3 convolution."""
    k, weight = layer.k, layer.weight2
    if (
        a.is_cpu
        and k is KERNELS["default"]
        and not _winograd_ops.size_of_tile(grad.shape, weight.transpose(0, 1), *_CONV, False, grad.dtype)
    ):
        found = torch.ops.aten.convolution_backward(grad, a, weight, None, *_CONV[:3], False, [0, 0], _CONV[3], [True, needs_weight, False])
        return found[0].contiguous(memory_format=torch.channels_last), found[1]
    size = list(a.shape[2:])
    da, _ = k.conv_transpose_run(grad, weight, None, None, *_CONV[:2], size, *_CONV[2:], 0, 0.0, False, False, tf32)
    return da, k.conv_wgrad(grad, a, [3, 3], *_CONV, tf32) if needs_weight else None
