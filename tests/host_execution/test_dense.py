"""The dense convolution's kernels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how work is cut into blocks, change from run to run.
"""

import pytest
import torch

from pyops.ops import _channel_ops
from pyops.ops import _dense_ops as ops
from pyops.ops._activations import NAMES
from pyops.ops._depthwise_ops import output_size

from ..conftest import assert_gate
from .dense import AUTO, Dense, Kernels, Shape
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized
from .test_machine import tf32

NONE, SILU = (NAMES.index(name) for name in ("none", "silu"))
ONE = (1, 1)
SHAPES = {  # N, C, O, (H, W), kernel, stride, padding, dilation, groups
    "tiles": (1, 32, 64, (8, 16), (3, 3), ONE, (1, 1), ONE, 1),
    "strided": (2, 16, 24, (9, 7), (3, 3), (2, 2), (1, 1), ONE, 1),
    "odd": (2, 13, 9, (5, 7), (3, 3), ONE, (1, 1), ONE, 1),
    "stem": (1, 3, 16, (17, 15), (7, 7), (2, 2), (3, 3), ONE, 1),
    "row": (1, 8, 8, (4, 19), (1, 7), (1, 2), (0, 3), ONE, 1),
    "uneven": (2, 5, 6, (9, 11), (2, 3), (3, 2), (1, 0), (2, 1), 1),
    "dilated": (1, 24, 8, (13, 11), (3, 2), ONE, (2, 3), (2, 3), 1),
    "dilated and strided": (1, 8, 8, (11, 12), (3, 3), (2, 4), (2, 2), (2, 2), 1),
    "groups": (2, 32, 48, (6, 5), (3, 3), ONE, (1, 1), ONE, 2),
    "odd groups": (2, 9, 15, (6, 5), (3, 3), (2, 1), (1, 1), ONE, 3),
    "large kernel": (1, 8, 16, (3, 2), (5, 7), ONE, (2, 3), ONE, 1),
    "gaps": (2, 16, 8, (9, 8), (1, 1), (3, 2), (0, 0), ONE, 1),
    "far padding": (1, 8, 8, (2, 3), (2, 2), ONE, (4, 3), ONE, 1),
    "deep": (1, 136, 8, (3, 4), (3, 3), ONE, (1, 1), ONE, 1),
    "wide": (1, 16, 136, (4, 3), (2, 2), ONE, (0, 0), ONE, 1),
    "one": (1, 1, 1, (1, 1), (1, 1), ONE, (0, 0), ONE, 1),
}
kinds = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


class Problem:
    """Arguments of the three ops: the convolution, and the two gradients of it as transposed convolution and filter gradient."""

    def __init__(self, shape, dtype, options=("bias", "residual"), activation=SILU, slope=0.1, last=False, seed=0, draw=torch.randn):
        N, C, O, size, kernel, stride, padding, dilation, groups = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*sizes):
            return draw(*sizes, generator=generator)

        out = output_size(size, kernel, stride, padding, dilation)
        scale = 1 if draw is not torch.randn else (C // groups * kernel[0] * kernel[1]) ** -0.5
        x, grad = random(N, C, *size).to(dtype), random(N, O, *out).to(dtype)
        weight = (random(O, C // groups, *kernel) * scale).to(dtype)
        self.where = (stride, padding, dilation, groups)
        end = (activation, slope, last)

        def around(channels, size):
            bias, residual = random(channels), random(N, channels, *size).to(dtype)
            return (bias if "bias" in options else None, residual if "residual" in options else None)

        self.run = (x, weight, *around(O, out), *self.where, *end)
        self.transpose_run = (grad, weight, *around(C, size), stride, padding, list(size), dilation, groups, *end)
        self.wgrad = (grad, x, kernel, *self.where)


REFERENCES = {"run": ops._run, "transpose_run": ops._transpose_run, "wgrad": ops._wgrad}
forwards = pytest.mark.parametrize("operation", ["run", "transpose_run"])
operations = pytest.mark.parametrize("operation", REFERENCES)


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def expected(operation, args):
    """In the dtype of args; without moments."""
    found = REFERENCES[operation](*args, *(() if operation == "wgrad" else (False,)))
    return found if operation == "wgrad" else found[0]


def found(kernels, operation, args, moments=False, **how):
    if operation == "wgrad":
        return kernels.wgrad(*args, **how)
    output, sums = getattr(kernels, operation)(*args, moments, **how)
    return (output, sums) if moments else output


def eager(operation, args):
    """The reference as it runs in the images' own type: what torch makes of 16-bit operands, rounded after each operation."""
    x, weight, *rest = args
    if operation == "wgrad":
        return expected(operation, args)
    stride, padding = rest[2:4]
    if operation == "run":
        y = torch.conv2d(x, weight, None, *rest[2:6])
    else:
        size, dilation, groups = rest[4:7]
        least = ops.smallest_transposed(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        y = torch.conv_transpose2d(x, weight, None, stride, padding, [a - b for a, b in zip(size, least, strict=True)], groups, dilation)
    return ops._finish(y, x, *rest[:2], *rest[-3:], False)[0]


def held_to_the_gate(library, kernels, operation, make, dtype, sms=(1, 9), **how):
    def draw(seed):
        library.host_machine(seed, sms[seed % 2], 163 * 1024)
        args = getattr(make(seed), operation)
        return [found(kernels, operation, args, **how)], [expected(operation, double(args))], [eager(operation, args)]

    assert_gate(draw, dtype, gradient=operation == "wgrad")


@kinds
@operations
@shapes
def test_every_shape(library, kernels, shape, operation, dtype):
    """Large tiles on one multiprocessor, small ones on many."""
    for sms in (1, 40):
        held_to_the_gate(library, kernels, operation, lambda seed: Problem(shape, dtype, seed=seed), dtype, (sms, sms))


@kinds
@operations
@shapes
def test_integers_are_exact(library, kernels, shape, operation, dtype):
    library.host_machine(1, 2, 163 * 1024)

    def small(*sizes, generator):
        return torch.randint(-1, 2, sizes, generator=generator).float()

    for rounded in {False, dtype == torch.float32}:
        args = getattr(Problem(shape, dtype, activation=NONE, draw=small), operation)
        assert torch.equal(found(kernels, operation, args, tf32=rounded).double(), expected(operation, double(args)))


@forwards
@pytest.mark.parametrize("options", [(), ("bias",), ("residual",)], ids="".join)
def test_one_option_alone(library, kernels, options, operation):
    for last in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            held_to_the_gate(
                library, kernels, operation, lambda seed, d=dtype, e=last: Problem(SHAPES["strided"], d, options, last=e, seed=seed), dtype
            )


@pytest.mark.parametrize("last", [False, True], ids=["residual", "residual last"])
@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
def test_every_activation(library, kernels, activation, last):
    for dtype in (torch.float32, torch.float16):
        held_to_the_gate(
            library, kernels, "run", lambda seed, d=dtype: Problem(SHAPES["row"], d, activation=activation, last=last, seed=seed), dtype
        )


@kinds
@operations
@pytest.mark.parametrize("around", [(8, 8), (3, 2)], ids=str)
def test_slices_of_wider_buffers(library, kernels, dtype, operation, around):
    library.host_machine(1, 2, 163 * 1024)
    args = getattr(Problem(SHAPES["strided"], dtype), operation)
    dense, sliced = (found(kernels, operation, args, around=each) for each in ((0, 0), around))
    assert torch.equal(dense, sliced)


@kinds
@forwards
def test_any_strides_of_the_weight(library, kernels, dtype, operation):
    """Among them a channels_last weight, which a convolution reads as it is."""
    library.host_machine(1, 2, 163 * 1024)
    for shape in ("strided", "odd"):
        x, weight, *rest = getattr(Problem(SHAPES[shape], dtype), operation)
        plain = found(kernels, operation, (x, weight, *rest))
        odd = torch.empty_strided(weight.shape, (30, 1, 9000, 3000), dtype=dtype).copy_(weight)
        for other in (weight.contiguous(memory_format=torch.channels_last), odd):
            assert torch.equal(plain, found(kernels, operation, (x, other, *rest)))


@pytest.mark.parametrize("sms", [1, 40])
@kinds
@forwards
def test_moments_of_the_stored_output(library, kernels, operation, dtype, sms):
    """Several tiles a block, or one; a mean far above the deviation; of a transposed convolution one phase and several."""
    library.host_machine(1, sms, 163 * 1024)
    for stride in (1, 2):
        shape = (3, 8, 72, (16, 15), (2, 3), (stride, stride), (1, 1), ONE, 2)
        args = list(getattr(Problem(shape, dtype, ("bias",), NONE), operation))
        args[2] = args[2] + 100
        output, moments = found(kernels, operation, args, moments=True)
        truth = _channel_ops._moments(output.double())
        torch.testing.assert_close(moments[0].double(), truth[0], rtol=2e-7, atol=0)
        torch.testing.assert_close(moments[1].double(), truth[1], rtol=1e-5, atol=1e-6)


POOLED = {name: SHAPES[name] for name in ("tiles", "strided", "odd", "stem", "uneven", "odd groups", "wide")}


@kinds
@pytest.mark.parametrize("pool", [ops.MAXIMUM, ops.AVERAGE], ids=["maximum", "average"])
@pytest.mark.parametrize("shape", POOLED.values(), ids=POOLED)
def test_pooled(library, kernels, shape, pool, dtype):
    """Large tiles and small ones, odd rows and columns that are left out, the residual on either side of the activation."""

    def draw(seed):
        library.host_machine(seed, (1, 40)[seed % 2], 163 * 1024)
        args = Problem(shape, dtype, last=seed % 3 == 0, seed=seed).run
        ours = kernels.run(*args, False, tf32=False, pool=pool)[0]
        plain = eager("run", args)
        pooled = torch.max_pool2d(plain, 2) if pool == ops.MAXIMUM else torch.nn.functional.avg_pool2d(plain, 2)
        return [ours], [ops._run(*double(args), False, pool=pool)[0]], [pooled]

    assert_gate(draw, dtype)


@kinds
@pytest.mark.parametrize("shape", POOLED.values(), ids=POOLED)
def test_pooled_is_the_finished_output_pooled(library, kernels, shape, dtype):
    """Exactly, where nothing is rounded; and NaN is above all."""

    def small(*sizes, generator):
        return torch.randint(-1, 2, sizes, generator=generator).float()

    for rounded in {False, dtype == torch.float32}:
        for sms in (1, 40):
            library.host_machine(sms, sms, 163 * 1024)
            x, *rest = Problem(shape, dtype, activation=NONE, draw=small).run
            for pool in (ops.MAXIMUM, ops.AVERAGE):
                ours = kernels.run(x, *rest, False, tf32=rounded, pool=pool)[0]
                assert torch.equal(ours, ops._run(x, *rest, False, pool=pool)[0])
            x[0, :, -1, -1] = float("nan")
            ours, truth = kernels.run(x, *rest, False, tf32=rounded, pool=ops.MAXIMUM)[0], ops._run(x, *rest, False, pool=ops.MAXIMUM)[0]
            assert torch.equal(ours.isnan(), truth.isnan()) and torch.equal(ours.nan_to_num(), truth.nan_to_num())


@operations
def test_tf32_rounds_operands_alone(library, kernels, operation):
    library.host_machine(1, 2, 163 * 1024)
    for shape in ("strided", "odd"):
        args = getattr(Problem(SHAPES[shape], torch.float32, (), NONE), operation)
        exact, rough = (found(kernels, operation, args, tf32=rounded).double() for rounded in (False, True))
        assert 1e-5 < (rough - exact).norm() / exact.norm() < 1e-3
        truth = expected(operation, [tf32(args[0]), tf32(args[1]), *args[2:]])
        torch.testing.assert_close(rough, truth, rtol=1e-5, atol=1e-5)


@operations
def test_a_long_sum_keeps_its_digits(library, kernels, operation):
    """Products of one sign, thousands of them: short slices lose less than one long sum."""
    library.host_machine(1, 2, 163 * 1024)
    channels = 4 if operation == "wgrad" else 512
    size = (64, 65) if operation == "wgrad" else (3, 3)
    first, second, *rest = getattr(Problem((1, channels, channels, size, (3, 3), ONE, (1, 1), ONE, 1), torch.float32, (), NONE), operation)
    args = (first.abs(), second.abs(), *rest)
    error = (found(kernels, operation, args).double() / expected(operation, double(args)) - 1).abs().max()
    assert error < 8e-7


@kinds
@operations
def test_no_order_of_threads_changes_a_bit(library, kernels, dtype, operation):
    shape = (2, 24, 70, (7, 11), (3, 3), (2, 1), (1, 1), ONE, 1)
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append(found(kernels, operation, getattr(Problem(shape, dtype), operation), tf32=True))
    assert all(torch.equal(runs[0], again) for again in runs[1:])


def test_no_positions(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    for shape in ((0, 8, 16, (4, 3), (3, 3), ONE, (1, 1), ONE, 1), (2, 8, 16, (2, 3), (3, 3), ONE, (0, 0), ONE, 1)):
        problem = Problem(shape, torch.bfloat16)
        output, moments = found(kernels, "run", problem.run, moments=True)
        assert output.numel() == 0 and torch.equal(moments, torch.zeros(2, 16))
        assert torch.equal(found(kernels, "wgrad", problem.wgrad), torch.zeros(16, 8, 3, 3, dtype=torch.bfloat16))


def test_too_many_positions_are_refused(kernels):
    for N, H, C, kernel in ((1 << 16, 1 << 8, 8, 1), (1, 1, 1 << 28, 3)):
        p = Dense(Shape(N, H, 1 << 7, C, H, 1 << 7, 8, kernel, kernel, 1, 1, 1, 1, 1, 1, 1))
        with pytest.raises(RuntimeError, match="up to 2\\^30 positions, and channels times taps"):
            kernels.call("dense", p, AUTO)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    names = ("dense", "channel_moments")  # where moments are merged
    sources = [*(source for source in kernel_sources() if source.name.startswith(names)), DRIVER / "dense_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "dense_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "68 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
