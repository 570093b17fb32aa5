"""The 1x1 convolution's ops against their float64 reference: every option, storage type, odd size, slices of wider buffers."""

import pytest
import torch

from pyops import _library
from pyops.ops import _channel_ops, _pointwise_ops
from pyops.ops._activations import NAMES

ops = torch.ops.pyops
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and _library.has_cuda_kernels() else [])]
SIZES = [(2, 20, 5, 3, 17), (1, 37, 9, 8, 130), (3, 1, 4, 5, 1), (1, 600, 2, 3, 200), (5, 16, 30, 20, 96), (70, 24, 1, 1, 40)]
sizes = pytest.mark.parametrize("size", SIZES, ids=["x".join(map(str, s)) for s in SIZES])
kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
devices = pytest.mark.parametrize("device", DEVICES)
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PARTS = ("rows", "affine", "gate", "bias", "keep", "residual")
PLAIN: set[str] = set()
EVERYTHING = {*PARTS, "input_activation", "activation"}


def draw(size, dtype, device, parts, moments=False, weight_dtype=None, seed=0):
    """An op's arguments, with the named parts."""
    N, C, H, W, O = size
    g = torch.Generator().manual_seed(seed)

    def image(channels):
        return torch.randn(N, channels, H, W, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)

    def vector(*shape):
        return torch.randn(*shape, generator=g).to(device)

    x, weight = image(C), (torch.randn(O, C, generator=g) * C**-0.5).to(device, weight_dtype or dtype)
    made = dict(
        rows=torch.stack([vector(N * H * W), vector(N * H * W).abs() + 0.5]), affine=vector(3, C), gate=vector(N, C), bias=vector(O),
        keep=vector(N), residual=image(O),
    )  # fmt: skip
    rows, affine, gate, bias, keep, residual = (made[name] if name in parts else None for name in PARTS)
    before, after = (NAMES.index("silu" if name in parts else "none") for name in ("input_activation", "activation"))
    return [x, weight, rows, affine, gate, before, 0.1, bias, keep, residual, after, 0.1, moments]


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def close(found, expected, dtype):
    """Within the error of operands rounded to dtype, in a sum whose terms are of about the result's size."""
    assert found.shape == expected.shape
    if expected.numel():
        assert torch.isfinite(found).all()
        assert float((found.double() - expected).abs().max()) <= 8 * UNIT[dtype] * max(1.0, float(expected.abs().max()))


@devices
@kinds
@pytest.mark.parametrize("parts", [PLAIN, *({p} for p in sorted(EVERYTHING)), EVERYTHING], ids=lambda p: "+".join(sorted(p)) or "plain")
@sizes
def test_run(size, parts, dtype, device):
    args = draw(size, dtype, device, parts)
    found, moments = ops.pointwise_run(*args)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last) and moments.numel() == 0
    close(found, _pointwise_ops._run(*double(args))[0], dtype)


@devices
@kinds
@pytest.mark.parametrize("parts", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@sizes
def test_moments_are_those_of_the_stored_output(size, parts, dtype, device):
    output, moments = ops.pointwise_run(*draw(size, dtype, device, parts, moments=True))
    expected = _channel_ops._moments(output.double())
    torch.testing.assert_close(moments[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_weights_of_16_bit_images(dtype, device):
    args = draw(SIZES[1], dtype, device, {"bias"}, weight_dtype=torch.float32)
    close(ops.pointwise_run(*args)[0], _pointwise_ops._run(*double(args))[0], dtype)


@devices
@kinds
@pytest.mark.parametrize("parts", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_slices_of_wider_buffers(parts, dtype, device):
    """Reads channels out of one buffer and writes channels of another, and nothing beside them."""
    args = draw((2, 20, 5, 3, 18), dtype, device, parts)
    wide = torch.randn(2, 50, 5, 3).to(device, dtype).contiguous(memory_format=torch.channels_last)
    args[0] = wide[:, 7:27]
    assert args[0].stride(3) == 50
    expected = _pointwise_ops._run(*double(args))[0]
    close(ops.pointwise_run(*args)[0], expected, dtype)
    buffer = torch.full((2, 40, 5, 3), 7.0, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    ops.pointwise_into(buffer[:, 11:29], *args[:-1])
    close(buffer[:, 11:29], expected, dtype)
    assert buffer[:, :11].eq(7).all() and buffer[:, 29:].eq(7).all()


@devices
@kinds
def test_integers_are_exact(dtype, device):
    g = torch.Generator().manual_seed(0)
    small = lambda *shape: torch.randint(-1, 2, shape, generator=g).to(device, dtype)  # noqa: E731
    x, weight, bias = small(2, 100, 7, 5).contiguous(memory_format=torch.channels_last), small(70, 100), small(70).float()
    found, _ = ops.pointwise_run(x, weight, None, None, None, 0, 0.0, bias, None, None, 0, 0.0, False)
    assert torch.equal(found.double(), torch.einsum("nchw,oc->nohw", x.double(), weight.double()) + bias.double()[:, None, None])


@devices
@pytest.mark.parametrize("size", [(0, 5, 4, 4, 7), (2, 5, 0, 4, 7)])
def test_nothing(size, device):
    output, moments = ops.pointwise_run(*draw(size, torch.float32, device, PLAIN, moments=True))
    assert output.shape == (size[0], 7, size[2], 4) and moments.eq(0).all()


@pytest.mark.skipif(_library.not_loaded_reason() is not None, reason="a promise of the compiled kernels")
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("size", [SIZES[3], SIZES[4]])
def test_same_bits_on_any_number_of_threads(size, threads):
    args = draw(size, torch.float32, "cpu", EVERYTHING, moments=True)
    expected, before = ops.pointwise_run(*args), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(ops.pointwise_run(*args), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(_library.not_loaded_reason() is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])
@pytest.mark.parametrize("parts", [(), ("affine",), ("gate",), ("affine", "gate")], ids=lambda p: "+".join(p) or "plain")
@sizes
def test_backward_in_one_pass(size, parts, activation):
    args = draw(size, torch.float32, "cpu", set(parts))
    x, weight, _, affine, gate = args[:5]
    grad = torch.randn(size[0], size[4], *size[2:4], generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    options = (affine, gate, NAMES.index(activation), 0.1)
    a = _channel_ops._apply(x.double(), *double([affine, None, None, None, None]), *options[2:])
    gated = a if gate is None else a * gate.double()[:, :, None, None]
    expected_a = torch.einsum("nohw,oc->nchw", grad.double(), weight.double())
    expected = (expected_a, torch.einsum("nohw,nchw->oc", grad.double(), gated), (expected_a * a).sum((2, 3)))
    found = ops.pointwise_back(grad, x, weight, *options, True, True)
    for result, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=2e-5, atol=2e-6 * float(truth.abs().max()))
    nothing, weight_only, _ = ops.pointwise_back(grad, x, weight, *options, False, True)
    assert nothing.numel() == 0 and torch.equal(weight_only, found[1])
    torch.library.opcheck(
        ops.pointwise_back.default, (grad, x, weight, *options, True, True), test_utils=("test_schema", "test_faketensor")
    )


@devices
def test_opcheck(device):
    for moments in (False, True):
        args = draw(SIZES[0], torch.float32, device, EVERYTHING, moments)
        torch.library.opcheck(ops.pointwise_run.default, args, test_utils=("test_schema", "test_faketensor"))
    output = torch.zeros(2, 17, 5, 3, device=device).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.pointwise_into.default, (output, *args[:-1]), test_utils=("test_schema", "test_faketensor"))


def test_wrong_tensors_are_refused():
    if _library.not_loaded_reason():
        pytest.skip("needs the compiled kernels")
    for index, name in ((2, "rows"), (3, "affine"), (4, "gate"), (7, "bias"), (8, "keep")):
        args = draw(SIZES[0], torch.float32, "cpu", EVERYTHING)
        args[index] = args[index][..., :-1]
        with pytest.raises(RuntimeError, match=f"{name}: wrong shape"):
            ops.pointwise_run(*args)
    args = draw(SIZES[0], torch.float32, "cpu", EVERYTHING)
    with pytest.raises(RuntimeError, match="weight: expected"):
        ops.pointwise_run(args[0], args[1][:, :3], *args[2:])
    with pytest.raises(RuntimeError, match="output: expected channels_last"):
        ops.pointwise_into(torch.zeros(2, 17, 5, 3), *args[:-1])
