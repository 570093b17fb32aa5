"""Batch norm, drop path, residual and activation in two passes over memory each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _channel_ops, _conv_call, _fused_ops, _groups

OP = "batch_norm_act"


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    r"""``activation(batch_norm(input) * keep + residual)``.

    Args:
        input: ``[N, C, H, W]``, ``[N, C]``, ``[N, C, L]`` or ``[N, C, D, H, W]``; float32, bfloat16, float16 or float64 (the last on
            "eager" only). channels_last is the fast layout; any other is copied to it, and the output comes back in input's.
        running_mean, running_var: ``[C]``, updated in place with ``training``; None for both: batch statistics always, none kept.
        weight, bias: ``[C]`` or None.
        training: batch statistics instead of the running ones.
        momentum: share of the new statistics in the running ones; None: their plain average over all batches, which needs
            num_batches_tracked.
        eps: added to the variance.
        num_batches_tracked: integer scalar, incremented with ``training``.
        residual: input's shape and dtype, added before the activation.
        keep: ``[N]``, multiplies each sample before the residual is added: drop path with 0 or 1 / (1 - p). Not differentiated.
        activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (with erf), "sigmoid", "leaky_relu", "tanh" or "hardsigmoid".
        negative_slope: leaky_relu's.
        process_group: a `torch.distributed.ProcessGroup` whose processes share batch statistics (SyncBN); batches may differ in size.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output of input's shape and dtype. Only input (and residual, under an activation) is saved for backward. Statistics are
        merged in a fixed order: the same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, one value per channel in training, or a
        named backend that cannot run the call. NotImplementedError: for gradients of gradients, but on "eager".

    Source: Ioffe and Szegedy, 2015; Huang et al., 2016 (drop path); Chan, Golub and LeVeque, 1979 (merging statistics).
    """
    use_batch = _check(input, running_mean, running_var, weight, bias, training, momentum, num_batches_tracked, residual, keep)
    number = _activations.number(OP, activation)
    group = _groups.name_of(process_group)
    if use_batch and not group:
        check_count(input.numel() // max(1, input.shape[1]))
    name = _conv_call.choose(OP, backend, input, _eager_first(input) and not group)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    image = input if input.dim() == 4 else _as_image(input)
    beside = None if residual is None else residual if input.dim() == 4 else _as_image(residual)
    running = (running_mean, running_var) if training else (None, None)
    factor = 1.0 / num_batches_tracked if training and momentum is None and num_batches_tracked is not None else momentum
    if name == "eager" and not group:
        output = _eager(image, running_mean, running_var, weight, bias, use_batch, training, factor, eps, beside, keep)
        output = _activations.apply(output, number, negative_slope)
        return output if input.dim() == 4 else output.reshape(input.shape)
    if name == "eager":
        raise ValueError(f"{OP}: process_group: needs pyops' kernels; torch.nn.SyncBatchNorm is PyTorch's own")
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if use_batch:
        count = image.numel() // max(1, image.shape[1])
        norm = statistics_of(kernels.channel_moments(image.detach()), count, eps, group, running, factor)
    else:
        norm = constant_statistics(running_mean, running_var, eps, image)
    keep = _conv_call.as_vector(keep, image)
    output = kernels.batch_norm_act_fwd(image, norm, weight, bias, keep, beside, number, negative_slope, group)
    return _conv_call.in_layout_of(output, image) if input.dim() == 4 else output.reshape(input.shape)


def _eager_first(input: Tensor) -> bool:
    """0.7 to 1.0 of PyTorch's speed in training below 10^6 values, 1.1 to 1.7 above (2 cores of Zen 4)."""
    return input.numel() < 10**6


def statistics_of(moments: Tensor, count: int, eps: float, group: str, running: tuple, factor) -> Tensor:
    """`_fused_ops`' norm of a batch's moments; running (mean, var) move towards them by `factor`, with the unbiased variance.

    Raises ValueError for a single value per channel, as torch.nn.functional.batch_norm does.
    """
    if not group:
        check_count(count)
    running = (None, None) if factor is None or not count else running
    moments = moments.detach()
    if not group and not isinstance(factor, Tensor):
        return torch.ops.pyops.channel_norm.default(moments, count, eps, *running, factor or 0.0)
    total: Any = count
    if group:
        moments, total = _groups.merged_moments(moments, count, group)
    mean, squares = moments
    if running[0] is not None:
        for kept, new in zip(running, (mean, squares / (total - 1)), strict=True):
            kept.copy_(kept + (new - kept) * factor)
    inverse = (torch.as_tensor(1.0, device=mean.device) / total).to(mean.dtype).expand_as(mean)
    return torch.stack([mean, torch.rsqrt(squares * inverse + eps), inverse])


def check_count(count: int) -> None:
    """Raises ValueError for a single value per channel, of which there is no variance."""
    if count == 1:
        raise ValueError(f"{OP}: input: expected more than 1 value per channel when training")


def constant_statistics(running_mean: Any, running_var: Any, eps: float, like: Tensor) -> Tensor:
    """`_fused_ops`' norm of running statistics, for images such as `like`."""
    kind = _channel_ops.vector_dtype(like.dtype)
    mean = running_mean.to(kind)
    return torch.stack([mean, torch.rsqrt(running_var.to(kind) + eps), torch.zeros_like(mean)])


def _as_image(t: Tensor) -> Tensor:
    return t.reshape(*t.shape[:2], 1, -1 if t.numel() else t.shape[2:].numel()).contiguous(memory_format=torch.channels_last)


def _eager(image, running_mean, running_var, weight, bias, use_batch, training, factor, eps, residual, keep) -> Tensor:
    kind = _channel_ops.vector_dtype(image.dtype) if running_mean is None else running_mean.dtype  # torch wants one dtype for all four
    weight, bias = (None if t is None else t.to(kind) for t in (weight, bias))
    kept_mean, kept_var = (running_mean, running_var) if training or not use_batch else (None, None)
    if use_batch and image.numel() == 0:  # torch has no answer; the kernels' is an empty tensor
        y = image.clone()
    elif use_batch and isinstance(factor, Tensor):  # an average over all batches, without reading the counter
        y = F.batch_norm(image, None, None, weight, bias, True, 0.0, eps)
        moments = _channel_ops._moments(image.detach())
        statistics_of(moments, image.numel() // image.shape[1], eps, "", (running_mean, running_var), factor)
    else:
        y = F.batch_norm(image, kept_mean, kept_var, weight, bias, use_batch, factor or 0.0, eps)
    if keep is not None:
        y = y * keep.detach().to(y.dtype)[:, None, None, None]
    return y if residual is None else y + residual


def _check(input, running_mean, running_var, weight, bias, training, momentum, num_batches_tracked, residual, keep) -> bool:
    """Whether the call takes batch statistics."""
    _conv_call.check_tensor(OP, "input", input, optional=False)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"{OP}: input: expected [N, C] and up to three more dimensions, got shape {tuple(input.shape)}")
    if input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    vectors = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    for name, t in vectors.items():
        _conv_call.check_tensor(OP, name, t, input, (input.shape[1],))
    _conv_call.check_tensor(OP, "residual", residual, input, tuple(input.shape))
    if residual is not None and residual.dtype != input.dtype:
        raise ValueError(f"{OP}: residual: expected input's dtype {input.dtype}, got {residual.dtype}")
    _conv_call.check_tensor(OP, "keep", keep, input, (input.shape[0],))
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{OP}: running_mean, running_var: expected both or neither")
    if training and running_mean is not None and momentum is None and num_batches_tracked is None:
        raise ValueError(f"{OP}: momentum: None averages over all batches and needs num_batches_tracked")
    return training or running_mean is None


def _explain(input, running_mean=None, running_var=None, weight=None, bias=None, training=False, *_, backend=None, **__):
    _check(input, running_mean, running_var, weight, bias, training, 0.0, None, None, None)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}{', training' if training else ''}"
    return _conv_call.explain(OP, facts, backend, input, _eager_first(input))


_backends.EXPLAINERS[OP] = _explain
