"""The channelwise kernels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how work is cut into blocks, change from run to run.
"""

import pytest
import torch

from pyops.ops import _channel_ops as ops
from pyops.ops._activations import NAMES

from ..conftest import assert_gate
from .channel import Kernels
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized

NONE, SILU, RELU6 = (NAMES.index(name) for name in ("none", "silu", "relu6"))
ALL = ("affine", "keep", "residual", "gate", "offset", "terms")
SHAPES = {  # N, C, H, W: vectors and single channels, one position, more channels than a block has, runs that end inside an image
    "vectors": (3, 16, 7, 5),
    "odd": (2, 13, 9, 11),
    "one_position": (5, 24, 1, 1),
    "wide": (2, 264, 3, 3),
    "one_channel": (1, 1, 17, 13),
    "few_channels": (2, 6, 4, 4),
}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


class Problem:
    def __init__(self, shape, dtype, options=ALL, activation=SILU, slope=0.0, seed=0, offset=0.0):
        generator = torch.Generator().manual_seed(seed)
        N, C = shape[:2]

        def draw(*size):
            return torch.randn(*size, generator=generator)

        self.x, self.g, residual = ((draw(*shape) + shift).to(dtype) for shift in (offset, 0, 0))
        vectors = {"affine": draw(3, C), "keep": draw(N), "residual": residual}
        vectors |= {"gate": draw(N, C), "offset": draw(N, C), "terms": draw(2, C)}
        vectors["affine"][0] += offset
        self.v = {name: value if name in options else None for name, value in vectors.items()}
        self.activation = (activation, slope)

    def double(self):
        wide = object.__new__(Problem)
        wide.x, wide.g, wide.activation = self.x.double(), self.g.double(), self.activation
        wide.v = {name: None if value is None else value.double() for name, value in self.v.items()}
        return wide

    def results(self, moments, apply, sums, reduce, grad, in_place=False):
        """Every op of the family, by these implementations."""
        v, end = self.v, self.activation
        place, gates = (v["affine"], v["keep"], v["residual"]), (v["gate"], v["offset"])
        affine = v["affine"]
        if affine is None:  # reduce wants one
            affine = torch.tensor([[0.0], [1.0], [0.0]], dtype=ops.vector_dtype(self.x.dtype)).expand(3, self.x.shape[1])
        found = [moments(self.x), apply(self.x, *place, *gates, *end)]
        found += [sums(self.x, None, *place, *end), sums(self.x, self.g, *place, *end)]
        found.append(reduce(self.g, self.x, affine, *place[1:], *gates, *end))
        found += grad(self.g, self.x, place[0], v["terms"], *place[1:], *gates, *end, True, *([True] if in_place else []))
        return found

    def ours(self, kernels, in_place=False):
        return self.results(kernels.moments, kernels.apply, kernels.sums, kernels.reduce, kernels.grad, in_place)

    def reference(self):
        return self.results(ops._moments, ops._apply, ops._sums, ops._reduce, ops._grad)


def held_to_the_gate(library, kernels, make, dtype):
    def draw(seed):
        library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        problem = make(seed)
        return problem.ours(kernels), problem.double().reference(), problem.reference()

    assert_gate(draw, dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_option(library, kernels, shape, dtype):
    held_to_the_gate(library, kernels, lambda seed: Problem(shape, dtype, seed=seed), dtype)


@pytest.mark.parametrize(
    "options", [(), ("affine",), ("affine", "residual"), ("gate",), ("keep", "offset"), ("affine", "terms")], ids="+".join
)
def test_options_that_are_left_out(library, kernels, options):
    for activation in (NONE, RELU6):
        held_to_the_gate(
            library, kernels, lambda seed, a=activation: Problem((2, 8, 3, 5), torch.bfloat16, options, a, seed=seed), torch.bfloat16
        )


@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_every_activation(library, kernels, activation, dtype):
    held_to_the_gate(library, kernels, lambda seed: Problem((2, 8, 4, 3), dtype, ALL, activation, 0.1, seed), dtype)


def test_moments_of_a_mean_far_above_the_deviation(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    x = Problem((3, 8, 33, 31), torch.float32, offset=1000.0).x
    mean, deviation = kernels.moments(x)
    truth = ops._moments(x.double())
    torch.testing.assert_close(mean.double(), truth[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(deviation.double(), truth[1], rtol=1e-5, atol=0)
    x[0, :, 0, 0] = 0.0  # the first value tells nothing of the others
    torch.testing.assert_close(kernels.moments(x)[1].double(), ops._moments(x.double())[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_in_place_and_any_order_of_threads(library, kernels, dtype):
    problem = Problem((3, 24, 9, 7), dtype)
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append(problem.ours(kernels, in_place=seed > 0))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_any_number_of_multiprocessors(library, kernels):
    """Runs of many lengths and numbers: the same sums, cut elsewhere."""
    problem = Problem((3, 24, 19, 17), torch.float32)
    found = []
    for count in (1, 5, 500):
        library.host_machine(1, count, 163 * 1024)
        found.append(problem.ours(kernels))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_integers_are_exact(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    for dtype in DTYPES:
        problem = Problem((2, 16, 5, 7), dtype, activation=NONE)
        problem.x, problem.g = problem.x.sign(), problem.g.sign()
        problem.v = {name: value.sign() for name, value in problem.v.items()}
        problem.x[:, :, 1:, ::2] *= 0
        ours, truth = problem.ours(kernels), problem.double().reference()
        for a, b in zip(ours[1:], truth[1:], strict=True):
            assert torch.equal(a.double(), b)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 4), (2, 0, 3, 3)], ids=["no_images", "no_positions", "no_channels"])
def test_nothing_to_do(library, kernels, shape):
    library.host_machine(1, 2, 163 * 1024)
    ours = Problem(shape, torch.bfloat16).ours(kernels)
    for value in ours:
        assert not value.any()


def test_what_does_not_fit_an_index_is_refused(library, kernels):
    x = torch.zeros(1, 1, 1, 8).expand(2**14, 2**17, 1, 8)
    with pytest.raises(RuntimeError, match=r"up to 2\^30 positions"):
        kernels.call("moments", x, sums=torch.zeros(2, 8))


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*(source for source in kernel_sources() if source.name.startswith("channel_")), DRIVER / "channel_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "channel_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "18 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
