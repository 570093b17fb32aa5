"""LinearAct: the same numbers whatever it keeps, and what makes it forget."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import pyops
from pyops.nn import LinearAct
from pyops.ops import _activations, _machine
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


@pytest.fixture
def mkl_calls(monkeypatch):
    """Numbers of rows that MKL multiplied, on a machine where it is the faster library."""
    calls: list[int] = []
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        pytest.skip("PyTorch was built without MKL")
    multiply = torch.ops.mkl._mkl_linear
    monkeypatch.setattr(_machine, "prefers_mkl", lambda: True)
    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", lambda *args: calls.append(args[-1]) or multiply(*args))
    return calls


@pytest.mark.parametrize("activation", _activations.NAMES)
def test_inference_by_mkl(activation, mkl_calls):
    draws = []
    for seed in range(6):
        torch.manual_seed(seed)
        layer, wide, residual = LinearAct(128, 96, activation=activation), torch.randn(70, 256), torch.randn(70, 96)
        truth, x, apply = copy.deepcopy(layer).double(), wide[:, ::2], _activations.REFERENCE[activation]
        with torch.no_grad():
            for beside in (None, residual):
                for _ in range(3):
                    plus = torch.zeros(()) if beside is None else beside
                    expected = apply(F.linear(x.double(), truth.weight, truth.bias) + plus.double(), 0.01)
                    draws.append((layer(x, beside), expected, apply(F.linear(x, layer.weight, layer.bias) + plus, 0.01)))
    assert within_gate(draws, torch.float32) is None
    assert len(mkl_calls) == 6 * 2 * 2  # all but the first of either kind


def test_mkl_layouts_are_few(mkl_calls):
    layer = LinearAct(128, 96)
    with torch.no_grad():
        for rows in (50, 51, 50, 51, 20, 20):  # none comes twice in a row, or too few rows
            layer(torch.randn(rows, 128))
        assert not mkl_calls
        for rows in range(50, 60):
            for _ in range(3):
                x = torch.randn(rows, 128)
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        assert mkl_calls == [rows for rows in (50, 51, 52, 53) for _ in range(2)]
        layer.weight.mul_(2)
        for _ in range(2):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        assert mkl_calls[-1] == 59


def test_the_faster_library_is_measured(monkeypatch):
    monkeypatch.setattr(_machine, "MEASURES", True)
    _machine._mkl_is_faster.cache_clear()
    assert _machine.prefers_mkl() in (True, False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not _machine.prefers_mkl()
    finally:
        torch.use_deterministic_algorithms(False)
