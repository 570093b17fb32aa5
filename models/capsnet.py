"""CapsNet: digits of 28 x 28 pixels, each class a capsule whose length says how likely it is there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops import capsule_routing
from pyops.nn import Sequential

from ._registry import images, register

PAPER = "Sabour et al., 2017"


def squash(s: Tensor) -> Tensor:
    """``|s|^2 / (1 + |s|^2) * s / |s|`` of the vectors along the last dimension: the same direction, a length below 1; zero for zero."""
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * (length / (1 + length.square()))


def margin_loss(lengths: Tensor, labels: Tensor, present: float = 0.9, absent: float = 0.1, weight: float = 0.5) -> Tensor:
    """The mean over samples of ``sum_k T_k max(0, present - |v_k|)^2 + weight (1 - T_k) max(0, |v_k| - absent)^2``.

    Args:
        lengths: |v|, ``[N, num_classes]``.
        labels: the class of each sample, ``[N]`` of integers, or T, ``[N, num_classes]``, where more than one may be there.
    """
    there = _there(lengths, labels)
    losses = there * F.relu(present - lengths).square() + weight * (1 - there) * F.relu(lengths - absent).square()
    return losses.sum(1).mean()


def reconstruction_loss(reconstruction: Tensor, image: Tensor, scale: float = 0.0005) -> Tensor:
    """``scale`` times the mean over samples of the summed squared differences of two ``[N, *]``. The paper adds it to the margin loss."""
    if reconstruction.shape != image.shape:
        raise ValueError(
            f"reconstruction_loss: image: expected reconstruction's shape {tuple(reconstruction.shape)}, got {tuple(image.shape)}"
        )
    return scale * (reconstruction - image).square().flatten(1).sum(1).mean()


def _there(like: Tensor, labels: Tensor) -> Tensor:
    """T, [N, num_classes]"""
    if labels.shape == like.shape:
        return labels.to(like.dtype)
    if labels.shape != like.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels: expected {like.shape[0]} integers, or shape {tuple(like.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return F.one_hot(labels.long(), like.shape[1]).to(like.dtype)


class DigitCapsules(nn.Module):
    """``[N, I, E] -> [N, J, D]``: each of I input capsules predicts each of J outputs by a matrix of its own; routing finds what they
    agree on."""

    def __init__(self, inputs: int, outputs: int, size: int, output_size: int, num_iterations: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, output_size, size))
        self.num_iterations = num_iterations
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, input: Tensor) -> Tensor:
        predictions = torch.einsum("nie,ijde->nijd", input, self.weight)  # in memory [I, N, J, D], which the routing reads as it is
        return capsule_routing(predictions, self.num_iterations)


class CapsNet(nn.Module):
    """``[N, in_channels, H, W] -> [N, num_classes]``, the capsules' lengths; with a decoder ``(lengths, reconstruction)``, an image like
    the input from the capsule of the class in `labels` ``[N]`` alone, or without labels from the longest.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017.
    """

    def __init__(self, features: Sequential, capsule_size: int, digits: DigitCapsules, decoder: Sequential | None):
        super().__init__()
        self.features = features
        self.capsule_size = capsule_size
        self.digits = digits
        self.decoder = decoder

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        image = input
        # a training step would lay 21 MB of weights out anew three times (N=8, a core: 235 ms, so 155 ms); inference keeps them
        if not torch.is_grad_enabled():
            # channels_last by its strides as well, which contiguous() leaves as they are where there is one channel
            rows = input.permute(0, 2, 3, 1)
            image = rows.reshape(-1).view(rows.shape).permute(0, 3, 1, 2)
        maps = self.features(image)
        # neighbouring channels of a position are a capsule
        primary = squash(maps.permute(0, 2, 3, 1).reshape(len(input), -1, self.capsule_size))
        digits = self.digits(primary)
        lengths = torch.linalg.vector_norm(digits, dim=-1)
        if self.decoder is None:
            return lengths
        kept = _there(lengths, lengths.argmax(1) if labels is None else labels)
        return lengths, self.decoder((digits * kept[..., None]).flatten(1)).view(input.shape)


@register(images(28, 1), PAPER)
def capsnet(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    channels: int = 256,
    capsules: int = 32,
    capsule_size: int = 8,
    digit_size: int = 16,
    num_iterations: int = 3,
    decoder: tuple[int, ...] | None = (512, 1024),
) -> CapsNet:
    """A 9x9 convolution of 256 channels with ReLU, 32 primary capsules of 8 elements at each of 6 x 6 positions by a second one of stride
    2, and a capsule of 16 elements for each class, by three iterations of routing: 6,804,224 parameters, 8,215,568 with the decoder.

    Args:
        image_size: height and width, 17 or more.
        channels, capsules: of the first convolution; primary capsules at a position.
        capsule_size, digit_size: elements of a primary capsule, and of a class's.
        num_iterations: of routing.
        decoder: outputs of the hidden layers that lead to a reconstruction, sigmoid in the end; None: no reconstruction.
    """
    if image_size < 17:
        raise ValueError(f"capsnet: image_size: two 9x9 convolutions need 17 or more, got {image_size}")
    positions = ((image_size - 17) // 2 + 1) ** 2
    features = Sequential(
        nn.Conv2d(in_channels, channels, 9), nn.ReLU(),
        nn.Conv2d(channels, capsules * capsule_size, 9, stride=2),
    )  # fmt: skip
    digits = DigitCapsules(positions * capsules, num_classes, capsule_size, digit_size, num_iterations)
    if decoder is None:
        return CapsNet(features, capsule_size, digits, None)
    layers: list[nn.Module] = []
    width = num_classes * digit_size
    for hidden in decoder:
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    layers += [nn.Linear(width, in_channels * image_size**2), nn.Sigmoid()]
    return CapsNet(features, capsule_size, digits, Sequential(*layers))
