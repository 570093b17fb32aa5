"""Convolution, batch norm and activation in training: each convolution's output is kept as it is, and whoever reads it applies the rest.

A chain of `convolve` saves the convolutions' outputs and nothing else; `finish` ends it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyops import _backends
from pyops.ops import _activations, _conv_call, _conv_run, _depthwise_ops, _groups, _vendor_conv
from pyops.ops._fused_ops import KERNELS, Kernels
from pyops.ops._vendor_conv import UPSAMPLINGS, Conv, Pool
from pyops.ops.batch_norm_act import constant_statistics, statistics_of


class Pending(NamedTuple):
    """An image that is still to be normalised and activated."""

    image: Tensor
    norm: Tensor | None = None  # _fused_ops' norm
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: int = 0
    group: str = ""


class Gates(NamedTuple):
    """Squeeze-excitation on the way into a 1x1 convolution, as `pointwise_train_fwd` takes it."""

    layers: tuple[Tensor | None, ...] = (None, None, None, None)
    activation: int = 0
    gate_activation: int = 0


def kernels_for(backend: str | None, input: Tensor) -> Kernels | None:
    """The kernels that a training step on `input` runs on; None: PyTorch's own layers."""
    name = _conv_call.choose("ConvBNAct", backend, input)
    return None if name == "eager" else KERNELS[_conv_call.overload(name)]


def gains(parts: Any, backend: str | None, input: Tensor) -> bool:
    """Whether a convolution block alone trains sooner on the kernels than on PyTorch's layers. On a CPU that is so of depthwise and of
    Winograd convolutions and of those with pooling or repeated positions; others took 0.9 to 1.05 of PyTorch's time (2 cores of Zen 4)."""
    around = parts.pool is not None or parts.upsample == UPSAMPLINGS.index("nearest")
    shares = _group(parts.norm) != ""  # statistics, for which PyTorch has no kernel on a CPU
    if not input.is_cpu or is_depthwise(parts.conv) or around or shares or _backends.requested(backend) != "auto":
        return True
    return _conv_run.winograd(input, parts.conv.weight, shape_of(parts.conv)._replace(upsample=parts.upsample)) > 0


def takes(conv: nn.Conv2d, input: Tensor) -> bool:
    """Whether kernels convolve such inputs as the layer would: its padding is one of numbers and zeros, the dtypes agree."""
    same = input.dtype == conv.weight.dtype or _conv_call.is_autocast(input.device.type)
    return same and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def is_pointwise(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
    return plain and conv.groups == 1


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def convolve(k: Kernels, conv: Any, norm: Any, activation: str, input: Pending, gates: Gates | None = None, upsample: int = 0) -> Pending:
    """conv of the finished `input`, perhaps enlarged, with its own batch norm and activation pending."""
    image, *before = input
    statistics, weight, bias, number, group = before
    filter = conv.weight.to(image.dtype)
    if upsample:
        output, moments = _convolve_dense(k, conv, norm, finish(k, input), filter, upsample)
    elif is_pointwise(conv):
        gates = gates or Gates()
        place = (statistics, weight, bias, *gates.layers, number, 0.01, gates.activation, gates.gate_activation, group)
        output, moments, _ = k.pointwise_train_fwd(image, filter.flatten(1), *place)
    elif is_depthwise(conv):
        shape = list(conv.stride), list(conv.padding), list(conv.dilation)
        if min(_depthwise_ops.output_size(image.shape[2:], conv.kernel_size, *shape)) < 1:
            raise ValueError(f"ConvBNAct: input: {tuple(image.shape[2:])} is too small for {conv}")
        output, moments = k.depthwise_train_fwd(image, filter, statistics, weight, bias, *shape, number, 0.01, group)
    else:
        output, moments = _convolve_dense(k, conv, norm, finish(k, input), filter)
    own = _group(norm)
    return Pending(output, _statistics(norm, moments, output, own), norm.weight, norm.bias, _activations.NAMES.index(activation), own)


def shape_of(conv: Any) -> Conv:
    return Conv(conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolve_dense(k: Kernels, conv: Any, norm: Any, image: Tensor, filter: Tensor, upsample: int = 0) -> tuple[Tensor, Tensor | None]:
    call = shape_of(conv)._replace(upsample=upsample)
    seen = _vendor_conv.seen(image.shape, call)
    size = _depthwise_ops.output_size(seen[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if min(size) < 1:
        raise ValueError(f"ConvBNAct: input: {tuple(image.shape[2:])} is too small for {conv}")
    on_gpu = not image.is_cpu or k is KERNELS["triton"]
    batch = takes_batch(norm)
    output, moments = _conv_run.convolve(k, image, filter, None, call, size, moments=batch, dense=on_gpu)
    return output, k.channel_moments(output.detach()) if moments is None and batch else moments


def finish(k: Kernels, pending: Pending, keep: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``activation(batch_norm(image) * keep + residual)``"""
    image, norm, weight, bias, activation, group = pending
    if norm is None:
        return image
    return k.batch_norm_act_fwd(image, norm, weight, bias, keep, residual, activation, 0.01, group)


def finish_pooled(k: Kernels, pending: Pending, pool: Pool | None) -> Tensor:
    """``pool(activation(batch_norm(image)))``"""
    image, norm, weight, bias, activation, group = pending
    if pool is None:
        return finish(k, pending)
    if any(n + 2 * p < size for n, size, p in zip(image.shape[2:], pool.kernel, pool.padding, strict=True)):
        raise ValueError(f"ConvBNAct: input: too small, {pool.kernel} windows of an image of {tuple(image.shape[2:])}")
    return k.batch_norm_act_pool_fwd(image, norm, weight, bias, *_conv_run.windows(pool), activation, 0.01, group)[0]


def _group(norm: nn.Module) -> str:
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not torch.distributed.is_initialized():
        return ""
    return _groups.name_of(norm.process_group or torch.distributed.group.WORLD)


def takes_batch(norm: Any) -> bool:
    """Whether it normalises by the batch's statistics now."""
    return norm.running_mean is None or (norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm))


def _statistics(norm: Any, moments: Any, output: Tensor, group: str) -> Tensor:
    """Batch statistics of `output` in training, with the running ones moved as torch's BatchNorm2d moves them; else those."""
    if not takes_batch(norm):
        return constant_statistics(norm.running_mean, norm.running_var, norm.eps, output)
    return batch_statistics(norm, moments, output.numel() // output.shape[1], group)


def batch_statistics(norm: Any, moments: Tensor, count: int, group: str = "") -> Tensor:
    factor = norm.momentum
    tracks = norm.training and norm.track_running_stats
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        factor = 1.0 / norm.num_batches_tracked if factor is None else factor
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    if tracks and norm.num_batches_tracked is None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(norm.running_mean)  # else the counter's version says that they moved
    return statistics_of(moments, count, norm.eps, group, running, factor)
