"""EfficientNet: one network found by search, made wider and deeper by fixed shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import ConvBNAct, MBConv, Sequential

from ._registry import images, register
from .mobilenet import divisible

PAPER = "Tan and Le, 2019"

# expansion, kernel size, stride of the first block, channels, blocks: the paper's table 1
SETTING = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip


class EfficientNet(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``.

    Args:
        width_mult, depth_mult: multiply the channels and the blocks of each stage.
        dropout: before the last layer.
        stochastic_depth_prob: the share of samples that a block drops, times the share of blocks before it.
        norm: eps and momentum of batch norm.

    Source: Tan and Le, 2019.
    """

    def __init__(
        self,
        width_mult: float,
        depth_mult: float,
        dropout: float,
        stochastic_depth_prob: float = 0.2,
        num_classes: int = 1000,
        norm: dict[str, Any] | None = None,
    ):
        super().__init__()
        options = norm or {}
        total = sum(math.ceil(stage[-1] * depth_mult) for stage in SETTING)
        channels, done = divisible(32 * width_mult), 0
        layers: list[nn.Module] = [ConvBNAct(3, channels, 3, stride=2, activation="silu", **options)]
        for expansion, kernel_size, first_stride, width, blocks in SETTING:
            out = divisible(width * width_mult)
            stage: list[nn.Module] = []
            for i in range(math.ceil(blocks * depth_mult)):
                drop_path = stochastic_depth_prob * done / total
                stride = first_stride if i == 0 else 1
                stage.append(MBConv(channels, out, kernel_size, stride, expansion, drop_path=drop_path, **options))
                channels, done = out, done + 1
            layers.append(nn.Sequential(*stage))
        layers.append(ConvBNAct(channels, 4 * channels, 1, activation="silu", **options))
        self.features = nn.Sequential(*layers)
        head = nn.Linear(4 * channels, num_classes)
        self.classifier = Sequential(nn.Dropout(dropout), head)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        bound = 1.0 / math.sqrt(num_classes)
        nn.init.uniform_(head.weight, -bound, bound)
        nn.init.zeros_(head.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input.contiguous(memory_format=torch.channels_last)).mean((2, 3)))


@register(images(224), PAPER)
def efficientnet_b0(dropout: float = 0.2, **options: Any) -> EfficientNet:
    """The network that was searched for, images of 224 x 224: 5,288,548 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.0, 1.0, dropout, **options)


@register(images(240), PAPER)
def efficientnet_b1(dropout: float = 0.2, **options: Any) -> EfficientNet:
    """1.1 times as deep, images of 240 x 240: 7,794,184 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.0, 1.1, dropout, **options)


@register(images(260), PAPER)
def efficientnet_b2(dropout: float = 0.3, **options: Any) -> EfficientNet:
    """1.1 times as wide, 1.2 times as deep, images of 260 x 260: 9,109,994 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.1, 1.2, dropout, **options)


@register(images(300), PAPER)
def efficientnet_b3(dropout: float = 0.3, **options: Any) -> EfficientNet:
    """1.2 times as wide, 1.4 times as deep, images of 300 x 300: 12,233,232 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.2, 1.4, dropout, **options)


@register(images(380), PAPER)
def efficientnet_b4(dropout: float = 0.4, **options: Any) -> EfficientNet:
    """1.4 times as wide, 1.8 times as deep, images of 380 x 380: 19,341,616 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.4, 1.8, dropout, **options)


# As the published weights of the larger ones, ported from TensorFlow, have it.
PORTED = dict(eps=0.001, momentum=0.01)


@register(images(456), PAPER)
def efficientnet_b5(dropout: float = 0.4, **options: Any) -> EfficientNet:
    """1.6 times as wide, 2.2 times as deep, images of 456 x 456: 30,389,784 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.6, 2.2, dropout, **{"norm": PORTED, **options})


@register(images(528), PAPER)
def efficientnet_b6(dropout: float = 0.5, **options: Any) -> EfficientNet:
    """1.8 times as wide, 2.6 times as deep, images of 528 x 528: 43,040,704 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(1.8, 2.6, dropout, **{"norm": PORTED, **options})


@register(images(600), PAPER)
def efficientnet_b7(dropout: float = 0.5, **options: Any) -> EfficientNet:
    """Twice as wide, 3.1 times as deep, images of 600 x 600: 66,347,960 parameters. Options are those of `EfficientNet`."""
    return EfficientNet(2.0, 3.1, dropout, **{"norm": PORTED, **options})
