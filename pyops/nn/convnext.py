"""ConvNeXt's block: torchvision's structure, parameter names and results, pyops' kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import _mlp
from pyops.nn._derived import Keeps, has_hooks, is_plain, kind_of
from pyops.nn.conv import DropPath, can_fold, name_of
from pyops.ops import _conv_call
from pyops.ops.depthwise_conv import depthwise_conv_bn_act, run_folded


class Permute(nn.Module):
    """torchvision's: dimensions in another order."""

    def __init__(self, dims: tuple[int, ...]):
        super().__init__()
        self.dims = dims

    def forward(self, input: Tensor) -> Tensor:
        return input.permute(self.dims)


class ConvNeXtBlock(Keeps, nn.Module):
    """``input + drop_path(layer_scale * mlp(layer_norm(depthwise7x7(input))))``: torchvision's CNBlock, names and results.

    ``[N, dim, H, W] -> [N, dim, H, W]``, fast in channels_last. The MLP widens to ``4 * dim`` with GELU between. Without gradients on a CPU
    the block is two kernels: the depthwise convolution, and all the rest, whose hidden rows stay in each core's cache; so it is with
    ``backend="cuda"`` (up to 192 channels) or ``"triton"`` (up to 256), but in float16. LayerNorm's affine and the layer scale are folded
    into the layers' weights, which are made ready once and again when a parameter changes.

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

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self.block[0]
        if not self._is_standard() or input.dim() != 4 or input.shape[1] != conv.in_channels:
            return self.stochastic_depth(self.layer_scale * self.block(input)) + input
        drops = kind_of(self.stochastic_depth) is not DropPath or (self.stochastic_depth.training and self.stochastic_depth.p > 0)
        if can_fold(conv.weight, input) and not drops and self._has_kernel(input):
            return self._infer(input)
        y: Any = depthwise_conv_bn_act(*_conv_call.autocast(input, conv.weight, conv.bias), padding=3, backend=self.backend)
        return self.stochastic_depth(self.layer_scale * self.block[1:](y)) + input

    def _has_kernel(self, input: Tensor) -> bool:
        name = _mlp.backend_for(self.backend, input, input.shape[1])
        return name == "cpu" or (name is not None and input.dtype != torch.float16)  # no room for weights times a layer scale of 1e-6

    def _is_standard(self) -> bool:
        parts: list[Any] = list(self.block)
        kinds = (nn.Conv2d, Permute, nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear, Permute)
        if tuple(kind_of(part) for part in parts) != kinds or not is_plain(self.block, (nn.Sequential, *set(kinds))):
            return False
        if has_hooks(self.block) or has_hooks(self.stochastic_depth):
            return False
        conv, widen, narrow = parts[0], parts[3], parts[5]
        plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((7, 7), (1, 1), (3, 3), (1, 1), "zeros")
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        biases = all(layer.bias is not None for layer in (conv, widen, narrow))
        order = [tuple(parts[i].dims) for i in (1, 6)] == [(0, 2, 3, 1), (0, 3, 1, 2)]
        return plain and depthwise and biases and order and name_of(parts[4]) == "gelu"

    def _infer(self, input: Tensor) -> Tensor:
        parts: list[Any] = list(self.block)
        conv, norm, dim = parts[0], parts[2], input.shape[1]
        name = str(_mlp.backend_for(self.backend, input, dim))
        weights = self._kept.get(self, lambda: _mlp.prepare(name, norm, parts[3], parts[5], self.layer_scale), (input.dtype, name))
        image = input.contiguous(memory_format=torch.channels_last)
        shape: dict[str, Any] = dict(stride=(1, 1), padding=(3, 3), dilation=(1, 1), activation="none", means=False, backend=self.backend)
        y, _ = run_folded(image, conv.weight, conv.bias, **shape)
        rows, residual = (t.permute(0, 2, 3, 1).reshape(-1, dim) for t in (y, image))
        output = _mlp.run(name, rows, weights, 4 * dim, norm.eps, residual)
        return _conv_call.in_layout_of(output.view(image.shape[0], *image.shape[2:], dim).permute(0, 3, 1, 2), input)
