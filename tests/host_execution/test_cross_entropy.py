"""Cross entropy over rows, executed on the host and held to the numerics gate against its reference in float64.

The same .cu file as on a GPU, compiled with the host's C++ compiler; losses are poisoned, the schedule of threads changes from run to run.
"""

import ctypes

import pytest
import torch

from pyops.ops import _cross_entropy_ops as ops

from ..conftest import assert_gate
from .cross_entropy import CrossEntropy, Kernels
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, checked, kernel_sources
from .test_faults import run_sanitized

SHAPES = {"words": (3, 5000), "vectors": (4, 256), "odd": (5, 131), "few": (4, 3), "long_and_odd": (2, 2077)}  # M, V
CALLS = ((0.0, 0.0), (0.2, 0.0), (0.0, 3.0), (0.1, 2.0))  # smoothing, softcap


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def draw(shape, dtype, seed):
    """logits, target, scale"""
    M, V = shape
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(M, V, generator=generator) * 3).to(dtype)
    return logits, torch.randint(V, (M,), generator=generator), torch.rand(M, generator=generator)


def results(run, tensors, *options):
    """Losses, and what became of a copy of the logits."""
    logits = tensors[0].clone()
    return [run(logits, *tensors[1:], *options), logits]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error(library, kernels, shape, options, dtype):
    def each(seed):
        library.host_machine(seed, 2, 163 * 1024)
        tensors = draw(shape, dtype, seed)
        wide = (tensors[0].double(), tensors[1], tensors[2].double())
        return [results(run, t, -100, *options) for run, t in ((kernels.rows, tensors), (ops._reference, wide), (ops._reference, tensors))]

    assert_gate(lambda seed: [found[:1] for found in each(seed)], torch.float32)
    assert_gate(lambda seed: [found[1:] for found in each(seed)], dtype, gradient=True)


@pytest.mark.parametrize("V", [64, 61])
def test_targets_that_are_none(library, kernels, V):
    library.host_machine(1, 2, 163 * 1024)
    logits, target, scale = draw((6, V), torch.bfloat16, 0)
    target[1], target[2], target[3] = -5, V, -1
    losses, grads = results(kernels.rows, (logits, target, scale), -5, 0.1, 0.0)
    assert losses[1] == 0 and not grads[1].any() and losses[2:4].isnan().all() and grads[2:4].isnan().all()
    assert losses[4:].isfinite().all() and grads[4:].isfinite().all()


@pytest.mark.parametrize("V", [64, 61])
def test_without_scale_logits_stay(library, kernels, V):
    library.host_machine(1, 2, 163 * 1024)
    logits, target, scale = draw((4, V), torch.float32, 0)
    losses, same = results(kernels.rows, (logits, target, None), -100, 0.1, 2.0)
    assert torch.equal(same, logits) and torch.equal(losses, results(kernels.rows, (logits, target, scale), -100, 0.1, 2.0)[0])


@pytest.mark.parametrize("V", [2048, 61])
def test_infinite_logits(library, kernels, V):
    """Whole vectors, and all that a thread sees, may be masked; NaN is not lost."""
    library.host_machine(1, 2, 163 * 1024)
    tensors = draw((3, V), torch.float32, 0)
    tensors[0][0, 5:], tensors[0][2, 1], tensors[1][0] = float("-inf"), float("nan"), 2
    for found, wanted in zip(results(kernels.rows, tensors, -100, 0.0, 0.0), results(ops._reference, tensors, -100, 0.0, 0.0), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_any_order_of_threads(library, kernels):
    tensors, runs = draw((3, 2077), torch.bfloat16, 0), []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append(results(kernels.rows, tensors, -100, 0.1, 2.0))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_rows_that_are_not_aligned(library, kernels):
    """A slice that begins inside a vector: one logit at a time."""
    library.host_machine(1, 2, 163 * 1024)
    logits, target, scale = draw((3, 256), torch.float32, 0)
    held = torch.empty(logits.numel() + 1)[1:].view_as(logits).copy_(logits)
    wanted = results(kernels.rows, (logits, target, scale), -100, 0.1, 0.0)
    torch.testing.assert_close([kernels.rows(held, target, scale, -100, 0.1, 0.0), held], wanted)


def test_too_many_rows_are_refused(library):
    with pytest.raises(RuntimeError, match=r"up to 2\^31 - 1 rows"):
        checked(library.host_cross_entropy, ctypes.byref(CrossEntropy(2**31, 8, -100, DTYPES[torch.float32])))


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [source for source in kernel_sources() if source.stem == "cross_entropy"]
    sources.append(DRIVER / "cross_entropy_memory_check.cu")
    done = run_sanitized(builder.link(tmp_path / "cross_entropy_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "15 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
