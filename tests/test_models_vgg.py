"""AlexNet and VGG beside their twins, both on channels_last images: PyTorch sums a convolution otherwise in the other layout."""

import copy

import pytest
import torch
from torch import nn

from pyops import models as zoo
from pyops.nn import LocalResponseNorm

from .models import Case, check_copies, check_inference, check_training


@pytest.fixture(autouse=True)
def no_winograd():
    """What obeys the gate; tests/test_models_resnet.py holds the rest."""
    with torch.backends.flags(fp32_precision="ieee"):
        yield


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """Hidden linear layers of 16 features in place of 4096, ours and torchvision's: 100 M parameters less to draw."""
    make = nn.Linear.__init__
    narrow = lambda features: 16 if features == 4096 else features  # noqa: E731
    monkeypatch.setattr(nn.Linear, "__init__", lambda self, i, o, *args, **options: make(self, narrow(i), narrow(o), *args, **options))


def images(size: int, batch: int = 2):
    return lambda: (torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last),)


def no_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


ALEXNETS = {name: Case(images(67), dict(num_classes=5), no_dropout) for name in ("alexnet", "alexnet_groups", "alexnet_lrn")}
VGGS = {f"vgg{depth}{norm}": Case(images(32), dict(num_classes=5), no_dropout) for depth in (11, 13, 16, 19) for norm in ("", "_bn")}
CASES = {**ALEXNETS, **VGGS, "vgg_compact": Case(images(32), dict(num_classes=5, hidden=24), no_dropout)}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", ["alexnet", "alexnet_groups", "vgg11", "vgg11_bn", "vgg_compact"])
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", ["alexnet_lrn", "vgg11"])
def test_copies(name):
    check_copies(name, CASES[name])


@pytest.mark.parametrize("name", ["alexnet_groups", "vgg11_bn"])
def test_fullgraph(name):
    torch._dynamo.reset()
    case = CASES[name]
    model = zoo.create(name, **case.options).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    (x,) = case.inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_papers_alexnet():
    """Channels, groups and options of sections 3 and 5."""
    features = zoo.alexnet_groups().features
    convolutions = [part for part in features if isinstance(part, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [96, 256, 384, 384, 256]
    assert [c.groups for c in convolutions] == [1, 2, 1, 2, 2]
    norms = [part for part in features if isinstance(part, LocalResponseNorm)]
    assert [(n.size, n.alpha, n.beta, n.k, n.activation) for n in norms] == [(5, 1e-4, 0.75, 2.0, "relu")] * 2
    assert [c.bias.unique().tolist() for c in convolutions] == [[0.0], [1.0], [0.0], [1.0], [1.0]]
    with torch.no_grad():
        assert features(torch.zeros(1, 3, 227, 227)).shape == (1, 256, 6, 6)
