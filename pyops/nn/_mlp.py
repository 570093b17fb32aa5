"""Inference of two linear layers with GELU between as one kernel, LayerNorm and residual in it: what ConvNeXt's and Swin's blocks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops import _backends
from pyops.ops import _activations, _conv_call, _mlp_ops

GELU = _activations.NAMES.index("gelu")


def backend_for(backend: str | None, input: Tensor, channels: int) -> str | None:
    """Whose kernel runs such layers from `channels` to as many on tensors like `input`; None: the layers run one by one. On a GPU that is
    so unless "cuda" or "triton" is asked for by name."""
    wished = _backends.requested(backend)
    if torch.compiler.is_compiling() or wished not in ("auto", "cpu", "cuda", "triton"):
        return None
    name = wished if wished in ("cuda", "triton") else "cpu"
    if _conv_call.unsupported(input.device.type, input.dtype, name) is not None:
        return None
    if name == "cuda":
        return name if _mlp_ops.cuda_takes(channels, channels, input.dtype) else None
    return name if name == "cpu" or _mlp_ops.unsupported_by_triton(channels, channels) is None else None


def prepare(name: str, norm: nn.LayerNorm | None, widen: Any, narrow: Any, scale: Tensor | None = None) -> Any:
    """Both layers as `run` takes them, with LayerNorm's affine in the first and a scale of the outputs in the second."""
    kind = torch.float32 if widen.weight.dtype == torch.float16 and name == "cpu" else widen.weight.dtype  # a CPU multiplies no float16
    first, first_bias = widen.weight.float(), widen.bias.float()
    second, second_bias = narrow.weight.float(), narrow.bias.float()
    if norm is not None and norm.bias is not None:
        first_bias = first_bias + first @ norm.bias.float()
    if norm is not None and norm.weight is not None:
        first = first * norm.weight.float()
    if scale is not None:
        scale = scale.flatten().float()
        second, second_bias = second * scale[:, None], second_bias * scale
    weights = first.to(kind), first_bias, second.to(kind), second_bias
    return weights if name == "triton" else torch.ops.pyops.mlp_pack.default(*weights)


def run(name: str, rows: Tensor, weights: Any, hidden: int, eps: float | None, residual: Tensor | None) -> Tensor:
    """The layers of rows ``[M, C]``, after a LayerNorm of that eps unless it is None, plus the residual."""
    options = (eps is not None, eps or 0.0, GELU, 0.0)
    if name == "triton":
        return torch.ops.pyops.mlp_run.triton(rows, *weights, residual, *options)
    return torch.ops.pyops.mlp_infer.default(rows, weights, residual, hidden, rows.shape[1], *options)
