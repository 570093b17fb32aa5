"""A small residual network as a user writes one, for the commands that look at networks."""

import torch
from torch import nn

from pyops.nn import Sequential
from pyops.nn.chain import ADD, Chained


class Block(Chained, nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.chain("conv2", "bn2", ADD, "relu")(self.chain("conv1", "bn1", "relu")(input), input)


class PlainBlock(Block):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        output += input
        return self.relu(output)


class Net(nn.Module):
    def __init__(self, block: type[Block], layers: type[nn.Sequential], channels: int = 8, blocks: int = 2):
        super().__init__()
        self.stem = layers(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(block(channels) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(input))), 1))


def ours(channels: int = 8, blocks: int = 2) -> Net:
    return Net(Block, Sequential, channels, blocks)


def plain(channels: int = 8, blocks: int = 2) -> Net:
    return Net(PlainBlock, nn.Sequential, channels, blocks)


ready = plain()


def refuses(channels: int) -> Net:
    raise ValueError(f"channels: expected 8, got {channels}")


def number() -> int:
    return 3
