"""LayerNorm over the channels of an image, in either memory layout and without permuting it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _conv_call, _fused_ops, _norm_train
from pyops.ops._sharding import is_sharded

OP = "layer_norm_2d"


def layer_norm_2d(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    r"""``(input - mean) / sqrt(variance + eps) * weight + bias`` with mean and variance over the channels at each position.

    What ConvNeXt and its kin write as ``permute``, `torch.nn.functional.layer_norm`, ``permute``.

    Args:
        input: ``[N, C, H, W]``; float32, bfloat16, float16 or float64 (the last on "eager" only). Contiguous and channels_last inputs
            are read as they are, others copied.
        weight, bias: ``[C]`` of input's dtype or float32, or None.
        eps: added to the variance.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output of input's shape, dtype and layout (under autocast the dtype that PyTorch's function gives). Only input and weight are
        saved for backward. Sums are merged in a fixed order: the same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype or device, or a named backend that cannot run the call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Ba, Kiros and Hinton, 2016; Liu et al., 2022 (over the channels of images).
    """
    _check(input, weight, bias)
    if input.device.type == "cuda" and _conv_call.is_autocast("cuda"):  # autocast widens PyTorch's there; on CPUs it does not
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    live = _conv_call.needs_grad(input, weight, bias)
    name = _conv_call.choose(OP, backend, input, _eager_first(input, live))
    if name == "eager":
        return _eager(input, weight, bias, eps)
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if live or is_sharded(input):
        return kernels.layer_norm_fwd(input, weight, bias, float(eps))
    return _norm_train.layer_norm(kernels, input, weight, bias, float(eps))


def _eager_first(input: Tensor, live: bool) -> bool:
    """Where channels are neighbours PyTorch's op needs no copies: 0.55 to 1.0 of its speed with gradients, 0.65 to 0.9 without below 400
    positions, 1.1 to 1.8 from 784 on. Contiguous images: 1.0 to 4.0 without, 0.95 to 3.1 with (float32, 2 cores of Zen 4)."""
    return input.stride(1) == 1 and (live or input.numel() < 700 * input.shape[1])


def _eager(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = input
    if any(t is not None and t.dtype != input.dtype for t in (weight, bias)):  # torch wants one dtype, but on CPUs
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        weight, bias = _conv_call.as_vector(weight, input), _conv_call.as_vector(bias, input)
    y = F.layer_norm(wide.permute(0, 2, 3, 1), (input.shape[1],), weight, bias, eps).permute(0, 3, 1, 2).to(input.dtype)
    return y if input.stride(1) == 1 else y.contiguous()


def _check(input, weight, bias) -> None:
    _conv_call.check_input(OP, input)
    if input.shape[1] == 0:
        raise ValueError(f"{OP}: input: expected 1 channel or more, got shape {tuple(input.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        _conv_call.check_tensor(OP, name, t, input, (input.shape[1],))
        if t is not None and t.dtype not in (input.dtype, torch.float32) and not _conv_call.is_autocast(input.device.type):
            raise ValueError(f"{OP}: {name}: expected float32 or input's dtype {input.dtype}, got {t.dtype}")


def _explain(input, weight=None, bias=None, eps=1e-5, *, backend=None):
    _check(input, weight, bias)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}"
    return _conv_call.explain(OP, facts, backend, input, _eager_first(input, _conv_call.needs_grad(input, weight, bias)))


_backends.EXPLAINERS[OP] = _explain
