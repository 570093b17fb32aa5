"""LeNet and the networks of plain convolutions, beside their twins."""

import pytest
import torch

from .models import Case, check_copies, check_inference, check_training


def images(channels: int, size: int, batch: int = 2):
    return lambda: (torch.randn(batch, channels, size, size),)


CASES = {
    "lenet": Case(images(1, 32)),
    "lenet5": Case(images(1, 32), dict(num_classes=7)),
}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", ["lenet"])
def test_copies(name):
    check_copies(name, CASES[name])
