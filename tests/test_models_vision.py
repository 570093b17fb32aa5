"""torchvision's other networks, beside torchvision's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyops import models as zoo
from pyops.testing.twins import twin

from .conftest import assert_gate
from .models import Case, both, check_copies, check_inference, check_training, doubled, leaves, liven


def images(size: int, batch: int = 2):
    return lambda: (torch.randn(batch, 3, size, size),)


def laid_out(size: int, batch: int, channels: int = 3):
    """Such images in channels_last, for a twin to compute the very sums that ours does."""
    return lambda: (torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last),)


def still(model: nn.Module) -> None:
    """No random numbers in training, which a float64 network draws otherwise."""
    for part in model.modules():
        if isinstance(part, nn.Dropout) or type(part).__name__ in ("DropPath", "StochasticDepth"):
            part.p = 0.0


def shorten(model: nn.Module) -> None:
    """Two blocks of each stage, and numbers for the parameters that `uninitialised` left without any."""
    for part in model.modules():
        if isinstance(part, nn.Sequential) and len(part) > 2 and len({type(block) for block in part}) == 1:
            del part[2:]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)


def rebuild(model: nn.Module) -> None:
    """A DenseNet of few layers: after more, in training, one rounding moves every gradient."""
    model.__init__(16, (2, 3, 2), 24, num_classes=10)
    shorten(model)


def thin(model: nn.Module) -> None:
    """An Inception with each kind of block once or twice."""
    for name in ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c"):
        setattr(model, name, nn.Identity())


def smooth(model: nn.Module) -> None:
    """As `still`, with SiLU for ReLU, at whose edge one rounding, magnified by batch norm of few values, decides about a gradient.
    torchvision calls a function there, which `test_training` replaces."""
    still(model)
    for part in model.modules():
        if hasattr(part, "relu"):
            part.relu = nn.SiLU(inplace=True)


@pytest.fixture
def uninitialised(monkeypatch):
    """Large networks are built soon: nobody draws their weights."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


TEN = dict(num_classes=10)
INCEPTION = dict(num_classes=10, init_weights=False)

FIRST = {  # of each family
    "densenet121": Case(laid_out(64, 2), TEN, still, rebuild),
    "inception_v3": Case(laid_out(96, 4), INCEPTION | dict(aux_logits=False), smooth, thin),
    "efficientnet_b0": Case(images(64), TEN, still),
    "mobilenet_v2": Case(images(64), TEN, still),
    "convnext_tiny": Case(images(64), TEN | dict(layer_scale=0.5), still, shorten),  # at the paper's 1e-6 no test would see a block
    "vit_b_16": Case(images(32), TEN | dict(image_size=32, representation_size=24), still, shorten),
    "swin_t": Case(images(64), TEN, still, shorten),
    "swin_v2_t": Case(images(64), TEN, still, shorten),
}
OTHERS = {
    **{f"densenet{n}": Case(images(32, 1), TEN, shorten=shorten) for n in (161, 169, 201)},
    **{f"efficientnet_b{n}": Case(images(32, 1), TEN, shorten=shorten) for n in range(1, 8)},
    "convnext_small": Case(images(32, 1), TEN, shorten=shorten),
    "convnext_base": Case(images(32, 1), TEN, shorten=shorten),
    "vit_b_32": Case(images(64, 1), TEN | dict(image_size=64), shorten=shorten),
    "vit_l_16": Case(images(32, 1), TEN | dict(image_size=32), shorten=shorten),
    **{f"swin_{n}": Case(images(32, 1), TEN, shorten=shorten) for n in ("s", "b", "v2_s", "v2_b")},
}
CASES = FIRST | OTHERS


@pytest.mark.parametrize("name", CASES)
def test_whole_networks_have_torchvision_s_names(name):
    """In order; without memory, so that the largest ones cost nothing."""
    with torch.device("meta"):
        networks = [make(name, **CASES[name].options) for make in (zoo.create, twin)]
    ours, theirs = ([(key, t.shape, t.dtype) for key, t in network.state_dict().items()] for network in networks)
    assert ours == theirs
    ours, theirs = ([key for key, _ in network.named_parameters()] for network in networks)
    assert ours == theirs


@pytest.mark.parametrize("name", FIRST)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", OTHERS)
def test_inference_of_siblings(name, uninitialised):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", FIRST)
def test_training(name, monkeypatch):
    if CASES[name].prepare is smooth:
        monkeypatch.setattr(F, "relu", F.silu)
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", FIRST)
def test_copies(name):
    check_copies(name, CASES[name])


@pytest.mark.parametrize("name", ["efficientnet_b0", "inception_v3", "mobilenet_v2", "vit_b_16"])
def test_compiles(name):
    case = CASES[name]
    model, _ = both(name, case)
    inputs = case.inputs()
    with torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")(*inputs)
        torch.testing.assert_close(compiled, model(*inputs), rtol=1e-4, atol=1e-4)


def test_densenet_with_maxima():
    """torchvision has averages alone, until its pooling is replaced."""
    torch.manual_seed(0)
    ours, theirs = zoo.DenseNet(16, (2, 3, 2), 24, num_classes=10, transition="max").eval(), twin("densenet121").eval()
    rebuild(theirs)
    liven(theirs)
    ours.load_state_dict(theirs.eval().state_dict())
    for i in (1, 2):
        theirs.features.get_submodule(f"transition{i}").pool = nn.MaxPool2d(2, 2)
    check_outputs(Case(laid_out(64, 2)), ours, theirs)


def test_inception_with_its_auxiliary_classifier():
    ours, theirs = both("inception_v3", Case(images(299), INCEPTION, shorten=thin))
    check_outputs(Case(laid_out(17, 2, 768)), ours.AuxLogits.eval(), theirs.AuxLogits.eval())
    with torch.no_grad():
        outputs = ours.train()(torch.randn(2, 3, 299, 299))
    assert outputs._fields == ("logits", "aux_logits") and [tuple(y.shape) for y in outputs] == [(2, 10)] * 2


def test_inception_transforms_its_input():
    check_inference("inception_v3", Case(images(96, 1), INCEPTION | dict(aux_logits=False, transform_input=True), shorten=thin))


def check_outputs(case, ours, theirs):
    truth = copy.deepcopy(theirs).double()

    def draw(seed):
        torch.manual_seed(seed)
        inputs = case.inputs()
        with torch.no_grad():
            return leaves(ours(*inputs)), leaves(truth(*doubled(inputs))), leaves(theirs(*inputs))

    assert_gate(draw, torch.float32)
