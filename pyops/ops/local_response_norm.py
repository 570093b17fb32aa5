"""Local response normalisation across channels, after a ReLU where asked for, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _conv_call, _fused_ops, _norm_train
from pyops.ops._sharding import is_sharded

OP = "local_response_norm"
ACTIVATIONS = ("none", "relu")


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    r"""``a / (k + alpha / size * s) ** beta`` with ``a = activation(input)`` and s the sum of ``a ** 2`` over `size` neighbouring channels.

    `torch.nn.functional.local_response_norm`, with the ReLU that stands before it in AlexNet, ZFNet and GoogLeNet.

    Args:
        input: ``[N, C, *]`` with one trailing dimension or more; float32, bfloat16, float16 or float64 (the last on "eager" only).
            Contiguous and channels_last inputs are read as they are, others copied.
        size: channels of a window, c - size // 2 to c + (size - 1) // 2; those that do not exist count as zeros.
        alpha, beta, k: the factor, the exponent, the term added.
        activation: "none" or "relu", before the normalisation.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output of input's shape, dtype and layout (under autocast the dtype that PyTorch's function gives). Only input is saved for
        backward. The same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype or value, or a named backend that cannot run the call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Krizhevsky, Sutskever and Hinton, 2012.
    """
    _check(input, size, alpha, beta, k, activation)
    device = input.device.type
    if _conv_call.is_autocast(device) and (device == "cuda" or input.dim() > 3):  # PyTorch widens within: pow, avg_pool3d
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    name = _conv_call.choose(OP, backend, input)
    relu = activation == "relu"
    if name == "eager":
        return _eager(input.relu() if relu else input, size, alpha, beta, k)
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    options = size, float(alpha), float(beta), float(k), relu
    if _conv_call.needs_grad(input) or is_sharded(input):
        return kernels.lrn_fwd(input, *options)
    return _norm_train.lrn(kernels, input, *options)


def _eager(a: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if a.is_cpu and a.dtype in (torch.bfloat16, torch.float16):  # avg_pool3d has none of these, avg_pool2d has
        return F.local_response_norm(a.flatten(2), size, alpha, beta, k).reshape(a.shape)
    return F.local_response_norm(a, size, alpha, beta, k)


def _check(input, size, alpha, beta, k, activation) -> None:
    _conv_call.check_tensor(OP, "input", input, optional=False)
    if input.dim() < 3:
        raise ValueError(f"{OP}: input: expected [N, C] and one more dimension at least, got shape {tuple(input.shape)}")
    if input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    check_options(OP, size, alpha, beta, k, activation)


def check_options(owner: str, size, alpha, beta, k, activation) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{owner}: size: expected an int, got {size!r}")
    if size < 1:
        raise ValueError(f"{owner}: size: expected 1 or more, got {size}")
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{owner}: {name}: expected a number, got {value!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{owner}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _explain(input, size, alpha=1e-4, beta=0.75, k=1.0, *, activation="none", backend=None):
    _check(input, size, alpha, beta, k, activation)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, size {size}"
    return _conv_call.explain(OP, facts, backend, input)


_backends.EXPLAINERS[OP] = _explain
