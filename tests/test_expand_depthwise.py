"""The fused expansion and depthwise convolution: the op against plain convolutions, and the blocks that choose it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyops import _library
from pyops.nn import MBConv
from pyops.ops import _conv_call, _expand_depthwise_ops, _pointwise_ops
from pyops.ops._activations import NAMES, apply
from pyops.testing import within_gate

from .test_nn_conv import build, image, one_by_one, shaken

op = torch.ops.pyops.expand_depthwise
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and _library.has_cuda_kernels() else [])]
SIZES = [(2, 20, 36, 9, 8), (1, 13, 7, 5, 6), (3, 40, 136, 14, 14), (1, 8, 64, 33, 31)]  # N, C, E, H, W
sizes = pytest.mark.parametrize("size", SIZES, ids=["x".join(map(str, s)) for s in SIZES])
kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
devices = pytest.mark.parametrize("device", DEVICES)


def draw(size, dtype, device, K=3, stride=1, activation="silu", biases=True, means=True, seed=0):
    """The op's arguments; float32 operands of the expansion are numbers that tf32 has."""
    N, C, E, H, W = size
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    fine = torch.bfloat16 if dtype == torch.float32 else dtype
    x = rand(N, C, H, W).to(fine).to(device, dtype).contiguous(memory_format=torch.channels_last)
    expand, depthwise = (rand(E, C) / C**0.5).to(fine).float().to(device), (rand(E, 1, K, K) / K).to(device)
    first, second = (rand(E).to(device) if biases else None for _ in range(2))
    return x, expand, first, depthwise, second, stride, NAMES.index(activation), 0.1, means, True


def plain(args):
    """The same in PyTorch's convolutions, in the images' own dtype."""
    x, expand, first, depthwise, second, stride, activation, slope, *_ = args
    cast = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    e = apply(F.conv2d(x, cast(expand)[:, :, None, None], cast(first)), activation, slope)
    y = F.conv2d(e, cast(depthwise), cast(second), stride, depthwise.shape[2] // 2, groups=len(depthwise))
    y = apply(y, activation, slope)
    return y, y.mean((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))


def double(args):
    return [a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args]


@devices
@kinds
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [3, 5, 7])
@sizes
def test_against_plain_convolutions(size, K, stride, dtype, device):
    draws = []
    for seed in range(4):
        args = draw(size, dtype, device, K, stride, seed=seed)
        draws.append((op(*args), plain(double(args)), plain(args)))
    output, means = draws[0][0]
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last) and means.dtype == torch.float32
    for found in zip(*(zip(*each, strict=True) for each in draws), strict=True):
        reason = within_gate([(a.cpu(), b, c.cpu()) for a, b, c in found], dtype)
        assert reason is None, reason


@devices
@kinds
def test_integers_are_exact(dtype, device):
    args = [a.sign() if isinstance(a, torch.Tensor) else a for a in draw((2, 12, 70, 13, 17), dtype, device, activation="none")]
    output, means = op(*args)
    assert torch.equal(output.cpu().double(), plain(double(args))[0])
    torch.testing.assert_close(means.cpu().double(), plain(double(args))[1], rtol=1e-6, atol=1e-7)


@devices
def test_layouts_and_what_is_left_out(device):
    args = draw(SIZES[0], torch.bfloat16, device, biases=False, means=False)
    expected, means = op(*args)
    assert means.numel() == 0
    wide = torch.randn(2, 50, 9, 8).to(device, torch.bfloat16).contiguous(memory_format=torch.channels_last)
    wide[:, 7:27] = args[0]
    for x in (args[0].contiguous(), wide[:, 7:27]):
        output, _ = op(x, *args[1:])
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    output, means = op(args[0][:0], *args[1:-2], True, True)
    assert output.shape == (0, 36, 9, 8) and means.shape == (0, 36)


@devices
@kinds
@pytest.mark.parametrize("means", [False, True])
def test_opcheck(means, dtype, device):
    torch.library.opcheck(op.default, draw((2, 6, 8, 5, 4), dtype, device, 5, 2, means=means))


def test_what_it_suits():
    suits = lambda *facts: _expand_depthwise_ops.unsuited(*facts) is None  # noqa: E731
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert suits(half, (1, 24, 56, 56), 3, 1, False) and suits(half, (0, 640, 7, 7), 5, 1, False)
    assert suits(single, (1, 24, 56, 56), 3, 1, True) and not suits(single, (1, 24, 56, 56), 3, 1, False)
    assert not suits(double, (1, 24, 56, 56), 3, 1, True)
    assert not suits(half, (1, 24, 56, 56), 9, 1, False) and not suits(half, (1, 24, 56, 56), 3, 3, False)
    assert not suits(half, (1, 24, 0, 56), 3, 1, False)
    assert not suits(half, (1, 1024, 56, 56), 7, 1, False), "halos of so many channels cost more than the memory they save"


# ---------------------------------------------------------------------------------------------------------------- in the block


class Calls(TorchDispatchMode):
    """The names of pyops' ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pyops":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def run(block, x):
    with torch.no_grad(), Calls() as calls:
        return block(x), calls.names


def products(names):
    """1x1 convolutions; without gates they take another way where tensors are really on a CPU."""
    return names.count("pointwise_run") + names.count("conv_run")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """CPU tensors take the way of CUDA ones: "cuda" calls the default overloads, which exist for every device."""
    monkeypatch.setattr(_conv_call, "unsupported", lambda device, dtype, backend: None)
    monkeypatch.setattr(_pointwise_ops, "tf32_allowed", lambda input: True)


@kinds
@pytest.mark.parametrize("name", ["s2", "s3", "no_squeeze", "odd_channels"])
def test_a_block_on_cuda_expands_on_the_chip(name, dtype, as_if_on_a_gpu, monkeypatch):
    draws = []
    for seed in range(8):
        block, shape = build(name, seed, backend="cuda")
        block.to(dtype)
        x = image(2, *shape, seed=seed, dtype=dtype)
        found, names = run(block, x)
        assert names.count("expand_depthwise") == 1 and not any("depthwise_infer" in each for each in names)
        assert products(names) == 1, "the projection"
        with monkeypatch.context() as without:
            without.setattr(_expand_depthwise_ops, "unsuited", lambda *facts: "not wanted")
            apart, names = run(block, x)
            assert "expand_depthwise" not in names and products(names) == 2
        with torch.no_grad():
            truth = one_by_one(copy.deepcopy(block).double(), x.double())
            draws.append((found, truth, one_by_one(block, x)))
        assert found.is_contiguous(memory_format=torch.channels_last) and found.shape == apart.shape
        unit = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert float((found - apart).norm() / apart.norm()) < 3 * unit
    reason = within_gate(draws, dtype)
    assert reason is None, reason


def test_layouts_of_a_block(as_if_on_a_gpu):
    block, shape = build("s3", backend="cuda")
    x = image(2, *shape, layout=torch.contiguous_format)
    found, names = run(block, x)
    assert "expand_depthwise" in names and found.is_contiguous()
    torch.testing.assert_close(found, run(block, x.contiguous(memory_format=torch.channels_last))[0])
    assert run(block, x[:0])[0].shape == x[:0].shape


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.block[1].__setitem__(2, torch.nn.ReLU()),
        lambda block: setattr(block.block[1][0], "padding", (1, 1)),
        lambda block: setattr(block.block[1][0], "dilation", (2, 2)),
        lambda block: setattr(block, "backend", "triton"),
        lambda block: setattr(block, "backend", "eager"),
    ],
    ids=["two_activations", "padding", "dilation", "triton", "eager"],
)
def test_a_block_that_it_cannot_stand_for(change, as_if_on_a_gpu):
    block, shape = build("s3", backend="cuda")
    x = image(2, *shape)
    with torch.no_grad():
        assert block._expand_depthwise(x, *block._parts()[:2], True) is not None
        change(block)
        assert block._expand_depthwise(x, *block._parts()[:2], True) is None


def test_auto_keeps_to_pytorch_until_it_is_timed(monkeypatch):
    """On CUDA tensors auto takes what `ORDER` names first."""
    assert _conv_call.ORDER["cuda"][0] == "eager"
    monkeypatch.setattr(_conv_call, "unsupported", lambda device, dtype, backend: None)
    monkeypatch.setitem(_conv_call.ORDER, "cpu", _conv_call.ORDER["cuda"])
    block = shaken(MBConv(16, 16)).eval().to(torch.bfloat16)
    monkeypatch.setattr(block, "_pack", lambda: None)  # no kernel of a CPU's
    x = image(1, 16, 9, 9, dtype=torch.bfloat16)
    assert "expand_depthwise" not in run(block, x)[1]
    monkeypatch.setitem(_conv_call.ORDER, "cpu", ("cuda",))
    assert "expand_depthwise" in run(block, x)[1]


def test_fullgraph(as_if_on_a_gpu):
    torch._dynamo.reset()
    block, shape = build("s3", backend="cuda")
    block.to(torch.bfloat16)
    x = image(2, *shape, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), block(x))
