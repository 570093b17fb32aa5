"""gaussian_sample's kernels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads changes
from run to run.
"""

import ctypes

import pytest
import torch

from pyops.ops import _philox

from .depthwise import DTYPES
from .gaussian import SHAPES, Gaussian, Kernels, draw, gate, results
from .harness import DRIVER, ROOT, SANITIZE, SANITIZED_FLAGS, checked
from .test_faults import run_sanitized


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sample(kernels, shape, dtype):
    gate(kernels, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("absent", [3, 4], ids=["no_grad", "no_grad_kl"])
def test_one_gradient(kernels, absent, dtype):
    gate(kernels, (3, 44), dtype, lambda call: (*call[:absent], None, *call[absent + 1 :]))


@pytest.mark.parametrize("D", [24, 27])
def test_rows_apart(kernels, D):
    """Halves of one tensor, and one row for all."""

    def change(call):
        mean, log_var, seed, grad, grad_kl = call
        return *torch.cat([mean, log_var], 1).chunk(2, 1), seed, grad[:1].expand_as(grad), grad_kl

    gate(kernels, (5, D), torch.float32, change)


def test_numbers_are_those_of_every_backend(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    zeros, seed = torch.zeros(9, 2100), torch.tensor([-(2**62) + 12345])
    found, truth = kernels.run(zeros, zeros, seed)[0], _philox.normal(seed, 9, 2100, torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6)


def test_rows_that_are_not_aligned(library, kernels):
    """A slice that begins inside a piece: column by column."""
    library.host_machine(1, 2, 163 * 1024)
    call = draw((3, 16), torch.bfloat16, 0)
    held = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in call]
    for ours, again in zip(results(kernels.run, kernels.grad, *call), results(kernels.run, kernels.grad, *held), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_any_order_of_threads(library, kernels):
    call, runs = draw((3, 2200), torch.float32, 0), []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append([t for part in results(kernels.run, kernels.grad, *call) for t in part])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)], ids=["no_rows", "no_columns"])
def test_nothing_to_do(library, kernels, shape):
    library.host_machine(1, 2, 163 * 1024)
    (z, kl), grads = results(kernels.run, kernels.grad, *draw(shape, torch.bfloat16, 0))
    assert z.shape == shape and not kl.any() and all(g.shape == shape for g in grads)


def test_what_does_not_fit_a_launch_is_refused(library):
    p = Gaussian(2**32, 2**20, 2**20, 2**20, 0, DTYPES[torch.float32])
    with pytest.raises(RuntimeError, match="too much for one launch"):
        checked(library.host_gaussian, 0, ctypes.byref(p), None)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [ROOT / "csrc/sampling/gaussian.cu", DRIVER / "gaussian_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "gaussian_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "18 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
