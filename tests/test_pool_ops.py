"""Pooling after batch norm and activation: the kernels against their references, in every dtype, and what they promise at the edges."""

import pytest
import torch
import torch.nn.functional as F

from pyops import _library
from pyops.ops import _activations, _pool_ops
from pyops.testing import poison, relative_error, within_gate

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

OPS = torch.ops.pyops
WINDOWS = {  # maximum, kernel, stride, padding
    "max2": (True, [2, 2], [2, 2], [0, 0]),
    "stem": (True, [3, 3], [2, 2], [1, 1]),
    "gaps": (True, [2, 1], [3, 4], [0, 0]),
    "average2": (False, [2, 2], [2, 2], [0, 0]),
    "average_same": (False, [3, 3], [1, 1], [1, 1]),
    "average_odd": (False, [3, 2], [1, 2], [1, 0]),
}
SHAPES = ((2, 7, 9, 11), (1, 64, 12, 10), (3, 33, 5, 5), (1, 1, 4, 4))
every_window = pytest.mark.parametrize("windows", WINDOWS.values(), ids=list(WINDOWS))


def draw(shape, windows, dtype=torch.float32, seed=0):
    """input, affine, the output's gradient, terms"""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    N, C, H, W = shape
    image = rand(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    out = _pool_ops.output_size((H, W), *windows[1:])
    return image, rand(3, C), rand(N, C, *out).to(dtype).contiguous(memory_format=torch.channels_last), rand(2, C)


def eager(x, affine, windows, activation):
    """The layers, in input's dtype."""
    mean, scale, bias = (v.to(x.dtype)[:, None, None] for v in affine)
    a = _activations.apply((x - mean) * scale + bias, activation, 0.1)
    return (F.max_pool2d if windows[0] else F.avg_pool2d)(a, *windows[1:])


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "leaky_relu", "hardsigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_window
def test_forward(windows, dtype, activation):
    number = _activations.NAMES.index(activation)
    for shape in SHAPES:
        draws = []
        for seed in range(8):
            x, affine, grad, _ = draw(shape, windows, dtype, seed)
            poison(grad.numel() * grad.element_size(), grad.numel())
            found, index = OPS.pool_run(x, affine, *windows, number, 0.1, True)
            draws.append((found, eager(x.double(), affine.double(), windows, number), eager(x, affine, windows, number)))
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert index.shape == (found.shape if windows[0] else (0,)) and index.dtype == torch.uint8
        assert within_gate(draws, dtype) is None


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "hardsigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_window
def test_gradients(windows, dtype, activation):
    number, bound = _activations.NAMES.index(activation), 1e-6 if dtype == torch.float32 else 4e-3
    for shape in SHAPES:
        x, affine, grad, terms = draw(shape, windows, dtype)
        index = OPS.pool_run(x, affine, *windows, number, 0.1, True)[1] if windows[0] else None
        place = (index, *windows[1:], number, 0.1)
        wide = (grad.double(), x.double(), affine.double())
        poison(x.numel() * x.element_size())
        for given in (None, terms):
            found = OPS.pool_grad(grad, x, affine, given, *place)
            expected = _pool_ops._grad(*wide, None if given is None else given.double(), *place)
            assert relative_error([(found, expected)]) <= bound
        plain = OPS.pool_grad(grad, x, None, None, *place), _pool_ops._grad(*wide[:2], None, None, *place)
        assert relative_error([plain]) <= bound
        assert relative_error([(OPS.pool_reduce(grad, x, affine, *place), _pool_ops._reduce(*wide, *place))]) <= 2e-6


def test_gradient_is_autograds():
    """Where no two values tie, the first maximum is torch's."""
    for windows in WINDOWS.values():
        x, _, grad, _ = draw((2, 5, 9, 11), windows, torch.float64)
        x.requires_grad_()
        y = eager(x, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 5), windows, 3)
        expected = torch.autograd.grad(y, x, grad.double())[0]
        index = OPS.pool_run(x.detach().float(), None, *windows, 3, 0.0, True)[1] if windows[0] else None
        found = OPS.pool_grad(grad.float(), x.detach().float(), None, None, index, *windows[1:], 3, 0.0)
        assert relative_error([(found, expected)]) <= 1e-6


def test_ties_and_nan():
    x = torch.ones(1, 17, 4, 4).contiguous(memory_format=torch.channels_last)
    _, index = OPS.pool_run(x, None, True, [2, 2], [2, 2], [0, 0], 0, 0.0, True)
    assert (index == 0).all()
    x[0, 3, 1, 0] = float("nan")
    x[0, 4, 0, 1] = float("inf")
    found, index = OPS.pool_run(x, None, True, [2, 2], [2, 2], [0, 0], 0, 0.0, True)
    assert torch.equal(found.isnan().nonzero(), torch.tensor([[0, 3, 0, 0]])) and index[0, 3, 0, 0] == 2 and index[0, 4, 0, 0] == 1
    padded, _ = OPS.pool_run(-x, None, True, [3, 3], [2, 2], [1, 1], 0, 0.0, True)
    torch.testing.assert_close(padded, F.max_pool2d(-x, 3, 2, 1), equal_nan=True)


def test_threads_empty_batches_and_other_layouts():
    windows = WINDOWS["stem"]
    x, affine, grad, terms = draw((3, 40, 33, 29), windows)
    index = OPS.pool_run(x, affine, *windows, 1, 0.0, True)[1]
    place = (index, *windows[1:], 1, 0.0)

    def everything(x, grad):
        return (
            OPS.pool_run(x, affine, *windows, 1, 0.0, True)[0],
            OPS.pool_reduce(grad, x, affine, *place),
            OPS.pool_grad(grad, x, affine, terms, *place),
        )

    expected, before = everything(x, grad), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(everything(x, grad), expected, strict=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(everything(x.contiguous(), grad.contiguous()), expected, strict=True))
    found, index = OPS.pool_run(x[:0], affine, *windows, 1, 0.0, True)
    assert found.shape == index.shape == (0, 40, 17, 15)
    place = (index, *place[1:])
    assert OPS.pool_grad(found, x[:0], affine, terms, *place).shape == x[:0].shape
    assert torch.equal(OPS.pool_reduce(found, x[:0], affine, *place), torch.zeros(2, 40))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_window
def test_opcheck(windows):
    x, affine, grad, terms = draw((2, 7, 9, 11), windows)
    torch.library.opcheck(OPS.pool_run.default, (x, affine, *windows, 1, 0.0, True))
    index = OPS.pool_run(x, affine, *windows, 1, 0.0, True)[1] if windows[0] else None
    place = (index, *windows[1:], 1, 0.0)
    torch.library.opcheck(OPS.pool_reduce.default, (grad, x, affine, *place))
    torch.library.opcheck(OPS.pool_grad.default, (grad, x, affine, terms, *place))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=torch.zeros(2, 7, 9)), r"input: expected \[N, C, H, W\]"),
        (dict(affine=torch.zeros(3, 6)), "affine: wrong shape"),
        (dict(kernel=[2]), "expected two numbers each"),
        (dict(kernel=[10, 2]), "kernel_size: larger than the padded input"),
        (dict(kernel=[0, 2]), "kernel_size"),
        (dict(stride=[0, 1]), "stride"),
        (dict(padding=[2, 0]), "padding: expected at most half"),
        (dict(kernel=[16, 16], x=torch.zeros(1, 7, 20, 20)), "at most 255 positions"),
        (dict(activation=10), "activation: expected 0..9"),
    ],
)
def test_refusals(change, match):
    given = dict(x=torch.zeros(2, 7, 9, 11), affine=torch.zeros(3, 7), kernel=[2, 2], stride=[2, 2], padding=[0, 0], activation=0) | change
    with pytest.raises(RuntimeError, match=match):
        windows = (True, given["kernel"], given["stride"], given["padding"])
        OPS.pool_run(given["x"], given["affine"], *windows, given["activation"], 0.0, True)


CODE = """
import runpy, sys
import torch
from pyops.ops import _pool_ops
from pyops.testing import relative_error
globals().update(runpy.run_path(sys.argv[1]))
for windows in WINDOWS.values():
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        x, affine, grad, terms = draw((2, 37, 9, 11), windows, dtype)
        found, index = OPS.pool_run(x, affine, *windows, 3, 0.1, True)
        place = (index if windows[0] else None, *windows[1:], 3, 0.1)
        wide = (grad.double(), x.double(), affine.double())
        assert relative_error([(found, _pool_ops._run(*wide[1:], *windows, 3, 0.1, True)[0])]) <= bound
        assert relative_error([(OPS.pool_grad(grad, x, affine, terms, *place), _pool_ops._grad(*wide, terms.double(), *place))]) <= bound
        assert relative_error([(OPS.pool_reduce(grad, x, affine, *place), _pool_ops._reduce(*wide, *place))]) <= 4e-6
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)
