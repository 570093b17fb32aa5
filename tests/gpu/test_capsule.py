"""Routing between capsules on the GPU, against its reference in float64; the same bits from call to call."""

import pytest
import torch

from ..host_execution.capsule import SHAPES, Kernels, draw, gate, results
from ..host_execution.depthwise import DTYPES

LARGER = {"capsnet": (1, 1152, 10, 16, 3), "capsnet_32": (32, 1152, 10, 16, 3), "many_terms": (4, 200, 120, 32, 4)}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("by_input", [False, True], ids=["by_sample", "by_input"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGER.values()], ids=[*SHAPES, *LARGER])
def test_numbers_and_bits(kernels, shape, by_input, dtype):
    gate(kernels, shape, by_input, dtype, device="cuda")
    gate(kernels, shape, by_input, dtype, stop_gradient=True, device="cuda")
    u, g = draw(shape, by_input, dtype, 0, device="cuda")
    runs = [results(kernels.run, kernels.grad, u, g, by_input, shape[4]) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
