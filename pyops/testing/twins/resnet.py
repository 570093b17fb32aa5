"""ResNet-18 without batch norm, of torchvision's parts."""

import torch
from torch import nn

from pyops.testing.twins import twin_of


@twin_of("resnet18_no_bn")
def resnet18_no_bn(num_classes: int = 1000) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes, norm_layer=lambda channels: nn.Identity())
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = nn.Parameter(torch.zeros(part.out_channels))
    return model
