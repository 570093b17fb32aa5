"""The fused MLP, executed on the host and held to the numerics gate against its layers in float64.

The same .cu file as on a GPU, compiled with the host's C++ compiler; outputs and packed weights are poisoned, the schedule of threads
and the number of SMs, which decides how many rows a block has, change from run to run. float32 is held against layers whose products
are of operands rounded to tf32 as well.
"""

import pytest
import torch

from pyops.ops import _mlp_ops
from pyops.ops._activations import NAMES

from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .mlp import SHAPES, Kernels, draw, gate, layers
from .test_faults import run_sanitized


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error(kernels, shape, dtype, norm):
    gate(kernels, shape, dtype, norm, residual=norm)


@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_every_activation(kernels, activation, dtype):
    gate(kernels, (20, 24, 40, 17), dtype, activation=activation)


def integers(M, C, H, O, dtype):
    x, weights, residual = draw(M, C, H, O, dtype, 0)
    weights = (weights[0].sign(), weights[1].round(), weights[2].sign() * (weights[2].abs() > H**-0.5), weights[3].round())
    return x.sign(), weights, residual.round()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("C, O", [(40, 48), (96, 80), (190, 35)])
def test_integers_are_exact(library, kernels, dtype, C, O):
    library.host_machine(1, 2, 163 * 1024)
    given = integers(50, C, 56, O, dtype)
    relu = NAMES.index("relu")
    truth = layers(*(tuple(t.double() for t in part) if isinstance(part, tuple) else part.double() for part in given), False, relu)
    assert torch.equal(kernels.run(*given, False, relu), truth.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("C", [96, 136])
def test_any_order_of_threads_and_rows_a_block(library, kernels, dtype, C):
    given = draw(200, C, 100, C, dtype, 0)
    runs = []
    for seed, count in ((0, 1), (1, 1), (2, 5), (3, 500)):
        library.host_machine(seed, count, 163 * 1024)
        runs.append(kernels.run(*given))
    assert all(torch.equal(runs[0], again) for again in runs[1:])


def test_rows_that_are_not_aligned(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    x, weights, residual = draw(20, 32, 40, 32, torch.bfloat16, 0)
    held = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in (x, residual)]
    assert torch.equal(kernels.run(held[0], weights, held[1]), kernels.run(x, weights, residual))


def test_a_mean_far_above_the_deviation(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    x, weights, residual = draw(20, 96, 64, 24, torch.float32, 0)
    truth = layers(x.double(), tuple(t.double() for t in weights), residual.double())
    far = kernels.run(x + 1000.0, weights, residual)
    assert (far.double() - truth).norm() < 1e-3 * truth.norm()


def test_no_rows(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    assert kernels.run(*draw(0, 24, 40, 16, torch.bfloat16, 0)).shape == (0, 16)


def test_what_is_too_wide_is_refused(kernels):
    for C, O in ((_mlp_ops.MOST + 1, 24), (24, _mlp_ops.MOST + 1)):
        with pytest.raises(RuntimeError, match=f"up to {_mlp_ops.MOST} inputs and outputs"):
            kernels.run(*draw(4, C, 8, O, torch.bfloat16, 0))


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*(source for source in kernel_sources() if source.parent.name == "linear"), DRIVER / "mlp_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "mlp_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "18 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
