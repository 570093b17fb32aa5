"""Residual networks, beside torchvision's."""

import pytest
import torch

from .models import Case, check_copies, check_inference, check_training


def images(size: int, batch: int = 2):
    return lambda: (torch.randn(batch, 3, size, size),)


CASES = {
    "resnet18": Case(images(40), dict(num_classes=7)),
    "resnet18_no_bn": Case(images(40), dict(num_classes=7)),
    "resnet34": Case(images(32), dict(num_classes=3, zero_init_residual=True)),
    "resnet50": Case(images(40), dict(num_classes=7)),
    "resnet101": Case(images(32), dict(num_classes=3, groups=8, width_per_group=8)),
    "resnet152": Case(images(32), dict(num_classes=3, replace_stride_with_dilation=[False, True, True])),
}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet18_no_bn", "resnet50"])
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_copies(name):
    check_copies(name, CASES[name])
