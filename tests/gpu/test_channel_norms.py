"""The norms over channels on the GPU, against their reference in float64; the same bits from call to call."""

import pytest
import torch

from ..host_execution.channel_norms import LAYOUTS, SHAPES, Kernels, draw, layer_norm_gate, layer_norm_results, lrn_gate, lrn_results
from ..host_execution.depthwise import DTYPES

LARGER = {"googlenet": (8, 3136, 64), "alexnet": (4, 3025, 96), "convnext": (8, 784, 768)}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGER.values()], ids=[*SHAPES, *LARGER])
def test_numbers_and_bits(kernels, shape, rows, dtype):
    options = (5, 2.0, 0.75, 1.5, True)
    lrn_gate(kernels, shape, rows, dtype, options, "cuda")
    lrn_gate(kernels, shape, rows, dtype, (4, 2.0, 1.25, 1.5, False), "cuda")
    layer_norm_gate(kernels, shape, rows, dtype, device="cuda")
    x, g, weight, bias = draw(shape, rows, dtype, 0, device="cuda")
    runs = []
    for _ in range(3):
        runs.append(lrn_results(kernels.lrn, kernels.lrn_grad, x, g, rows, options))
        runs[-1] += layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, x, g, weight, bias, rows)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
