"""Cross entropy over rows on the GPU, against its reference in float64; the same bits from call to call."""

import pytest
import torch

from pyops.ops import _cross_entropy_ops as ops

from ..conftest import assert_gate
from ..host_execution.cross_entropy import Kernels
from ..host_execution.depthwise import DTYPES
from ..host_execution.test_cross_entropy import CALLS, SHAPES, draw, results

LARGER = {"gpt2": (64, 50257), "llama": (64, 32000), "characters": (4096, 256)}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGER.values()], ids=[*SHAPES, *LARGER])
def test_numbers_and_bits(library, shape, options, dtype):
    kernels = Kernels(library)

    def each(seed):
        tensors = [t.cuda() for t in draw(shape, dtype, seed)]
        wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]
        return [results(run, t, -100, *options) for run, t in ((kernels.rows, tensors), (ops._reference, wide), (ops._reference, tensors))]

    assert_gate(lambda seed: [found[:1] for found in each(seed)], torch.float32)
    assert_gate(lambda seed: [found[1:] for found in each(seed)], dtype, gradient=True)
    tensors = [t.cuda() for t in draw(shape, dtype, 0)]
    runs = [results(kernels.rows, tensors, -100, *options) for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))
