"""DenseNet: every layer of a block reads what all layers before it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.nn import DenseBlock, DenseTransition, Sequential

from ._registry import images, register

PAPER = "Huang et al., 2017"

TRANSITIONS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


class DenseNet(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: a stem, dense blocks with a transition between each two, batch norm and a linear layer.

    Args:
        growth_rate: channels that each layer adds.
        block_config: layers of each block.
        num_init_features: the stem's channels.
        bn_size: a layer's 1x1 convolution gives ``bn_size * growth_rate`` channels.
        drop_rate: dropout after each layer.
        memory_efficient: taken for torchvision's sake; see `pyops.nn.DenseLayer`.
        transition: "avg" or "max", the 2x2 pooling that ends a transition; the paper's is the average.

    Raises ValueError for another transition or no blocks. Source: Huang et al., 2017.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        transition: str = "avg",
    ):
        super().__init__()
        if transition not in TRANSITIONS:
            raise ValueError(f'DenseNet: transition: expected "avg" or "max", got {transition!r}')
        if not block_config:
            raise ValueError("DenseNet: block_config: expected the layers of one block or more, got none")
        channels = num_init_features
        self.features = Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        for i, num_layers in enumerate(block_config, 1):
            block = DenseBlock(num_layers, channels, bn_size, growth_rate, drop_rate, memory_efficient)
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                pool = TRANSITIONS[transition](2, 2)
                self.features.add_module(f"transition{i}", DenseTransition(channels, channels // 2, pool))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        features = self.features(input.contiguous(memory_format=torch.channels_last))
        return self.classifier(F.relu(features, inplace=True).mean((2, 3)))


@register(images(224), PAPER)
def densenet121(**options: Any) -> DenseNet:
    """Blocks of 6, 12, 24 and 16 layers that add 32 channels each: 7,978,856 parameters. Options are those of `DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


@register(images(224), PAPER)
def densenet161(**options: Any) -> DenseNet:
    """The wide one: blocks of 6, 12, 36 and 24 layers that add 48 channels each to a stem of 96: 28,681,000 parameters. Options are those
    of `DenseNet`."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


@register(images(224), PAPER)
def densenet169(**options: Any) -> DenseNet:
    """Blocks of 6, 12, 32 and 32 layers that add 32 channels each: 14,149,480 parameters. Options are those of `DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


@register(images(224), PAPER)
def densenet201(**options: Any) -> DenseNet:
    """Blocks of 6, 12, 48 and 32 layers that add 32 channels each: 20,013,928 parameters. Options are those of `DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)
