"""Residual networks beside torchvision's, both on channels_last images: PyTorch sums a convolution otherwise in the other layout."""

import copy

import pytest
import torch
from torch import nn

from pyops import models as zoo
from pyops.nn import BasicBlock, Bottleneck
from pyops.testing import relative_error
from pyops.testing.twins import twin

from .models import Case, both, check_copies, check_inference, check_training, liven


@pytest.fixture(autouse=True)
def no_winograd():
    """What obeys the gate; its own test holds the rest."""
    before, torch.backends.fp32_precision = torch.backends.fp32_precision, "ieee"
    yield
    torch.backends.fp32_precision = before


def images(size: int, batch: int = 2):
    return lambda: (torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last),)


CASES = {
    "resnet18": Case(images(40), dict(num_classes=7)),
    "resnet18_no_bn": Case(images(40), dict(num_classes=7)),
    "resnet34": Case(images(32), dict(num_classes=3, zero_init_residual=True)),
    "resnet50": Case(images(40), dict(num_classes=7)),
    "resnet101": Case(images(32), dict(num_classes=3, groups=8, width_per_group=8)),
    "resnet152": Case(images(32), dict(num_classes=3, width_per_group=16, replace_stride_with_dilation=[False, True, True])),
}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet18_no_bn", "resnet50"])
def test_training(name):
    check_training(name, CASES[name])


def test_copies():
    check_copies("resnet18", CASES["resnet18"])


@pytest.mark.parametrize("training", [False, True])
def test_fullgraph(training):
    torch._dynamo.reset()
    model = zoo.resnet18(num_classes=3).train(training)
    (x,) = images(32)()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_winograd():
    """Off in the other tests, held here to what the docs promise of one convolution."""
    torch.backends.fp32_precision = "none"
    ours, theirs = (model.eval() for model in both("resnet18", CASES["resnet18"]))
    with torch.no_grad():
        (x,) = images(64)()
        assert relative_error([(ours(x), theirs.double()(x.double()))]) < 5e-6


@pytest.mark.parametrize("name, block", [("resnet18", BasicBlock), ("resnet50", Bottleneck)])
def test_blocks_of_torchvisions_network(name, block):
    """An instance that changes its class is pyops' block."""
    theirs = twin(name, num_classes=3)
    liven(theirs)
    ours = copy.deepcopy(theirs)
    for part in ours.modules():
        if type(part).__name__ == block.__name__:
            part.__class__ = block
    assert isinstance(ours.layer2[1], block)
    (x,) = images(32)()
    for mode in (False, True):
        ours.train(mode), theirs.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_bn_starts_as_the_identity():
    """Fixup: the branches' last convolutions are zero, so blocks of stride 1 give their input, rectified."""
    model = zoo.resnet18_no_bn(num_classes=3)
    (x,) = images(32)()
    y = torch.randn(2, 64, 8, 8).relu()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert torch.equal(model.layer1(y), y) and model(x).isfinite().all()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: BasicBlock(8, 8, groups=2), "groups, base_width: expected 1 and 64, got 2 and 64"),
        (lambda: BasicBlock(8, 8, dilation=2), "dilation: expected 1, got 2"),
        (lambda: zoo.resnet18(replace_stride_with_dilation=[True]), r"expected three booleans or None, got \[True\]"),
    ],
)
def test_errors(make, match):
    with pytest.raises((ValueError, NotImplementedError), match=match):
        make()
