"""The fused MLP on the GPU against its layers in float64, and ConvNeXt's block that is made of it."""

import copy

import pytest
import torch

from pyops import _library
from pyops.nn import ConvNeXtBlock
from pyops.testing import within_gate

from ..host_execution.depthwise import DTYPES
from ..host_execution.mlp import SHAPES, Kernels, draw, gate

LARGER = {"tiny": (6272, 96, 384, 96), "second": (3136, 192, 768, 192)}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGER.values()], ids=[*SHAPES, *LARGER])
def test_numbers_and_bits(kernels, shape, dtype):
    gate(kernels, shape, dtype, device="cuda")
    given = draw(*shape, dtype, 0, device="cuda")
    first = kernels.run(*given)
    assert all(torch.equal(kernels.run(*given), first) for _ in range(3))


@pytest.mark.skipif(not _library.has_cuda_kernels(), reason="pyops was built without CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dim", [96, 192, 384])
def test_convnext_block(dim, dtype):
    """384 is more than the kernel takes: its layers run one by one."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        block = ConvNeXtBlock(dim, layer_scale=0.5, backend="cuda").eval().to("cuda", dtype)
        x = torch.randn(2, dim, 14, 14).to("cuda", dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            found, eager = block(x), block.layer_scale * block.block(x) + x
            wide = copy.deepcopy(block).double().cpu()
            truth = wide.layer_scale * wide.block(x.double().cpu()) + x.double().cpu()
        draws.append((found.cpu(), truth, eager.cpu()))
    assert within_gate(draws, dtype) is None
