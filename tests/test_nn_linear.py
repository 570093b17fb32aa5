"""LinearAct: the same numbers whatever it keeps, and what makes it forget."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import pyops
from pyops.nn import LinearAct
from pyops.testing import within_gate


def layers(layer, x, residual=None):
    y = F.linear(x, layer.weight, layer.bias)
    return F.gelu(y if residual is None else y + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_inference(rows, dtype):
    draws = []
    for seed in range(6):
        torch.manual_seed(seed)
        layer, x, residual = (
            LinearAct(40, 24, activation="gelu").to(dtype),
            torch.randn(rows, 40).to(dtype),
            torch.randn(rows, 24).to(dtype),
        )
        truth = copy.deepcopy(layer).double()
        with torch.no_grad():
            for beside in (None, residual):
                for _ in range(2):  # laid out, then found
                    found = layer(x, beside)
                    draws.append((found, layers(truth, x.double(), None if beside is None else beside.double()), layers(layer, x, beside)))
    assert within_gate(draws, dtype) is None


@pytest.mark.parametrize("rows", [2, 10])
def test_keeps_nothing_stale(rows):
    torch.manual_seed(0)
    layer, x = LinearAct(40, 24, activation="gelu"), torch.randn(rows, 40)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layers(layer, x), rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        layer.weight.mul_(2)
    check()
    layer.train()
    layer.weight.data.mul_(2)  # bumps no version: train() and eval() make it forget
    layer.eval()
    check()
    layer.load_state_dict(LinearAct(40, 24).state_dict())
    check()
    layer.activation = "gelu"
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Dropout(0.5))
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))  # the weight is another at every call


def test_gradients_and_forward_mode():
    torch.manual_seed(0)
    layer, x = LinearAct(40, 24, activation="gelu"), torch.randn(10, 40, requires_grad=True)
    found = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    for a, b in zip(found, torch.autograd.grad(layers(layer, x).sum(), [x, *layer.parameters()]), strict=True):
        torch.testing.assert_close(a, b)
    image, weight = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3)
    for call, value in ((layer, x.detach()), (lambda v: pyops.conv_bn_act(v, weight, padding=1), image)):
        with torch.no_grad(), forward_ad.dual_level():
            assert forward_ad.unpack_dual(call(forward_ad.make_dual(value, torch.ones_like(value)))).tangent is not None


def test_state_dict_and_refusals():
    layer = LinearAct(40, 24)
    nn.Linear(40, 24).load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer(torch.randn(10, 40))
        with pytest.raises(ValueError, match=r"weight: expected \[N, 39\]"):
            layer(torch.randn(10, 39))
        with pytest.raises(ValueError, match="residual: expected shape"):
            layer(torch.randn(10, 40), torch.randn(10, 40))
    with pytest.raises(ValueError, match="activation: expected one of"):
        LinearAct(4, 4, activation="swish")
    assert sorted(layer.state_dict()) == ["bias", "weight"]


def test_fake_tensors_leave_no_trace():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layers_and_inputs = (LinearAct(40, 24), torch.randn(10, 40)), (pyops.nn.ConvBNAct(16, 32, 3).eval(), torch.randn(2, 16, 30, 30))
    for layer, x in layers_and_inputs:
        with torch.no_grad():
            expected = layer(x)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert isinstance(layer(mode.from_tensor(x)), FakeTensor)
            assert torch.equal(layer(x), expected)
