"""CapsNet in plain torch.nn, routing written out."""

from itertools import pairwise

import torch
from torch import nn

from pyops.testing.twins import twin_of


def squash(s):
    length = s.norm(dim=-1, keepdim=True)
    return length / (1 + length**2) * s


class DigitCapsules(nn.Module):
    def __init__(self, inputs, outputs, size, output_size, num_iterations):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, output_size, size).normal_(std=0.1))
        self.num_iterations = num_iterations

    def forward(self, x):
        u = torch.einsum("nie,ijde->nijd", x, self.weight)
        logits = torch.zeros_like(u[..., 0])
        for step in range(self.num_iterations):
            v = squash((logits.softmax(2)[..., None] * u).sum(1))
            if step + 1 < self.num_iterations:
                logits = logits + (u * v[:, None]).sum(3)
        return v


@twin_of("capsnet")
class CapsNet(nn.Module):
    def __init__(
        self, num_classes=10, in_channels=1, image_size=28, channels=256, capsules=32, capsule_size=8, digit_size=16, num_iterations=3,
        decoder=(512, 1024),
    ):  # fmt: skip
        super().__init__()
        self.capsule_size = capsule_size
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, channels, 9), nn.ReLU(), nn.Conv2d(channels, capsules * capsule_size, 9, stride=2)
        )
        inputs = capsules * ((image_size - 17) // 2 + 1) ** 2
        self.digits = DigitCapsules(inputs, num_classes, capsule_size, digit_size, num_iterations)
        widths = (num_classes * digit_size, *decoder) if decoder is not None else ()
        hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        pixels = in_channels * image_size**2
        self.decoder = nn.Sequential(*hidden, nn.Linear(widths[-1], pixels), nn.Sigmoid()) if widths else None

    def forward(self, x, labels=None):
        maps = self.features(x)
        primary = squash(maps.permute(0, 2, 3, 1).reshape(len(x), -1, self.capsule_size))
        digits = self.digits(primary)
        lengths = digits.norm(dim=-1)
        if self.decoder is None:
            return lengths
        labels = lengths.argmax(1) if labels is None else labels
        kept = nn.functional.one_hot(labels, lengths.shape[1]).to(digits.dtype)
        return lengths, self.decoder((digits * kept[..., None]).flatten(1)).view(x.shape)
