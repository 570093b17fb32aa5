"""The dense convolution that keeps its input's halo: csrc/conv/dense_halo.cu executed on the host, held to the numerics gate.

Like test_dense.py; the kernel is asked for, but where its choice is tested. Float images have their products rounded to tf32: there the
truth is that of rounded operands.
"""

import pytest
import torch

from pyops.ops import _dense_ops as ops

from ..conftest import assert_gate
from .dense import AUTO, HALO, TILE, Kernels
from .depthwise import DTYPES
from .harness import kernel_table
from .test_dense import NONE, ONE, Problem, double, eager, expected, kinds
from .test_machine import tf32

TWO = (2, 2)
SHAPES = {  # N, C, O, (H, W), kernel, stride, padding
    "tiles": (2, 16, 64, (16, 16), (3, 3), ONE, (1, 1)),
    "deep": (1, 64, 70, (9, 18), (3, 3), ONE, (1, 1)),
    "odd": (2, 17, 1, (11, 19), (3, 3), ONE, (1, 1)),
    "flat": (1, 24, 8, (3, 45), (3, 3), ONE, (1, 1)),
    "high": (1, 8, 66, (33, 5), (5, 5), ONE, (2, 2)),
    "tiny": (3, 16, 8, (2, 3), (3, 3), ONE, (1, 1)),
    "strided": (1, 16, 24, (17, 35), (3, 3), TWO, (1, 1)),
    "rows strided": (1, 8, 9, (19, 17), (3, 4), (2, 1), (1, 2)),
    "columns strided": (1, 5, 9, (9, 33), (4, 3), (1, 2), (2, 0)),
    "far strides": (1, 8, 8, (25, 40), (4, 3), (3, 4), (1, 1)),
    "far padding": (1, 8, 8, (3, 4), (2, 3), ONE, (4, 5)),
    "stem": (1, 3, 64, (31, 37), (7, 7), TWO, (3, 3)),
    "small stem": (2, 3, 16, (9, 17), (3, 3), ONE, (1, 1)),
    "strided stem": (1, 3, 70, (17, 33), (3, 3), TWO, (1, 1)),
    "thin stem": (1, 3, 8, (9, 17), (7, 1), (1, 3), (3, 0)),
    "gray": (1, 1, 64, (17, 16), (5, 5), ONE, (2, 2)),
    "gray strided": (1, 1, 1, (19, 33), (6, 6), TWO, (2, 3)),
    "gray row": (1, 1, 4, (8, 20), (1, 7), ONE, (0, 3)),
    "two": (1, 2, 7, (9, 18), (3, 5), (1, 3), (1, 2)),
    "four": (1, 4, 7, (9, 18), (3, 6), ONE, (2, 1)),
    "row": (1, 8, 8, (8, 19), (1, 7), ONE, (0, 3)),
    "large kernel": (1, 16, 8, (8, 16), (7, 7), ONE, (3, 3)),
    "pointwise": (2, 17, 64, (5, 9), ONE, ONE, (0, 0)),
    "one": (1, 1, 1, ONE, ONE, ONE, (0, 0)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
POOLED = [name for name in SHAPES if name not in ("thin stem", "one")]


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def problem(shape, dtype, **how):
    """conv_run's arguments, floats rounded to tf32."""
    x, weight, *rest = Problem((*shape, ONE, 1), dtype, **how).run
    return (tf32(x).float(), tf32(weight).float(), *rest) if dtype == torch.float32 else (x, weight, *rest)


def small(*sizes, generator):
    return torch.randint(-1, 2, sizes, generator=generator).float()


def found(kernels, args, path=HALO, **how):
    return kernels.run(*args, False, tf32=args[0].dtype == torch.float32, path=path, **how)[0]


@kinds
@shapes
def test_every_shape(library, kernels, shape, dtype):
    def draw(seed):
        library.host_machine(seed, 1, 227 * 1024)
        args = problem(shape, dtype, last=seed % 2 == 1, seed=seed)
        return [found(kernels, args)], [expected("run", double(args))], [eager("run", args)]

    if dtype != torch.float32:
        return assert_gate(draw, dtype)
    ours, truth, _ = draw(1)  # eager is oneDNN, which sums short runs: tensor cores add to one sum
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)


@kinds
@shapes
def test_integers_are_exact(library, kernels, shape, dtype):
    """Without options and with them, pooled and not."""
    library.host_machine(1, 1, 227 * 1024)
    for options in ((), ("bias", "residual")):
        args = problem(shape, dtype, options=options, activation=NONE, draw=small)
        assert torch.equal(found(kernels, args).double(), expected("run", double(args)))
        if args[2] is not None and shape in [SHAPES[name] for name in POOLED]:
            for pool in (ops.MAXIMUM, ops.AVERAGE):
                assert torch.equal(found(kernels, args, pool=pool), ops._run(*args, False, pool=pool)[0])


@kinds
@shapes
def test_nan_stays_where_it_is_read(library, kernels, shape, dtype):
    """No product with a zero beside it, of taps or channels that fill up a piece, carries it farther."""
    library.host_machine(2, 1, 227 * 1024)
    N, C, _, (H, W) = shape[:4]
    x, *rest = problem(shape, dtype, activation=NONE, draw=small)
    for n, c, y, column in ((0, 0, H // 2, W // 2), (N - 1, C - 1, H - 1, W - 1), (0, C // 2, 0, W * 2 // 3)):
        poisoned = x.clone()
        poisoned[n, c, y, column] = float("nan")
        ours, truth = found(kernels, (poisoned, *rest)), ops._run(poisoned, *rest, False)[0]
        assert torch.equal(ours.isnan(), truth.isnan()) and torch.equal(ours.nan_to_num(), truth.nan_to_num())


@kinds
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("tiles", "deep", "strided", "stem", "odd")])
def test_as_the_other_kernel(library, kernels, shape, dtype):
    """Slices of wider buffers, a channels_last weight and any order of threads do not change a bit."""
    library.host_machine(1, 1, 227 * 1024)
    args = problem(shape, dtype)
    ours = found(kernels, args)
    torch.testing.assert_close(ours, found(kernels, args, TILE), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)
    for around in ((8, 8), (3, 2)):
        library.host_machine(3, 1, 227 * 1024)
        assert torch.equal(ours, found(kernels, args, around=around))
    x, weight, *rest = args
    assert torch.equal(ours, found(kernels, (x, weight.contiguous(memory_format=torch.channels_last), *rest)))


def taken(library, kernels, shape, dtype=torch.bfloat16, dilation=ONE, groups=1, moments=False, rounded=True):
    library.host_forget_launches()
    args = Problem((*shape, dilation, groups), dtype, (), NONE).run
    kernels.run(*args, moments, tf32=rounded, path=AUTO)
    return any(row["launches"] for name, row in kernel_table(library).items() if name.startswith("dense_halo"))


def test_the_choice(library, kernels):
    """Where fewer bytes pay for the tiles that reach over the edge, and two blocks fit an SM."""
    library.host_machine(1, 2, 163 * 1024)
    square = (1, 16, 64, (16, 16), (3, 3), ONE, (1, 1))
    stem = (1, 3, 64, (32, 32), (7, 7), TWO, (3, 3))
    for dtype in DTYPES:
        assert taken(library, kernels, square, dtype)
    assert taken(library, kernels, stem)
    assert not taken(library, kernels, square, torch.float32, rounded=False)
    assert not taken(library, kernels, square, moments=True)
    assert not taken(library, kernels, square, groups=2)
    assert not taken(library, kernels, square, dilation=(1, 2))
    assert not taken(library, kernels, (1, 16, 64, (16, 16), ONE, ONE, (0, 0)))  # nothing is fetched anew
    assert not taken(library, kernels, (40, 16, 8, (2, 3), (3, 3), ONE, (1, 1)))  # tiles all edge
    assert not taken(library, kernels, (1, 288, 8, (16, 16), (3, 3), ONE, (1, 1)))  # one block an SM
    library.host_machine(1, 3, 163 * 1024)
    assert not taken(library, kernels, square)  # an SM without a block


def test_what_it_cannot_compute_is_refused(library, kernels):
    library.host_machine(1, 1, 163 * 1024)
    square = (1, 16, 8, (8, 16), (3, 3), ONE, (1, 1))
    for shape, dtype, dilation in (
        (square, torch.float32, ONE),
        (square, torch.bfloat16, TWO),
        ((1, 900, *square[2:]), torch.float16, ONE),
    ):
        args = Problem((*shape, dilation, 1), dtype).run
        with pytest.raises(RuntimeError, match="not a call for the kernel that keeps the halo"):
            kernels.run(*args, False, path=HALO)
