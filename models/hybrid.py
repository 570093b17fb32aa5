"""Convolutions, then recurrent layers: digits read row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyops.nn import GRU, LSTM, RNN, Sequential

from ._registry import images, register


class DigitsHybrid(nn.Module):
    """``[N, in_channels, 28, 28] -> [N, num_classes]``: ``features`` ``[N, 32, 14, 14]``, whose 14 rows, of 14 x 32 numbers each (a pixel's
    channels beside one another), ``rnn``, ``gru`` and ``lstm`` read as a sequence; ``classifier`` sees the last state.
    """

    def __init__(self, features: Sequential, num_classes: int):
        super().__init__()
        self.features = features
        self.rnn = RNN(14 * 32, 128, batch_first=True)
        self.gru = GRU(128, 64, batch_first=True)
        self.lstm = LSTM(64, 32, batch_first=True)
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        y = self.features(input.contiguous(memory_format=torch.channels_last))
        rows = y.permute(0, 2, 3, 1).flatten(2)
        _, (h, _) = self.lstm(self.gru(self.rnn(rows)[0])[0])
        return self.classifier(h[0])


@register(images(28, 1), "pyops' own, for the digits of LeCun et al., 1998")
def digits_hybrid(num_classes: int = 10, in_channels: int = 1) -> DigitsHybrid:
    """Two 3x3 convolutions (32, 64 channels) with ReLU and max pooling, a 2x2 transposed one (32 channels, stride 2) with ReLU, then RNN
    128, GRU 64, LSTM 32 and a linear layer: 151,146 parameters."""
    features = Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(),
    )  # fmt: skip
    return DigitsHybrid(features, num_classes)
