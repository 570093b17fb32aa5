"""The norms over channels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how sums are cut into blocks, change from run to run.
"""

import ctypes

import pytest
import torch

from pyops.ops import _norm_ops as ops

from .channel_norms import LAYOUTS, SHAPES, Kernels, LayerNorm, draw, layer_norm_gate, layer_norm_results, lrn_gate, lrn_results
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, checked, kernel_sources
from .test_faults import run_sanitized


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_local_response(kernels, shape, rows, dtype):
    lrn_gate(kernels, shape, rows, dtype, (5, 2.0, 0.75, 1.5, False))


@pytest.mark.parametrize(
    "options",
    [(4, 1.0, 0.75, 2.0, True), (1, 0.5, 0.5, 1.0, False), (5, 1.0, 0.5, 1.0, True), (3, 2.0, 1.0, 1.0, False), (5, 0.1, 1.3, 2.0, False),
     (9, 1.0, 2.5, 1.0, True), (40, 3.0, 0.75, 1.0, False), (41, 3.0, 0.6, 1.0, True)],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_local_response_of_any_window_and_power(kernels, rows, options):
    for dtype in (torch.float32, torch.bfloat16):
        lrn_gate(kernels, (2, 9, 24), rows, dtype, options)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [5, 3])
def test_local_response_without_a_constant(library, kernels, rows, size):
    """k = 0: a channel past the last one would be 0 / 0."""
    library.host_machine(1, 2, 163 * 1024)
    x, g, *_ = draw((2, 9, 8), rows, torch.float32, 0)
    options = (size, 1.0, 0.75, 0.0, False)
    ours = lrn_results(kernels.lrn, kernels.lrn_grad, x, g, rows, options)
    for found, truth in zip(ours, lrn_results(ops._lrn, ops._lrn_grad, x.double(), g.double(), rows, options), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layer_norm(kernels, shape, rows, dtype):
    layer_norm_gate(kernels, shape, rows, dtype)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_layer_norm_without_its_affine(kernels, rows):
    layer_norm_gate(kernels, (2, 9, 24), rows, torch.float32, affine=False)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_only_the_sums(library, kernels, rows):
    library.host_machine(1, 2, 163 * 1024)
    x, g, weight, _ = draw((2, 50, 24), rows, torch.bfloat16, 0)
    both = kernels.layer_norm_grad(g, x, rows, weight, 1e-6, True)
    none, sums = kernels.layer_norm_grad(g, x, rows, weight, 1e-6, False)
    assert none.numel() == 0 and torch.equal(sums, both[1])


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("C", [64, 2200])
def test_a_mean_far_above_the_deviation(library, kernels, rows, C):
    library.host_machine(1, 2, 163 * 1024)
    x, *_ = draw((1, 5, C), rows, torch.float32, 0, offset=1000.0)
    found, truth = kernels.layer_norm(x, rows, None, None, 1e-6), ops._layer_norm(x.double(), rows, None, None, 1e-6)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_any_order_of_threads(library, kernels, rows, dtype):
    x, g, weight, bias = draw((3, 63, 24), rows, dtype, 0)
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        found = [lrn_results(kernels.lrn, kernels.lrn_grad, x, g, rows, (size, 1.0, 0.75, 1.0, True)) for size in (4, 5)]
        runs.append([*found[0], *found[1], *layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, x, g, weight, bias, rows)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_any_number_of_multiprocessors(library, kernels, rows):
    """Runs of many lengths and numbers: the same sums, cut elsewhere."""
    x, g, weight, _ = draw((3, 323, 24), rows, torch.float32, 0)
    truth = ops._layer_norm_grad(g.double(), x.double(), rows, weight.double(), 1e-6, True)[1]
    for count in (1, 5, 500):
        library.host_machine(1, count, 163 * 1024)
        sums = kernels.layer_norm_grad(g, x, rows, weight, 1e-6, False)[1]
        torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_aligned(library, kernels):
    """A slice that begins inside a vector: one channel at a time."""
    library.host_machine(1, 2, 163 * 1024)
    x, g, weight, bias = draw((2, 9, 16), True, torch.bfloat16, 0)
    held = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in (x, g, weight, bias)]
    options = (5, 1.0, 0.75, 1.0, False)
    for a, b in zip(
        lrn_results(kernels.lrn, kernels.lrn_grad, x, g, True, options),
        lrn_results(kernels.lrn, kernels.lrn_grad, *held[:2], True, options),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, x, g, weight, bias, True),
        layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, *held, True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 0, 8), (2, 9, 0)], ids=["no_images", "no_positions", "no_channels"])
def test_nothing_to_do(library, kernels, shape, rows):
    library.host_machine(1, 2, 163 * 1024)
    x, g, weight, bias = draw(shape, rows, torch.bfloat16, 0)
    found = lrn_results(kernels.lrn, kernels.lrn_grad, x, g, rows, (5, 1.0, 0.75, 1.0, False))
    found += layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, x, g, weight, bias, rows)
    for value in found:
        assert not value.any()


def test_what_does_not_fit_an_index_is_refused(library):
    p = LayerNorm(2**14, 2**17, 8, DTYPES[torch.float32], True)
    with pytest.raises(RuntimeError, match=r"up to 2\^30 positions"):
        checked(library.host_layer_norm, 0, ctypes.byref(p), None)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [source for source in kernel_sources() if source.parent.name == "norm" or source.name == "channel_sums.cu"]
    sources.append(DRIVER / "channel_norms_memory_check.cu")
    done = run_sanitized(builder.link(tmp_path / "channel_norms_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "48 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
