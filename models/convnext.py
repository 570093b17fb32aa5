"""ConvNeXt: a convolutional network laid out as a vision transformer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import ConvNeXtBlock, LayerNorm2d, Sequential

from ._registry import images, register

PAPER = "Liu et al., 2022"


class ConvNeXt(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: a stem of 4 x 4 patches, stages of `ConvNeXtBlock`, a norm and a 2x2 convolution between them.

    Args:
        depths, widths: blocks and channels of each stage.
        stochastic_depth_prob: the share of samples that a block drops, rising from 0 at the first block to this at the last.
        layer_scale: what each block's branch is scaled by at first.

    Raises ValueError for depths and widths of different numbers of stages, or fewer than two blocks. Source: Liu et al., 2022.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        stochastic_depth_prob: float = 0.0,
        layer_scale: float = 1e-6,
        num_classes: int = 1000,
    ):
        super().__init__()
        if len(depths) != len(widths) or sum(depths) < 2:
            raise ValueError(f"ConvNeXt: depths, widths: expected one of each for every stage, and two blocks, got {depths} and {widths}")
        layers: list[nn.Module] = [Sequential(nn.Conv2d(3, widths[0], 4, stride=4), LayerNorm2d(widths[0]))]
        done, last = 0, sum(depths) - 1
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i:
                layers.append(Sequential(LayerNorm2d(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, stride=2)))
            rates = [stochastic_depth_prob * (done + place) / last for place in range(depth)]
            layers.append(nn.Sequential(*(ConvNeXtBlock(width, layer_scale, rate) for rate in rates)))
            done += depth
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Sequential(LayerNorm2d(widths[-1]), nn.Flatten(1), nn.Linear(widths[-1], num_classes))
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(input.contiguous(memory_format=torch.channels_last))))


@register(images(224), PAPER)
def convnext_tiny(stochastic_depth_prob: float = 0.1, **options: Any) -> ConvNeXt:
    """3, 3, 9 and 3 blocks of 96 to 768 channels: 28,589,128 parameters. Options are those of `ConvNeXt`."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), stochastic_depth_prob, **options)


@register(images(224), PAPER)
def convnext_small(stochastic_depth_prob: float = 0.4, **options: Any) -> ConvNeXt:
    """3, 3, 27 and 3 blocks of 96 to 768 channels: 50,223,688 parameters. Options are those of `ConvNeXt`."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), stochastic_depth_prob, **options)


@register(images(224), PAPER)
def convnext_base(stochastic_depth_prob: float = 0.5, **options: Any) -> ConvNeXt:
    """3, 3, 27 and 3 blocks of 128 to 1024 channels: 88,591,464 parameters. Options are those of `ConvNeXt`."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), stochastic_depth_prob, **options)
