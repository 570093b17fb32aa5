"""What the registry does not say about the depthwise convolution: layouts, batch norm's bookkeeping, autocast, exactness."""

import pytest
import torch
import torch.nn.functional as F

import pyops
from pyops import _library
from pyops.ops import _composed_ops
from pyops.ops._activations import NAMES
from pyops.ops.depthwise_conv import fold
from pyops.testing import SPECS
from pyops.testing.samples.depthwise import arguments

SPEC = SPECS["depthwise_conv_bn_act"]


def runs(backend: str) -> bool:
    args, _ = SPEC.samples[0].make(torch.float32, device_of(backend))
    return dict(pyops.explain(SPEC.public, *args, backend=backend).rows)[backend].startswith(("runs", "could"))


def device_of(backend: str) -> str:
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


backends = pytest.mark.parametrize("backend", [name for name in ("cpu", "cuda", "triton", "eager") if runs(name)])


@backends
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_exact(backend, kernel, stride, dtype):
    """Small integers are exact in every dtype, so any sum at all must come out to the last bit."""
    generator = torch.Generator().manual_seed(kernel)
    draw = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to(device_of(backend), dtype)  # noqa: E731
    x, weight, bias = draw(2, 37, 11, 10), draw(37, 1, kernel, kernel), draw(37)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2, groups=37).relu()
    found = pyops.depthwise_conv_bn_act(x, weight, bias, stride=stride, padding=kernel // 2, activation="relu", backend=backend)
    assert torch.equal(found.double(), truth)


@backends
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("grad", [False, True])
def test_layout_is_kept(backend, layout, grad):
    x = torch.randn(2, 8, 6, 5, device=device_of(backend)).contiguous(memory_format=layout).requires_grad_(grad)
    weight = torch.randn(8, 1, 3, 3, device=x.device)
    y = pyops.depthwise_conv_bn_act(x, weight, padding=1, activation="silu", backend=backend)
    assert y.is_contiguous(memory_format=layout)
    if grad:
        y.sum().backward()
        assert x.grad.shape == x.shape


@backends
def test_training_keeps_torchs_running_statistics(backend):
    device = device_of(backend)
    theirs = torch.nn.BatchNorm2d(12, device=device)
    mean, var = torch.zeros(12, device=device), torch.ones(12, device=device)
    weight = torch.randn(12, 1, 3, 3, device=device)
    for step in range(20):
        x = torch.randn(4, 12, 7, 6, generator=torch.Generator().manual_seed(step)).to(device)
        expected = F.silu(theirs(F.conv2d(x, weight, padding=1, groups=12)))
        tensors = (x, weight, None, mean, var, theirs.weight, theirs.bias)
        found = pyops.depthwise_conv_bn_act(*tensors, padding=1, training=True, activation="silu", backend=backend)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean, theirs.running_mean)
    torch.testing.assert_close(var, theirs.running_var)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_fold(bias, affine):
    (_, weight, b), kwargs = arguments(2, 6, 5, 5, 3, torch.float64, "cpu", bias=bias, bn=True)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    statistics = [kwargs["running_mean"], kwargs["running_var"], *((kwargs["bn_weight"], kwargs["bn_bias"]) if affine else (None, None))]
    expected = F.batch_norm(F.conv2d(x, weight, b, groups=6), *statistics, False, 0.0, 1e-3)
    torch.testing.assert_close(F.conv2d(x, *fold(weight, b, *statistics, 1e-3), groups=6), expected)


@backends
def test_autocast(backend):
    device = device_of(backend)
    x, weight = torch.randn(2, 8, 6, 5, device=device), torch.randn(8, 1, 3, 3, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = pyops.depthwise_conv_bn_act(x, weight, padding=1, activation="silu", backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@backends
def test_gradient_of_a_gradient(backend):
    (x, weight, bias), _ = arguments(2, 5, 6, 5, 3, torch.float32, device_of(backend))

    def second(backend):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = pyops.depthwise_conv_bn_act(*leaves, padding=1, activation="silu", backend=backend)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for found, expected in zip(second(backend), second("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
@pytest.mark.parametrize("sample_id", ["odd", "stride2", "residual_silu", "no_bias", "no_images"])
def test_opcheck(sample_id):
    (sample,) = (s for s in SPEC.samples if s.id == sample_id)
    (x, weight, bias), kwargs = sample.make(torch.float32, "cpu")
    residual, stride, activation = kwargs.get("residual"), [kwargs.get("stride", 1)] * 2, NAMES.index(kwargs.get("activation", "none"))
    options = (stride, [kwargs.get("padding", 0)] * 2, [1, 1], activation, 0.01)
    live = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(torch.ops.pyops.depthwise_fwd.default, (*live, *options, True))
    torch.library.opcheck(torch.ops.pyops.depthwise_infer.default, (x, weight, bias, residual, *options, True))
    y, means = torch.ops.pyops.depthwise_infer(x, weight, bias, residual, *options, True)
    backward = (torch.ones_like(y), torch.ones_like(means), x, weight, bias, residual, *options, True, True)
    torch.library.opcheck(torch.ops.pyops.depthwise_bwd.default, backward)


@pytest.mark.skipif(_library.not_loaded_reason() is not None, reason=str(_library.not_loaded_reason()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])  # sigmoid(0) is not zero: padding must stay it
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 1, 1), (5, 2, 1), (3, 1, 2), (2, 3, 1)])
def test_convolution_after_batch_norm(kernel, stride, dilation, activation, dtype):
    """The op that normalises and activates its input as it reads it does what two ops do."""
    g = torch.Generator().manual_seed(kernel)
    x = torch.randn(2, 37, 9, 11, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, affine = torch.randn(37, 1, kernel, kernel, generator=g).to(dtype), torch.randn(3, 37, generator=g)
    number, shape = NAMES.index(activation), ([stride] * 2, [kernel // 2] * 2, [dilation] * 2)
    found = torch.ops.pyops.depthwise_after(x, affine, number, 0.0, weight, *shape)
    grad = torch.randn(found.shape, generator=g).to(dtype)
    grads = torch.ops.pyops.depthwise_after_bwd(grad, x, affine, number, 0.0, weight, *shape)
    forward, backward, _ = _composed_ops._compose("default")
    expected = [forward(x, affine, number, 0.0, weight, *shape), *backward(grad, x, affine, number, 0.0, weight, *shape)]
    for a, b in zip([found, *grads], expected, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
        else:  # two ops round in between
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.05 * float(b.abs().max()))
    torch.library.opcheck(torch.ops.pyops.depthwise_after.default, (x, affine, number, 0.0, weight, *shape))
