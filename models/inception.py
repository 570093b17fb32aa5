"""Inception v3: parallel branches of small and factorised convolutions, side by side in the channels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.nn.chain import Chained

from ._registry import images, register

PAPER = "Szegedy et al., 2016"

# From ImageNet's statistics by channel to those of images between -1 and 1, for `transform_input`: (deviation, mean).
STATISTICS = ((0.229, 0.485), (0.224, 0.456), (0.225, 0.406))


class InceptionOutputs(NamedTuple):
    """Of a network in training: both ``[N, num_classes]``."""

    logits: Tensor
    aux_logits: Tensor | None


class BasicConv2d(Chained, nn.Module):
    """Convolution, batch norm, ReLU [, pooling] as one call: ``[N, in_channels, H, W] -> [N, out_channels, OH, OW]``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, stride: int = 1, padding: Any = 0, pool: Any = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)
        self.names = ["conv", "bn", "relu"]
        if pool is not None:
            self.pool = pool
            self.names.append("pool")

    def forward(self, input: Tensor) -> Tensor:
        return self.chain(*self.names)(input)


class InceptionA(nn.Module):
    """Branches 1x1, 5x5, twice 3x3 and pooling: ``[N, in_channels, H, W] -> [N, 224 + pool_features, H, W]``. The paper's figure 5."""

    def __init__(self, in_channels: int, pool_features: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, input: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(input))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(input)))
        pooled = self.branch_pool(F.avg_pool2d(input, 3, stride=1, padding=1))
        return torch.cat([self.branch1x1(input), five, three, pooled], 1)


class InceptionB(nn.Module):
    """From the first maps to half their size: ``[N, in_channels, H, W] -> [N, 480 + in_channels, (H - 1) // 2, (W - 1) // 2]``."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(input)))
        return torch.cat([self.branch3x3(input), three, F.max_pool2d(input, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """7x7 as 1x7 and 7x1, by way of ``channels_7x7``: ``[N, in_channels, H, W] -> [N, 768, H, W]``. The paper's figure 6."""

    def __init__(self, in_channels: int, channels_7x7: int):
        super().__init__()
        middle = channels_7x7
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, middle, 1)
        self.branch7x7_2 = BasicConv2d(middle, middle, (1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(middle, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = BasicConv2d(in_channels, middle, 1)
        self.branch7x7dbl_2 = BasicConv2d(middle, middle, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = BasicConv2d(middle, middle, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = BasicConv2d(middle, middle, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = BasicConv2d(middle, 192, (1, 7), padding=(0, 3))
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, input: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(input)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(input)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        pooled = self.branch_pool(F.avg_pool2d(input, 3, stride=1, padding=1))
        return torch.cat([self.branch1x1(input), once, twice, pooled], 1)


class InceptionD(nn.Module):
    """To half the size again: ``[N, in_channels, H, W] -> [N, 512 + in_channels, (H - 1) // 2, (W - 1) // 2]``."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(input))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(input))))
        return torch.cat([three, seven, F.max_pool2d(input, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """1x3 beside 3x1, on the smallest maps: ``[N, in_channels, H, W] -> [N, 2048, H, W]``. The paper's figure 7."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, input: Tensor) -> Tensor:
        once = self.branch3x3_1(input)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(input))
        wide = [self.branch3x3_2a(once), self.branch3x3_2b(once), self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        pooled = self.branch_pool(F.avg_pool2d(input, 3, stride=1, padding=1))
        return torch.cat([self.branch1x1(input), *wide, pooled], 1)


class InceptionAux(nn.Module):
    """The auxiliary classifier, of maps of 17 x 17 or more: ``[N, in_channels, H, W] -> [N, num_classes]``."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.conv0 = BasicConv2d(in_channels, 128, 1)
        self.conv1 = BasicConv2d(128, 768, 5)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        pooled = F.avg_pool2d(input, 5, stride=3)
        return self.fc(self.conv1(self.conv0(pooled)).mean((2, 3)))


class Inception3(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``, H and W 75 or more; in training with ``aux_logits`` `InceptionOutputs`, of 299 or more.

    Args:
        aux_logits: with the auxiliary classifier.
        transform_input: images are normalised by ImageNet's statistics, and are brought to those that the network was trained with.
        init_weights: truncated normal weights as the network was published; False leaves PyTorch's.
        dropout: before the last layer.

    Source: Szegedy et al., 2016.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1, pool=nn.MaxPool2d(3, stride=2))
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pool=nn.MaxPool2d(3, stride=2))
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.AuxLogits = InceptionAux(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        if init_weights:
            self._initialise()

    def _initialise(self) -> None:
        deviations: dict[Any, float] = {} if self.AuxLogits is None else {self.AuxLogits.conv1.conv: 0.01, self.AuxLogits.fc: 0.001}
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(part.weight, std=deviations.get(part, 0.1))

    def forward(self, input: Tensor) -> Tensor | InceptionOutputs:
        if self.transform_input:
            channels = zip(input.split(1, 1), STATISTICS, strict=True)
            input = torch.cat([x * (deviation / 0.5) + (mean - 0.5) / 0.5 for x, (deviation, mean) in channels], 1)
        x = input.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        aux = self.AuxLogits(x) if self.AuxLogits is not None and self.training else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        logits = self.fc(self.dropout(x.mean((2, 3))))
        return InceptionOutputs(logits, aux) if self.training and self.aux_logits else logits


@register(images(299), PAPER)
def inception_v3(**options: Any) -> Inception3:
    """Images of 299 x 299: 27,161,264 parameters, 3,326,696 of them the auxiliary classifier's. Options are those of `Inception3`."""
    return Inception3(**options)
