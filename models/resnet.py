"""Residual networks (torchvision's), and one without batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import BasicBlock, Bottleneck, Sequential
from pyops.nn.chain import Chained

from ._registry import images, register

PAPER = "He et al., 2015"


class ResNet(Chained, nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: a 7x7 convolution and pooling, four stages of blocks, the mean over positions, a linear layer.

    ``layers`` counts the blocks of each stage. ``zero_init_residual`` starts each block as the identity (Goyal et al., 2017);
    ``replace_stride_with_dilation`` says of each of the last three stages whether it keeps its size; ``groups`` and ``width_per_group``
    are the 3x3 convolutions' in bottlenecks; ``norm_layer`` builds a norm of a number of channels.

    Source: He et al., 2015, with torchvision's names and initialisation. Raises ValueError for a wrong ``replace_stride_with_dilation``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Any = None,
    ):
        super().__init__()
        dilates = [False, False, False] if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilates) != 3:
            raise ValueError(f"ResNet: replace_stride_with_dilation: expected three booleans or None, got {replace_stride_with_dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, dilation = 64, 1
        stages: list[nn.Sequential] = []
        for stage, (count, dilate) in enumerate(zip(layers, [False, *dilates], strict=True)):
            planes, first_dilation = 64 * 2**stage, dilation
            out, stride = planes * block.expansion, 1 if stage == 0 or dilate else 2
            dilation *= 2 if dilate else 1
            options: dict[str, Any] = dict(groups=groups, base_width=width_per_group, norm_layer=norm_layer)
            blocks = []
            for i in range(count):
                downsample = None
                if i == 0 and (stride != 1 or channels != out):
                    downsample = Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm_layer(out))
                own = dict(stride=stride, downsample=downsample, dilation=first_dilation) if i == 0 else dict(dilation=dilation)
                blocks.append(block(channels, planes, **own, **options))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(zero_init_residual)
        self.to(memory_format=torch.channels_last)  # PyTorch would lay out each filter anew in every training step

    def _initialise(self, zero_init_residual: bool) -> None:
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(part, (BasicBlock, Bottleneck)):
                last: Any = part.bn3 if isinstance(part, Bottleneck) else part.bn2
                nn.init.zeros_(last.weight)

    def forward(self, input: Tensor) -> Tensor:
        y = input.contiguous(memory_format=torch.channels_last)
        y = self.chain("conv1", "bn1", "relu", "maxpool")(y)
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.chain("fc")(self.avgpool(y).flatten(1))


@register(images(224), PAPER)
def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """Eight blocks of two 3x3 convolutions: 11.7 M parameters. Options are `ResNet`'s."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes, **options)


@register(images(224), PAPER)
def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """Sixteen blocks of two 3x3 convolutions: 21.8 M parameters. Options are `ResNet`'s."""
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes, **options)


@register(images(224), PAPER)
def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """Sixteen bottlenecks: 25.6 M parameters. Options are `ResNet`'s."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, **options)


@register(images(224), PAPER)
def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """Thirty-three bottlenecks: 44.5 M parameters. Options are `ResNet`'s."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, **options)


@register(images(224), PAPER)
def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """Fifty bottlenecks: 60.2 M parameters. Options are `ResNet`'s."""
    return ResNet(Bottleneck, [3, 8, 36, 3], num_classes, **options)


@register(images(224), "Zhang et al., 2019")
def resnet18_no_bn(num_classes: int = 1000) -> ResNet:
    """ResNet-18 whose convolutions have biases and no batch norm after them: 11.7 M parameters. What keeps its blocks from amplifying is
    Fixup's initialisation: the second convolution of each starts at zero, the first scaled by ``blocks ** -0.5``."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes, norm_layer=nn.Identity)
    blocks = [part for part in model.modules() if isinstance(part, BasicBlock)]
    with torch.no_grad():
        for block in blocks:
            block.conv1.weight.mul_(len(blocks) ** -0.5)
            block.conv2.weight.zero_()
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = nn.Parameter(torch.zeros(part.out_channels))
    return model
