"""MobileNetV2: inverted residuals, wide inside and narrow at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import ConvBNAct, Sequential
from pyops.nn.mbconv import BlockView, MBConv

from ._registry import images, register

PAPER = "Sandler et al., 2018"

# expansion, channels, blocks, stride of the first: the paper's table 2
SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def divisible(channels: float, by: int = 8) -> int:
    """The multiple of `by` that is next to channels, and no more than a tenth below."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest if nearest >= 0.9 * channels else nearest + by


class InvertedResidual(BlockView, nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (+ input): ``[N, inp, H, W] -> [N, oup, OH, OW]``. `MBConv`, torchvision's older names."""

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int):
        super().__init__()
        block: Any = MBConv(inp, oup, 3, stride, expand_ratio, squeeze_channels=0, activation="relu6").block
        *layers, project = block
        self.conv = nn.Sequential(*layers, *project)
        self.use_res_connect = stride == 1 and inp == oup

    def forward(self, input: Tensor) -> Tensor:
        return self.run_block(self.conv, self.use_res_connect, input)


class MobileNetV2(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``.

    Args:
        width_mult: multiplies all channels.
        inverted_residual_setting: (expansion, channels, blocks, stride of the first) of each stage; None: the paper's.
        round_nearest: channels are multiples of it.
        dropout: before the last layer.

    Raises ValueError for a setting of another form. Source: Sandler et al., 2018.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        dropout: float = 0.2,
    ):
        super().__init__()
        setting = SETTING if inverted_residual_setting is None else inverted_residual_setting
        if not setting or any(len(stage) != 4 for stage in setting):
            raise ValueError(f"MobileNetV2: inverted_residual_setting: expected four numbers for each stage, got {setting!r}")
        channels = divisible(32 * width_mult, round_nearest)
        self.last_channel = divisible(1280 * max(1.0, width_mult), round_nearest)
        layers: list[nn.Module] = [ConvBNAct(3, channels, 3, stride=2, activation="relu6")]
        for expansion, width, blocks, first_stride in setting:
            out = divisible(width * width_mult, round_nearest)
            for i in range(blocks):
                layers.append(InvertedResidual(channels, out, first_stride if i == 0 else 1, expansion))
                channels = out
        layers.append(ConvBNAct(channels, self.last_channel, 1, activation="relu6"))
        self.features = nn.Sequential(*layers)
        self.classifier = Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, 0.01)
                nn.init.zeros_(part.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input.contiguous(memory_format=torch.channels_last)).mean((2, 3)))


@register(images(224), PAPER)
def mobilenet_v2(**options: Any) -> MobileNetV2:
    """3,504,872 parameters. Options are those of `MobileNetV2`."""
    return MobileNetV2(**options)
