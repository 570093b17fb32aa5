"""AlexNet: torchvision's, of one tower, and the original of two groups with local response normalisation."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pyops.nn import LocalResponseNorm, Sequential

from ._registry import images, register

PAPER = "Krizhevsky et al., 2012"


class AlexNet(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: ``features``, averages over 6 x 6 parts of what they give, ``classifier``."""

    def __init__(self, features: Sequential, num_classes: int, dropout: float):
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)  # PyTorch would lay out each filter anew in every training step

    def forward(self, input: Tensor) -> Tensor:
        y = self.features(input.contiguous(memory_format=torch.channels_last))
        return self.classifier(self.avgpool(y).flatten(1))


@register(images(224), "Krizhevsky, 2014")
def alexnet(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    """torchvision's: 64, 192, 384, 256, 256 channels, no normalisation: 61.1 M parameters. ``dropout`` is before the hidden linear
    layers."""
    features = Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    return AlexNet(features, num_classes, dropout)


def _original(num_classes: int, dropout: float, groups: int) -> AlexNet:
    def normalise() -> LocalResponseNorm:
        return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0, activation="relu")

    features = Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 96, 11, 4), norm1=normalise(), pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(96, 256, 5, padding=2, groups=groups), norm2=normalise(), pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(256, 384, 3, padding=1), relu3=nn.ReLU(inplace=True),
        conv4=nn.Conv2d(384, 384, 3, padding=1, groups=groups), relu4=nn.ReLU(inplace=True),
        conv5=nn.Conv2d(384, 256, 3, padding=1, groups=groups), relu5=nn.ReLU(inplace=True), pool5=nn.MaxPool2d(3, 2),
    ))  # fmt: skip
    model = AlexNet(features, num_classes, dropout)
    for name, part in model.named_modules():  # the paper's, section 5
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
            nn.init.normal_(part.weight, std=0.01)
            hidden = isinstance(part, nn.Linear) and part.out_features == 4096
            nn.init.constant_(part.bias, 1.0 if hidden or name in ("features.conv2", "features.conv4", "features.conv5") else 0.0)
    return model


@register(images(227), PAPER)
def alexnet_groups(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    """The paper's: 96, 256, 384, 384, 256 channels, the second, fourth and fifth convolution in two groups, local response normalisation
    after the first two, overlapping pools: 61.0 M parameters for 227 x 227 pixels."""
    return _original(num_classes, dropout, groups=2)


@register(images(227), PAPER)
def alexnet_lrn(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    """`alexnet_groups` whose convolutions all see every channel: 62.4 M parameters."""
    return _original(num_classes, dropout, groups=1)
