"""The pooling kernels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how work is cut into blocks, change from run to run.
"""

import pytest
import torch
import torch.nn.functional as F

from pyops.ops import _pool_ops as ops
from pyops.ops._activations import NAMES

from ..conftest import assert_gate
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .pool import Kernels
from .test_faults import run_sanitized

NONE, RELU, SILU = (NAMES.index(name) for name in ("none", "relu", "silu"))
WINDOWS = {  # (N, C, H, W), kernel, stride, padding
    "fours": ((1, 16, 9, 13), (4, 4), (2, 3), (1, 0)),
    "halves": ((3, 16, 8, 6), (2, 2), (2, 2), (0, 0)),
    "odd sizes": ((2, 13, 9, 7), (2, 2), (2, 2), (0, 0)),
    "overlapping": ((2, 16, 9, 12), (3, 3), (2, 2), (1, 1)),
    "overlapping channels": ((1, 5, 8, 7), (3, 3), (2, 2), (1, 1)),
    "dense": ((1, 24, 6, 7), (3, 3), (1, 1), (1, 1)),
    "even and padded": ((2, 8, 7, 5), (4, 2), (1, 3), (2, 1)),
    "gaps": ((2, 8, 11, 10), (2, 3), (3, 5), (0, 1)),
    "far apart": ((2, 8, 5, 6), (2, 2), (90, 9), (1, 0)),
    "one window": ((2, 24, 15, 17), (15, 17), (1, 1), (0, 0)),
    "larger than the image": ((2, 8, 2, 3), (5, 6), (1, 2), (2, 3)),
    "row": ((1, 8, 1, 31), (1, 7), (1, 2), (0, 3)),
    "one position": ((5, 8, 4, 3), (1, 1), (1, 1), (0, 0)),
    "wide": ((1, 264, 3, 4), (2, 2), (1, 1), (0, 0)),
    "one": ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
}
kinds = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
modes = pytest.mark.parametrize("maximum", [True, False], ids=["maximum", "average"])


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


class Problem:
    """One call of each op. All get the index that float64 finds: where rounding decides, two are as good as each other."""

    def __init__(self, where, dtype, maximum, options=("affine", "terms"), activation=SILU, slope=0.1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape, *window = where
        C = shape[1]

        def draw(*size):
            return torch.randn(*size, generator=generator)

        self.x, self.maximum, self.window = draw(*shape).to(dtype), maximum, (*window, activation, slope)
        self.grad = draw(*shape[:2], *ops.output_size(shape[2:], *window)).to(dtype)
        affine = draw(3, C)
        self.reduce_affine, self.affine = affine, affine if "affine" in options else None
        self.terms = draw(2, C) if "terms" in options else None
        wide = None if self.affine is None else affine.double()
        index = ops._run(self.x.double(), wide, maximum, *self.window, True)[1]
        self.index = index if maximum else None

    def results(self, run, reduce, grad, wide=lambda t: t):
        x, g, affine, terms = (None if t is None else wide(t) for t in (self.x, self.grad, self.affine, self.terms))
        found = [run(x, affine, self.maximum, *self.window, False)[0]]
        found.append(reduce(g, x, wide(self.reduce_affine), self.index, *self.window))
        found.append(grad(g, x, affine, terms, self.index, *self.window))
        return found

    def ours(self, kernels):
        return self.results(kernels.run, kernels.reduce, kernels.grad)

    def reference(self, wide=lambda t: t):
        return self.results(ops._run, ops._reduce, ops._grad, wide)


def held_to_the_gate(library, kernels, make, dtype):
    def draw(seed):
        library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        problem = make(seed)
        return problem.ours(kernels), problem.reference(torch.Tensor.double), problem.reference()

    assert_gate(draw, dtype, gradient=True)


@kinds
@modes
@pytest.mark.parametrize("where", WINDOWS.values(), ids=WINDOWS)
def test_every_window(library, kernels, where, maximum, dtype):
    held_to_the_gate(library, kernels, lambda seed: Problem(where, dtype, maximum, seed=seed), dtype)


@modes
@pytest.mark.parametrize("options", [(), ("affine",)], ids=["nothing", "affine"])
def test_options_that_are_left_out(library, kernels, options, maximum):
    for activation in (NONE, RELU):
        for dtype in (torch.float32, torch.bfloat16):

            def make(seed, activation=activation, dtype=dtype):
                return Problem(WINDOWS["overlapping"], dtype, maximum, options, activation, seed=seed)

            held_to_the_gate(library, kernels, make, dtype)


@modes
@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
def test_every_activation(library, kernels, activation, maximum):
    for dtype in (torch.float32, torch.float16):
        held_to_the_gate(
            library, kernels, lambda seed, d=dtype: Problem(WINDOWS["overlapping"], d, maximum, activation=activation, seed=seed), dtype
        )


@kinds
@pytest.mark.parametrize("where", WINDOWS.values(), ids=WINDOWS)
def test_whole_numbers_are_exact_and_the_first_of_equals_is_the_maximum(library, kernels, where, dtype):
    """Three values alone, so that most windows have ties; then NaN, which is above all and stays."""
    library.host_machine(1, 2, 163 * 1024)
    for maximum in (True, False):
        problem = Problem(where, dtype, maximum, activation=RELU)
        for name in ("x", "grad", "affine", "terms"):
            setattr(problem, name, getattr(problem, name).sign())
        problem.reduce_affine = problem.affine
        x, affine = problem.x, problem.affine
        if maximum:
            index = kernels.run(x, affine, True, *problem.window, True)[1]
            assert torch.equal(index, ops._run(x.double(), affine.double(), True, *problem.window, True)[1])
            problem.index = index
        ours, truth = problem.ours(kernels), problem.reference(torch.Tensor.double)
        if maximum or (dtype == torch.float32 and where[1] == (2, 2)):  # quarters
            assert all(torch.equal(a.double(), b) for a, b in zip(ours, truth, strict=True))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = float("nan")
        output, index = kernels.run(x, affine, maximum, *problem.window, True)
        expected, places = ops._run(x.double(), affine.double(), maximum, *problem.window, True)
        assert torch.equal(output.isnan(), expected.isnan())
        if maximum:
            assert torch.equal(output.nan_to_num(7).double(), expected.nan_to_num(7)) and torch.equal(index, places)


def test_nothing_but_minus_infinity(library, kernels):
    """The maximum is where there is an image, so that its gradient is not lost."""
    library.host_machine(1, 2, 163 * 1024)
    x = torch.full((1, 8, 4, 4), float("-inf"))
    output, index = kernels.run(x, None, True, (3, 3), (2, 2), (1, 1), NONE, 0.0, True)
    assert torch.equal(output, F.max_pool2d(x, 3, 2, 1))
    assert torch.equal(index[0, 0], torch.tensor([[4, 3], [1, 0]], dtype=torch.uint8))


def test_the_index_is_torchs(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    x = torch.randn(2, 8, 9, 12)
    index = kernels.run(x, None, True, (3, 3), (2, 2), (1, 1), NONE, 0.0, True)[1].long()
    flat = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1]
    rows, columns = torch.arange(5)[:, None] * 2 - 1 + index // 3, torch.arange(6) * 2 - 1 + index % 3
    assert torch.equal(rows * 12 + columns, flat)


def test_an_index_that_is_outside_the_image_has_no_gradient(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    problem = Problem(WINDOWS["overlapping"], torch.float32, True)
    problem.index = torch.randint(0, 256, problem.index.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours, truth = problem.ours(kernels), problem.reference(torch.Tensor.double)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@kinds
def test_any_order_of_threads(library, kernels, dtype):
    problems = [Problem(WINDOWS["overlapping"], dtype, maximum) for maximum in (True, False)]
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append([value for problem in problems for value in problem.ours(kernels)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@modes
def test_any_number_of_multiprocessors(library, kernels, maximum):
    """Runs of many lengths and numbers: the same sums, cut elsewhere."""
    problem = Problem(((3, 24, 19, 17), (3, 3), (2, 2), (1, 1)), torch.float32, maximum)
    found = []
    for count in (1, 5, 500):
        library.host_machine(1, count, 163 * 1024)
        found.append(problem.ours(kernels))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 0, 3, 3)], ids=["no_images", "no_channels"])
def test_nothing_to_do(library, kernels, shape):
    library.host_machine(1, 2, 163 * 1024)
    for maximum in (True, False):
        output, sums, grad = Problem((shape, (2, 2), (1, 1), (0, 0)), torch.bfloat16, maximum).ours(kernels)
        assert output.shape == (*shape[:2], 2, 2) and not sums.any() and grad.shape == shape


def test_what_does_not_fit_an_index_is_refused(library, kernels):
    """Too many windows, and few windows of too many positions."""
    for N, H, kernel, padding in ((2**14, 2**17, 1, 0), (2**14, 2**17, 17, 0), (2**29, 1, 2, 1)):
        x = torch.zeros(1, 1, 1, 8).expand(N, H, 1, 8)
        window = ((kernel, 1), (1 if kernel < 3 else kernel, 1), (padding, 0), NONE, 0.0)
        for op in ("run", "reduce", "gradient"):
            with pytest.raises(RuntimeError, match=r"up to 2\^30 positions"):
                kernels.call(op, x, window, True)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    names = ("pool", "channel_sums")  # where sums are merged
    sources = [*(source for source in kernel_sources() if source.name.startswith(names)), DRIVER / "pool_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "pool_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "21 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
