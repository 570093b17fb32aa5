"""Residual networks beside torchvision's, both on channels_last images: PyTorch sums a convolution otherwise in the other layout."""

import copy

import pytest
import torch
from torch import nn

from pyops import models as zoo
from pyops.nn import BasicBlock, Bottleneck, Sequential
from pyops.testing import relative_error
from pyops.testing.twins import twin

from .conftest import assert_gate
from .models import Case, both, check_copies, check_inference, check_training, liven


@pytest.fixture(autouse=True)
def no_winograd():
    """What obeys the gate; its own test holds the rest."""
    with torch.backends.flags(fp32_precision="ieee"):
        yield


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


@pytest.mark.parametrize("name", ["resnet18", "resnet18_no_bn"])
def test_training(name):
    check_training(name, CASES[name])


BLOCKS = {
    "basic": (BasicBlock, 12, 12, {}),
    "basic_stride": (BasicBlock, 8, 12, dict(stride=2)),
    "bottleneck": (Bottleneck, 12, 3, {}),
    "bottleneck_groups": (Bottleneck, 8, 3, dict(stride=2, groups=3, base_width=64, dilation=2)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_block_gradients(name, training):
    from torchvision.models import resnet

    def build(block, container):
        kind, inputs, planes, options = BLOCKS[name]
        out, stride = planes * kind.expansion, options.get("stride", 1)
        downsample = container(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if inputs != out else None
        return block(inputs, planes, downsample=downsample, **options).train(training)

    def step(block, x):
        x = x.clone().requires_grad_()
        y = block(x)
        (y**2).mean().backward()
        return [y.detach(), x.grad, *(p.grad for p in block.parameters()), *(b for b in block.buffers() if b.is_floating_point())]

    def draw(seed):
        torch.manual_seed(seed)
        ours = build(BLOCKS[name][0], Sequential)
        theirs = build(getattr(resnet, BLOCKS[name][0].__name__), nn.Sequential)
        liven(theirs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        truth, x = copy.deepcopy(theirs).double(), torch.randn(3, BLOCKS[name][1], 9, 8).contiguous(memory_format=torch.channels_last)
        return step(ours, x), step(truth, x.double()), step(theirs, x)

    assert_gate(draw, torch.float32, gradient=True)


def test_copies():
    check_copies("resnet18", CASES["resnet18"])


@pytest.mark.parametrize("training", [False, True])
def test_fullgraph(training):
    torch._dynamo.reset()
    model = BasicBlock(12, 12) if training else zoo.resnet18(num_classes=3).eval()  # the network in training is ill-conditioned
    x = torch.randn(2, 12, 9, 8) if training else images(32)()[0]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_winograd():
    """Off in the other tests, held here to what the docs promise of one convolution."""
    ours, theirs = (model.eval() for model in both("resnet18", CASES["resnet18"]))
    with torch.no_grad(), torch.backends.flags(fp32_precision="none"):
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
    (x,), y = images(32)(), torch.randn(2, 64, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.train().layer1(y), theirs.train().layer1(y), rtol=1e-4, atol=1e-4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.layer1.buffers(), theirs.layer1.buffers(), strict=True):
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
