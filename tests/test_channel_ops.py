"""The channelwise ops against their float64 reference: every option, storage type, odd size and cut of the work."""

import itertools

import pytest
import torch

from pyops import _library
from pyops.ops import _channel_ops
from pyops.ops._activations import NAMES

ops = torch.ops.pyops
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and _library.has_cuda_kernels() else [])]
SIZES = [(2, 20, 5, 3), (1, 37, 9, 8), (3, 1, 4, 5), (2, 600, 2, 3), (5, 16, 40, 40), (70, 24, 1, 1)]
sizes = pytest.mark.parametrize("size", SIZES, ids=["x".join(map(str, s)) for s in SIZES])
kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
devices = pytest.mark.parametrize("device", DEVICES)
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(size, dtype, device, seed=0):
    """A dict of every tensor an op may take."""
    N, C, H, W = size
    g = torch.Generator().manual_seed(seed)

    def image():
        return torch.randn(N, C, H, W, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)

    def vector(*shape):
        return torch.randn(*shape, generator=g).to(device)

    return dict(
        input=image() + 3, grad=image(), residual=image(), affine=vector(3, C), keep=vector(N), gate=vector(N, C), offset=vector(N, C),
        terms=vector(2, C),
    )  # fmt: skip


def double(*args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def close(found, expected, dtype, terms=1):
    """Within a few units of the last place of the largest value that went into a sum of `terms`."""
    assert found.shape == expected.shape and found.device == expected.device
    bound = 8 * UNIT[dtype] * max(1, terms) ** 0.5 * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    assert torch.isfinite(found).all()
    assert float((found.double() - expected).abs().max() if expected.numel() else 0) <= bound


def options(t, flags):
    return [t[name] if flag else None for name, flag in zip(("affine", "keep", "residual", "gate", "offset"), flags, strict=True)]


FLAGS = [(1, 0, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (1, 1, 1, 0, 0), (1, 0, 1, 1, 1), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)]
flag_sets = pytest.mark.parametrize("flags", FLAGS, ids=["".join(map(str, f)) for f in FLAGS])


@devices
@kinds
@sizes
def test_moments(size, dtype, device):
    x = draw(size, dtype, device)["input"]
    found, expected = ops.channel_moments(x), _channel_ops._moments(x.double())
    close(found[0], expected[0], torch.float32)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(_library.not_loaded_reason() is not None, reason="a promise of the compiled kernels")
@devices
def test_moments_of_a_large_mean(device):
    """A mean of 10^4 deviations: sums of squares would lose every digit of the variance."""
    x = (
        (torch.randn(8, 24, 15, 15, generator=torch.Generator().manual_seed(0)) + 1e4)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )
    found, expected = ops.channel_moments(x), _channel_ops._moments(x.double())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=0)


@devices
@kinds
@flag_sets
@sizes
def test_apply(size, flags, dtype, device):
    t = draw(size, dtype, device)
    args = (t["input"], *options(t, flags), NAMES.index("silu"), 0.1)
    found = ops.channel_apply(*args)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    close(found, _channel_ops._apply(*double(*args)), dtype)


@devices
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation, device):
    t = draw((2, 20, 5, 3), torch.float32, device)
    args, number = (t["input"] - 3, *options(t, (1, 0, 0, 0, 0))), NAMES.index(activation)
    close(ops.channel_apply(*args, number, 0.1), _channel_ops._apply(*double(*args), number, 0.1), torch.float32)
    args = (t["grad"], t["input"] - 3, t["affine"], t["terms"], None, None, None, None)
    found, _ = ops.channel_grad(*args, number, 0.1, False)
    close(found, _channel_ops._grad(*double(*args), number, 0.1, False)[0], torch.float32)


@devices
@kinds
@pytest.mark.parametrize("with_grad", [False, True])
@sizes
def test_sums(size, with_grad, dtype, device):
    t = draw(size, dtype, device)
    args = (t["input"], t["grad"] if with_grad else None, *options(t, (1, 1, 1, 0, 0))[:3], NAMES.index("relu"), 0.1)
    close(ops.channel_sums(*args), _channel_ops._sums(*double(*args)), torch.float32, size[2] * size[3])


@devices
@kinds
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("flags", [f for f in FLAGS if f[0]], ids=["".join(map(str, f)) for f in FLAGS if f[0]])
@sizes
def test_gradients(size, flags, activation, dtype, device):
    t = draw(size, dtype, device)
    affine, *rest = options(t, flags)
    tail = (*rest, NAMES.index(activation), 0.1)
    args = (t["grad"], t["input"], affine, *tail)
    close(ops.channel_reduce(*args), _channel_ops._reduce(*double(*args)), torch.float32, size[0] * size[2] * size[3])
    for terms, wanted in itertools.product((None, t["terms"]), (False, True)):
        args = (t["grad"], t["input"], affine, terms, *tail)
        found, du = ops.channel_grad(*args, wanted)
        expected, expected_du = _channel_ops._grad(*double(*args), wanted)
        close(found, expected, dtype)
        if wanted:
            close(du, expected_du, dtype)
        grad = t["grad"].clone(memory_format=torch.channels_last)
        ops.channel_grad_(grad, *args[1:])
        assert torch.equal(grad, found)


@devices
@pytest.mark.parametrize("size", [(0, 5, 4, 4), (2, 5, 0, 4)])
def test_nothing(size, device):
    t = draw(size, torch.float32, device)
    assert ops.channel_moments(t["input"]).eq(0).all()
    assert ops.channel_apply(t["input"], t["affine"], None, None, None, None, 0, 0.0).shape == size
    assert ops.channel_sums(t["input"], None, None, None, None, 0, 0.0).eq(0).all()
    assert ops.channel_reduce(t["grad"], t["input"], t["affine"], None, None, None, None, 0, 0.0).eq(0).all()
    assert ops.channel_grad(t["grad"], t["input"], t["affine"], None, None, None, None, None, 0, 0.0, False)[0].shape == size


@devices
def test_any_layout(device):
    """What is not channels_last is copied; nothing is read by a wrong stride."""
    t = draw((2, 20, 5, 3), torch.float32, device)
    x, affine = t["input"], t["affine"].t().contiguous().t()
    expected = ops.channel_apply(x, t["affine"], None, t["residual"], None, None, 0, 0.0)
    assert torch.equal(ops.channel_apply(x.contiguous(), affine, None, t["residual"].contiguous(), None, None, 0, 0.0), expected)


@pytest.mark.skipif(_library.not_loaded_reason() is not None, reason="a promise of the compiled kernels")
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_same_bits_on_any_number_of_threads(threads):
    t = draw((5, 16, 40, 40), torch.float32, "cpu")
    calls = (
        lambda: ops.channel_moments(t["input"]),
        lambda: ops.channel_sums(t["input"], None, None, None, None, 3, 0.0),
        lambda: ops.channel_reduce(t["grad"], t["input"], t["affine"], None, None, None, None, 3, 0.0),
    )
    expected, before = [call() for call in calls], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(call(), e) for call, e in zip(calls, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@devices
def test_opcheck(device):
    t = draw((2, 20, 5, 3), torch.float32, device)
    rest = (t["keep"], t["residual"], t["gate"], t["offset"], 3, 0.1)
    cases = (
        ("moments", (t["input"],)),
        ("apply", (t["input"], t["affine"], *rest)),
        ("sums", (t["input"], t["grad"], t["affine"], *rest[:2], 3, 0.1)),
        ("reduce", (t["grad"], t["input"], t["affine"], *rest)),
        ("grad", (t["grad"], t["input"], t["affine"], t["terms"], *rest, True)),
        ("grad", (t["grad"], t["input"], t["affine"], t["terms"], *rest, False)),
        ("grad_", (t["grad"], t["input"], t["affine"], t["terms"], *rest)),
    )
    for name, args in cases:
        torch.library.opcheck(getattr(ops, f"channel_{name}").default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name, change", [("affine", 2), ("keep", 1), ("gate", 1), ("offset", 0)])
def test_wrong_vectors_are_refused(name, change):
    if _library.not_loaded_reason():
        pytest.skip("needs the compiled kernels")
    t = draw((2, 20, 5, 3), torch.float32, "cpu")
    t[name] = t[name][..., :change]
    with pytest.raises(RuntimeError, match=f"{name}: wrong shape"):
        ops.channel_apply(t["input"], t["affine"], t["keep"], t["residual"], t["gate"], t["offset"], 0, 0.0)
