"""VGG: stacks of 3x3 convolutions between poolings (torchvision's), and a compact one of ten convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyops.nn import Sequential

from ._registry import images, register

PAPER = "Simonyan and Zisserman, 2014"
CHANNELS = (64, 128, 256, 512, 512)  # of the five blocks, each with pooling after it


class VGG(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: ``features``, averages over 7 x 7 parts of what they give, ``classifier``.

    ``init_weights=False`` leaves the layers' own initial weights in place of torchvision's.
    """

    def __init__(self, features: Sequential, classifier: Sequential, init_weights: bool):
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = classifier
        if init_weights:
            self._initialise()
        self.to(memory_format=torch.channels_last)  # PyTorch would lay out each filter anew in every training step

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, 0.01)
            if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, input: Tensor) -> Tensor:
        y = self.features(input.contiguous(memory_format=torch.channels_last))
        return self.classifier(self.avgpool(y).flatten(1))


def _vgg(counts: tuple[int, ...], batch_norm: bool, num_classes: int, init_weights: bool, dropout: float) -> VGG:
    """counts: convolutions of each block."""
    layers: list[nn.Module] = []
    channels = 3
    for count, width in zip(counts, CHANNELS, strict=True):
        for _ in range(count):
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    classifier = Sequential(
        nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout),
        nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout),
        nn.Linear(4096, num_classes),
    )  # fmt: skip
    return VGG(Sequential(*layers), classifier, init_weights)


DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@register(images(224), PAPER)
def vgg11(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """Eight 3x3 convolutions and three linear layers: 132.9 M parameters. ``dropout`` is after the hidden linear layers."""
    return _vgg(DEPTHS[11], False, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg13(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """Ten 3x3 convolutions and three linear layers: 133.0 M parameters. ``dropout`` is after the hidden linear layers."""
    return _vgg(DEPTHS[13], False, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg16(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """Thirteen 3x3 convolutions and three linear layers: 138.4 M parameters. ``dropout`` is after the hidden linear layers."""
    return _vgg(DEPTHS[16], False, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg19(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """Sixteen 3x3 convolutions and three linear layers: 143.7 M parameters. ``dropout`` is after the hidden linear layers."""
    return _vgg(DEPTHS[19], False, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg11_bn(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """`vgg11` with batch norm after each convolution."""
    return _vgg(DEPTHS[11], True, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg13_bn(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """`vgg13` with batch norm after each convolution."""
    return _vgg(DEPTHS[13], True, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg16_bn(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """`vgg16` with batch norm after each convolution."""
    return _vgg(DEPTHS[16], True, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg19_bn(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5) -> VGG:
    """`vgg19` with batch norm after each convolution."""
    return _vgg(DEPTHS[19], True, num_classes, init_weights, dropout)


@register(images(224), PAPER)
def vgg_compact(num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5, hidden: int = 512) -> VGG:
    """Five blocks of two 3x3 convolutions with one ReLU, after the second, and four linear layers, three of ``hidden`` features: 23.3 M
    parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for width in CHANNELS:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        channels = width
    classifier: list[nn.Module] = []
    features = 512 * 7 * 7
    for _ in range(3):
        classifier += [nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        features = hidden
    return VGG(Sequential(*layers), Sequential(*classifier, nn.Linear(features, num_classes)), init_weights)
