"""The dense convolution's ops against their reference in float64: odd sizes, groups, phases of the transpose, layouts, exact integers."""

import pytest
import torch

import pyops
from pyops import _library
from pyops.ops import _channel_ops
from pyops.ops import _dense_ops as dense
from pyops.ops._activations import NAMES
from pyops.ops._depthwise_ops import output_size
from pyops.testing import within_gate

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and _library.has_cuda_kernels() else [])]
SIZES = {  # N, C, O, (H, W), kernel, stride, padding, dilation, groups
    "3x3": (2, 64, 72, (12, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": (3, 24, 40, (15, 14), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stem": (2, 3, 64, (31, 29), (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "groups": (2, 32, 96, (9, 9), (5, 5), (1, 1), (2, 2), (1, 1), 2),
    "uneven": (2, 5, 6, (9, 11), (2, 3), (3, 2), (1, 0), (2, 1), 1),
    "gaps": (2, 16, 8, (9, 8), (1, 1), (3, 2), (0, 0), (1, 1), 1),
    "many": (4, 128, 32, (40, 40), (3, 2), (1, 1), (1, 1), (1, 1), 1),
}
OPERATIONS = {"conv_run": dense._run, "conv_transpose_run": dense._transpose_run, "conv_wgrad": dense._wgrad}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
kinds = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
devices = pytest.mark.parametrize("device", DEVICES)
operations = pytest.mark.parametrize("operation", OPERATIONS)


def draw(operation, size, dtype, device, options=True, integers=False):
    """An op's arguments, without moments."""
    N, C, O, image, kernel, stride, padding, dilation, groups = size
    g = torch.Generator().manual_seed(0)

    def tensor(*shape):
        made = torch.randint(-1, 2, shape, generator=g).float() if integers else torch.randn(*shape, generator=g)
        return made.to(device, dtype)

    def layout(t):
        return t.contiguous(memory_format=torch.channels_last)

    out = output_size(image, kernel, stride, padding, dilation)
    x, grad = layout(tensor(N, C, *image)), layout(tensor(N, O, *out))
    where = [list(stride), list(padding), list(dilation), groups]
    if operation == "conv_wgrad":
        return [grad, x, list(kernel), *where]
    channels, end = (O, out) if operation == "conv_run" else (C, image)
    bias = tensor(channels).float() if options else None
    residual = layout(tensor(N, channels, *end)) if options else None
    weight = tensor(O, C // groups, *kernel) * (1 if integers else (x.shape[1] // groups * kernel[0] * kernel[1]) ** -0.5)
    how = [NAMES.index("silu") if options and not integers else 0, 0.1, False]
    if operation == "conv_run":
        return [x, weight, bias, residual, *where, *how]
    return [grad, weight, bias, residual, list(stride), list(padding), list(image), list(dilation), groups, *how]


def call(operation, args, *last):
    return getattr(torch.ops.pyops, operation)(*args, *last)


def image(operation, args, tf32=False):
    return call(operation, args, tf32) if operation == "conv_wgrad" else call(operation, args, False, tf32)[0]


def reference(operation, args, dtype=None):
    """In `dtype`, or in the images' own: products and sums are then float32's, rounded once."""
    args = [a.cpu().to(dtype or a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
    return OPERATIONS[operation](*args) if operation == "conv_wgrad" else OPERATIONS[operation](*args, False)[0]


def held_to_the_gate(operation, found, args, dtype):
    truth = reference(operation, args, torch.float64)
    assert found.shape == truth.shape and found.dtype == dtype and torch.isfinite(found).all()
    missed = within_gate([(found.cpu(), truth, reference(operation, args))], dtype, gradient=operation == "conv_wgrad")
    assert missed is None, missed


@devices
@kinds
@pytest.mark.parametrize("options", [False, True], ids=["plain", "everything"])
@operations
@sizes
def test_values(size, operation, options, dtype, device):
    args = draw(operation, size, dtype, device, options)
    found = image(operation, args)
    held_to_the_gate(operation, found, args, dtype)
    last = torch.contiguous_format if operation == "conv_wgrad" else torch.channels_last
    assert found.is_contiguous(memory_format=last)
    assert torch.equal(found, image(operation, args)), "two runs gave different bits"


@devices
@kinds
@operations
@sizes
def test_integers_are_exact(size, operation, dtype, device):
    args = draw(operation, size, dtype, device, integers=True)
    for tf32 in (False, True):
        assert torch.equal(image(operation, args, tf32).cpu(), reference(operation, args, torch.float64).to(dtype))


@devices
@kinds
@operations
def test_any_layout(operation, dtype, device):
    """Planar images, channels out of a wider buffer, a channels_last weight."""
    args = draw(operation, SIZES["groups"], dtype, device, integers=True)
    wide = torch.cat([args[0], args[0]], 1).contiguous(memory_format=torch.channels_last)
    expected = image(operation, args)
    for first in (args[0].contiguous(), wide[:, args[0].shape[1] :], args[0].flip(3).flip(3)):
        assert torch.equal(image(operation, [first, *args[1:]]), expected)
    other = args[1].contiguous(memory_format=torch.channels_last)
    assert torch.equal(image(operation, [args[0], other, *args[2:]]), expected)


@devices
@kinds
@pytest.mark.parametrize("operation", ["conv_run", "conv_transpose_run"])
@sizes
def test_moments_are_those_of_the_stored_output(size, operation, dtype, device):
    output, moments = call(operation, draw(operation, size, dtype, device), True, False)
    expected = _channel_ops._moments(output.double())
    torch.testing.assert_close(moments[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@devices
@pytest.mark.parametrize("operation", ["conv_run", "conv_transpose_run"])
def test_a_residual_after_the_activation(operation, device):
    args = draw(operation, SIZES["strided"], torch.bfloat16, device)
    args[-1] = True
    held_to_the_gate(operation, image(operation, args), args, torch.bfloat16)


@pytest.mark.skipif("cuda" not in DEVICES, reason="a promise of the CUDA kernels")
def test_wrong_arguments_are_named():
    x, weight = torch.zeros(1, 4, 5, 5, device="cuda"), torch.zeros(6, 4, 3, 3, device="cuda")
    run, pair = torch.ops.pyops.conv_run, ([1, 1], [1, 1], [1, 1])
    rest = (0, 0.0, False, False)
    with pytest.raises(RuntimeError, match="groups: expected a divisor"):
        run(x, weight, None, None, *pair, 4, *rest)
    with pytest.raises(RuntimeError, match="weight: wrong shape"):
        run(x, weight[:, :2], None, None, *pair, 1, *rest)
    with pytest.raises(RuntimeError, match="bias: wrong shape"):
        run(x, weight, torch.zeros(5, device="cuda"), None, *pair, 1, *rest)
    with pytest.raises(RuntimeError, match="residual: wrong shape"):
        run(x, weight, None, x, *pair, 1, *rest)
    with pytest.raises(RuntimeError, match="kernel is larger"):
        run(x, torch.zeros(6, 4, 9, 9, device="cuda"), None, None, *pair, 1, *rest)
    with pytest.raises(RuntimeError, match="output_size: expected 5 to 5, got 6"):
        torch.ops.pyops.conv_transpose_run(x, weight.transpose(0, 1), None, None, [1, 1], [1, 1], [6, 5], [1, 1], 1, *rest)
    with pytest.raises(RuntimeError, match="grad: wrong shape"):
        torch.ops.pyops.conv_wgrad(x, x, [3, 3], [2, 2], [1, 1], [1, 1], 1)


def test_transposed_gradients_beyond_the_stride():
    """An output padding of a stride or more, which dilation allows, has positions that the gradient's convolution does not reach."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(3, 4, 3, 3)
    options = dict(stride=1, dilation=2, output_padding=1)
    found = []
    for backend in ("cpu", "eager"):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = pyops.conv_transpose_bn_act(*inputs, **options, backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
