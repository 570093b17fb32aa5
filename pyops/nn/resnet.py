"""ResNet's blocks: torchvision's structure, parameter names and results, each convolution one call with what follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyops.nn.chain import ADD, Chained

Norm = Callable[[int], nn.Module]


def _convolution(kernel_size: int, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)


class BasicBlock(Chained, nn.Module):
    """``relu(bn(conv3x3(relu(bn(conv3x3(input))))) + input)``: ``[N, inplanes, H, W] -> [N, planes, OH, OW]``.

    torchvision's BasicBlock: constructor, parameter names, results. ``stride`` is the first convolution's; ``downsample`` is what the
    input goes through on its way to the sum, a 1x1 convolution of that stride with batch norm as a rule; ``norm_layer`` builds a norm of
    a number of channels, `torch.nn.BatchNorm2d` where it is None. Source: He et al., 2015.

    Raises ValueError for groups or a base width that the block has not, NotImplementedError for a dilation.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ):
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: groups, base_width: expected 1 and 64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: dilation: expected 1, got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _convolution(3, inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(3, planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = _identity(self, x)
        y = self.chain("conv1", "bn1", "relu")(x)
        return self.chain("conv2", "bn2", ADD, "relu")(y, identity)


class Bottleneck(Chained, nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, each with batch norm, and the input added before the last ReLU:
    ``[N, inplanes, H, W] -> [N, 4 * planes, OH, OW]``.

    torchvision's Bottleneck: constructor, parameter names, results; arguments are `BasicBlock`'s, and the 3x3 convolution, which has the
    stride, has ``groups`` and ``dilation`` and ``planes * base_width / 64 * groups`` channels. Source: He et al., 2015; the stride's place
    is that of Goyal et al., 2017; groups and widths: Xie et al., 2017 (ResNeXt), Zagoruyko and Komodakis, 2016 (wide ResNets).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _convolution(1, inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _convolution(3, width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _convolution(1, width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = _identity(self, x)
        y = self.chain("conv1", "bn1", "relu")(x)
        y = self.chain("conv2", "bn2", "relu")(y)
        return self.chain("conv3", "bn3", ADD, "relu")(y, identity)


def _identity(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)
