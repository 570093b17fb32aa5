"""LeNet: digits of 32 x 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn

from pyops.nn import Sequential

from ._registry import images, register

PAPER = "LeCun et al., 1998"


class LeNet(nn.Module):
    """``[N, in_channels, 32, 32] -> [N, num_classes]``: ``features``, then ``classifier`` on what they give, flattened."""

    def __init__(self, features: Sequential, classifier: Sequential):
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).flatten(1))


@register(images(32, 1), PAPER)
def lenet(num_classes: int = 10, in_channels: int = 1) -> LeNet:
    """Two 5x5 convolutions (6, 16 channels) with ReLU and max pooling, then linear layers 120-84-num_classes: 61,706 parameters."""
    features = Sequential(
        nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    classifier = Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))
    return LeNet(features, classifier)


@register(images(32, 1), PAPER)
def lenet5(num_classes: int = 10, in_channels: int = 1) -> LeNet:
    """The paper's form: average pooling, tanh, and a third 5x5 convolution of 120 channels: 61,706 parameters."""
    features = Sequential(
        nn.Conv2d(in_channels, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(),
    )  # fmt: skip
    return LeNet(features, Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, num_classes)))
