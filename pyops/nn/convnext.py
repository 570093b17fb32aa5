"""ConvNeXt's block: torchvision's structure, parameter names and results, pyops' kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.nn._derived import Derived, is_plain
from pyops.nn.conv import DropPath, can_fold
from pyops.ops import _activations, _conv_call, linear_act
from pyops.ops.depthwise_conv import depthwise_conv_bn_act, run_folded

GELU = _activations.NAMES.index("gelu")


class Permute(nn.Module):
    """torchvision's: dimensions in another order."""

    def __init__(self, dims: tuple[int, ...]):
        super().__init__()
        self.dims = dims

    def forward(self, input: Tensor) -> Tensor:
        return input.permute(self.dims)


class ConvNeXtBlock(nn.Module):
    """``input + drop_path(layer_scale * mlp(layer_norm(depthwise7x7(input))))``: torchvision's CNBlock, names and results.

    ``[N, dim, H, W] -> [N, dim, H, W]``, fast in channels_last. The MLP widens to ``4 * dim`` with GELU between. Without gradients on a CPU
    the depthwise convolution is pyops' kernel, the layers are oneDNN's with GELU and residual fused, the layer scale is folded into the
    second one's weight, and weights are kept until a parameter changes.

    Source: Liu et al., 2022 (A ConvNet for the 2020s).
    """

    def __init__(self, dim: int, layer_scale: float = 1e-6, drop_path: float = 0.0, backend: str | None = None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"ConvNeXtBlock: dim: expected 1 or more, got {dim}")
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim),
            Permute((0, 2, 3, 1)),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute((0, 3, 1, 2)),
        )
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale))
        self.stochastic_depth = DropPath(drop_path)
        self.backend = backend
        self._kept = Derived()

    def train(self, mode: bool = True):
        self._kept.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self.block[0]
        if not self._is_standard() or input.dim() != 4 or input.shape[1] != conv.in_channels:
            return self.stochastic_depth(self.layer_scale * self.block(input)) + input
        drops = type(self.stochastic_depth) is not DropPath or (self.stochastic_depth.training and self.stochastic_depth.p > 0)
        if can_fold(conv.weight, input) and input.is_cpu and not drops and not torch.compiler.is_compiling():
            return self._infer(input)
        y: Any = depthwise_conv_bn_act(*_conv_call.autocast(input, conv.weight, conv.bias), padding=3, backend=self.backend)
        return self.stochastic_depth(self.layer_scale * self.block[1:](y)) + input

    def _is_standard(self) -> bool:
        parts: list[Any] = list(self.block)
        kinds = (nn.Conv2d, Permute, nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear, Permute)
        if tuple(type(part) for part in parts) != kinds or not is_plain(self.block, (nn.Sequential, *set(kinds))):
            return False
        conv, widen, narrow = parts[0], parts[3], parts[5]
        plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((7, 7), (1, 1), (3, 3), (1, 1), "zeros")
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        biases = all(layer.bias is not None for layer in (conv, widen, narrow))
        order = (parts[1].dims, parts[6].dims) == ((0, 2, 3, 1), (0, 3, 1, 2))
        return plain and depthwise and biases and order and parts[4].approximate == "none"

    def _infer(self, input: Tensor) -> Tensor:
        parts: list[Any] = list(self.block)
        conv, norm, widen = parts[0], parts[2], parts[3]
        narrow, kept = self._kept.get(self, lambda: (self._scaled(parts[5]), ({}, {})), input.dtype)
        shape: dict[str, Any] = dict(stride=(1, 1), padding=(3, 3), dilation=(1, 1), activation="none", means=False, backend=self.backend)
        y, _ = run_folded(input.contiguous(memory_format=torch.channels_last), conv.weight, conv.bias, **shape)
        rows = y.permute(0, 2, 3, 1)
        rows = F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        name = linear_act.choose(None, input, live=False)
        hidden = linear_act.run(name, rows, widen.weight, widen.bias, None, GELU, 0.0, kept[0])
        residual = input.permute(0, 2, 3, 1)
        output = linear_act.run(name, hidden, narrow[0], narrow[1], residual, 0, 0.0, kept[1]).permute(0, 3, 1, 2)
        return _conv_call.in_layout_of(output, input)

    def _scaled(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The second layer with the layer scale in it."""
        scale = self.layer_scale.flatten().float()
        weight, bias = layer.weight.float() * scale[:, None], layer.bias.float() * scale
        return weight.to(layer.weight.dtype), bias.to(layer.bias.dtype)
