"""Inference of two linear layers with GELU between as one kernel, LayerNorm and residual in it: what blocks of ConvNeXt, Swin and ViT
share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops import _backends
from pyops.nn._derived import Keeps, has_hooks, kind_of
from pyops.nn.conv import can_fold, name_of
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


class HasMlp(Keeps):
    """Of blocks with an ``mlp`` of two linear layers, GELU and dropout as torchvision orders them, and a ``backend``."""

    mlp: Any
    backend: str | None

    def infer_mlp(self, x: Tensor, norm: Any = None, residual: Tensor | None = None) -> Tensor | None:
        """The MLP, after a norm and with a residual if they are given, by one kernel; None where there is none for the call."""
        mlp = self.mlp
        name = backend_for(self.backend, x, x.shape[-1]) if can_fold(next(mlp.parameters(), x), x) else None
        if name is None:
            return None
        C = x.shape[-1]
        weights = self._kept.get(self, lambda: self._prepare(name, C, norm), (name, x.dtype, C))
        if weights is None:
            return None
        beside = None if residual is None else residual.reshape(-1, C)
        return run(name, x.reshape(-1, C), weights, mlp[0].out_features, None if norm is None else norm.eps, beside).view(x.shape)

    def _prepare(self, name: str, C: int, norm: Any) -> Any:
        """The kernel's weights, or None where it cannot stand for the layers."""
        mlp = self.mlp
        kinds = (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)
        if not isinstance(mlp, nn.Sequential) or tuple(kind_of(part) for part in mlp) != kinds:
            return None
        if any(has_hooks(part) for part in mlp.modules()):
            return None
        widen, narrow = mlp[0], mlp[3]
        ends = (widen.in_features, narrow.in_features, narrow.out_features) == (C, widen.out_features, C)
        known = widen.bias is not None and narrow.bias is not None and name_of(mlp[1]) == "gelu"
        if not ends or not known or mlp[2].training or mlp[4].training:
            return None
        if norm is not None and (type(norm) is not nn.LayerNorm or norm.normalized_shape != (C,) or has_hooks(norm)):
            return None
        return prepare(name, norm, widen, narrow)
