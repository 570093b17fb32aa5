"""Cross entropy of a linear layer's logits, which are never held for all rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _channel_ops, _conv_call, _cross_entropy_train, _fused_ops

OP = "linear_cross_entropy"
REDUCTIONS = _cross_entropy_train.REDUCTIONS
FEW = 1 << 19  # logits, of which PyTorch's ops take no longer: 2048 x 256 was a draw, 512 x 2000 took 0.67 of its time (Zen 4, one thread)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""``cross_entropy(y, target)``, ``y = input @ weight.T + bias``, or ``softcap * tanh(y / softcap)`` of it.

    Logits are computed a chunk of rows at a time, up to 32 MiB of them (one row, where that is more); all of them together, a language
    model's largest tensor, are never held.

    Args:
        input: ``[..., C]``; float32, bfloat16, float16 or float64 (the last on "eager" only).
        weight: ``[V, C]`` of input's dtype.
        target: ``[...]``, int64: a class of 0 .. V - 1, or `ignore_index`.
        bias: ``[V]`` of input's dtype, or None.
        ignore_index: the target of rows without loss, which a mean does not count.
        label_smoothing: 0 to 1, the share of the target that all classes have evenly.
        reduction: "mean" (NaN of no row), "sum" or "none".
        softcap: above 0: bounds the logits smoothly; None does not.
        backend: "cpu", "cuda", "triton" or "eager", which holds all logits; None lets pyops choose.

    Returns:
        loss: a scalar, or ``[...]`` for "none"; float32 (float64 for float64). 16-bit logits are rounded as PyTorch's product rounds
        them, what follows is in float32. A call that needs gradients forms them at once for "mean" and "sum" and saves these alone;
        "none" and float16 compute the logits again in backward. The same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype or value, or a named backend that cannot run the call.
        IndexError: for a target out of range, on a CPU; on a GPU the loss is NaN then.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Hsu et al., "Liger Kernel", 2024; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
    """
    check(input, weight, target, bias, ignore_index, label_smoothing, reduction, softcap)
    cast: Any = _conv_call.autocast(input, weight, bias)
    input, weight, bias = cast
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias)]
    name = _choose(backend, input, weight, reduction, any(needs))
    if name == "eager":
        return _eager(input, weight, target, bias, ignore_index, label_smoothing, reduction, softcap)
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    rows, classes = input.reshape(-1, weight.shape[1]), target.reshape(-1)
    options = ignore_index, float(label_smoothing), float(softcap or 0.0), REDUCTIONS.index(reduction), needs
    loss = kernels.linear_cross_entropy_fwd(rows, weight, classes, bias, *options)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _eager(input, weight, target, bias, ignore_index, label_smoothing, reduction, softcap) -> Tensor:
    y = F.linear(input, weight, bias)
    y = y.to(_channel_ops.vector_dtype(y.dtype)).reshape(-1, weight.shape[0])
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    loss = F.cross_entropy(y, target.reshape(-1), ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _order(input: Tensor, weight: Tensor, reduction: str, live: bool) -> tuple[str, ...]:
    """What "auto" tries. PyTorch's ops for logits that are few and, on a GPU or where gradients would compute them again, for those that a
    chunk holds; beyond, memory counts."""
    ours = ("cuda", "triton") if input.device.type == "cuda" else ("cpu",)
    logits = input.numel() // weight.shape[1] * weight.shape[0]
    again = live and not _cross_entropy_train.is_ahead(input.dtype, REDUCTIONS.index(reduction))
    held = (input.is_cuda or again) and logits * input.element_size() <= _cross_entropy_train.CHUNK_BYTES
    return ("eager", *ours) if held or logits < FEW or _conv_call.is_recorded() else (*ours, "eager")


def _unsupported(input: Tensor, backend: str) -> str | None:
    return _conv_call.unsupported(input.device.type, input.dtype, backend)


def _choose(backend: str | None, input: Tensor, weight: Tensor, reduction: str, live: bool) -> str:
    wish = _backends.requested(backend)
    order = _order(input, weight, reduction, live) if wish == "auto" else ()
    name = _backends.select(OP, wish, order, lambda name: _unsupported(input, name))
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, input.device.type, name)
    return name


def check(input, weight, target, bias, ignore_index, label_smoothing, reduction, softcap) -> None:
    _conv_call.check_tensor(OP, "input", input, optional=False)
    if input.dim() < 1 or input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: input: expected [..., C] of float32, bfloat16, float16 or float64, got {input.dtype} {tuple(input.shape)}")
    _conv_call.check_tensor(OP, "weight", weight, input, optional=False)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{OP}: weight: expected [V, {input.shape[-1]}] for input {tuple(input.shape)}, got shape {tuple(weight.shape)}")
    _conv_call.check_tensor(OP, "bias", bias, input, (weight.shape[0],))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != input.dtype and not _conv_call.is_autocast(input.device.type):
            raise ValueError(f"{OP}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")
    _check_target(input, target)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index: expected an int, got {ignore_index!r}")
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if softcap is not None and (not isinstance(softcap, (int, float)) or not softcap > 0):
        raise ValueError(f"{OP}: softcap: expected a number above 0 or None, got {softcap!r}")


def _check_target(input, target) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{OP}: target: expected a Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise ValueError(f"{OP}: target: expected torch.int64, got {target.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{OP}: target: expected shape {tuple(input.shape[:-1])}, got {tuple(target.shape)}")
    if target.device != input.device:
        raise ValueError(f"{OP}: target: expected input's device {input.device}, got {target.device}")


def _explain(
    input, weight, target, bias=None, *, ignore_index=-100, label_smoothing=0.0, reduction="mean", softcap=None, backend=None
):  # fmt: skip
    check(input, weight, target, bias, ignore_index, label_smoothing, reduction, softcap)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, {weight.shape[0]} classes"
    order = _order(input, weight, reduction, _conv_call.needs_grad(input, weight, bias))
    return _backends.build_explanation(OP, facts, _backends.requested(backend), order, lambda name: _unsupported(input, name))


_backends.EXPLAINERS[OP] = _explain
