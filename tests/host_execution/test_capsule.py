"""Routing between capsules, executed on the host and held to the numerics gate against its reference in float64.

The same .cu file as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and the
number of SMs, which decides how inputs are cut into blocks, change from run to run.
"""

import ctypes

import pytest
import torch

from pyops.ops import _capsule_ops as ops

from .capsule import SHAPES, Kernels, draw, gate, results
from .depthwise import DTYPES
from .harness import DRIVER, ROOT, SANITIZE, SANITIZED_FLAGS, checked
from .test_faults import run_sanitized

ORDERS = {"by_sample": False, "by_input": True}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_routing(kernels, shape, dtype):
    gate(kernels, shape, False, dtype)


@pytest.mark.parametrize("name", ["vectors", "odd"])
def test_predictions_by_input(kernels, name):
    gate(kernels, SHAPES[name], True, torch.float32)


@pytest.mark.parametrize("name", ["vectors", "one_iteration"])
def test_constant_couplings(kernels, name):
    gate(kernels, SHAPES[name], False, torch.float32, stop_gradient=True)


@pytest.mark.parametrize("by_input", ORDERS.values(), ids=ORDERS)
def test_any_order_of_threads(library, kernels, by_input):
    u, g = draw(SHAPES["vectors"], by_input, torch.bfloat16, 0)
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append(results(kernels.run, kernels.grad, u, g, by_input, 3))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_any_number_of_multiprocessors(library, kernels):
    """Runs of many lengths and numbers: the same sums, cut elsewhere."""
    u, g = draw((1, 331, 10, 16, 3), False, torch.float32, 0)
    truth = results(ops._run, ops._grad, u.double(), g.double(), False, 3)
    for count in (1, 3, 500):
        library.host_machine(1, count, 163 * 1024)
        for found, wanted in zip(results(kernels.run, kernels.grad, u, g, False, 3), truth, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_predictions_that_are_not_aligned(library, kernels):
    """A slice that begins inside a vector: one element at a time."""
    library.host_machine(1, 2, 163 * 1024)
    u, g = draw(SHAPES["vectors"], False, torch.bfloat16, 0)
    held = torch.empty(u.numel() + 1, dtype=u.dtype)[1:].view_as(u).copy_(u)
    pairs = zip(results(kernels.run, kernels.grad, u, g, False, 3), results(kernels.run, kernels.grad, held, g, False, 3), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_agreement_at_all(library, kernels):
    """Sums of zero: a result and a gradient of zero, not of 0 / 0."""
    library.host_machine(1, 2, 163 * 1024)
    u, g = torch.zeros(1, 20, 4, 8), torch.ones(1, 4, 8)
    for found in results(kernels.run, kernels.grad, u, g, False, 3):
        assert not found.any()


def test_no_samples(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    found = results(kernels.run, kernels.grad, torch.ones(0, 9, 4, 8), torch.ones(0, 4, 8), False, 3)
    assert [t.numel() for t in found] == [0, 0, 0]


@pytest.mark.parametrize("J, D, T", [(257, 8, 1), (4, 33, 1), (200, 32, 3)])
def test_what_does_not_fit_is_refused(library, kernels, J, D, T):
    p = kernels.block(torch.empty(1, 2, J, D), False, T, False, None, None, None)
    with pytest.raises(RuntimeError, match=r"up to 256 outputs of 32 elements, J \* \(D \+ 1\) \* T up to 16384"):
        checked(library.host_capsule, 0, ctypes.byref(p), None)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [ROOT / "csrc" / "capsule" / "routing.cu", DRIVER / "capsule_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "capsule_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "36 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
