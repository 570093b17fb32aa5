"""Attention's kernels on the GPU against the reference in float64, and the public functions that choose them."""

import pytest
import torch

from pyops import _library, flash_attention, window_attention
from pyops.testing import within_gate
from pyops.testing.samples.attention import attention_arguments
from pyops.testing.samples.window_attention import window_arguments

from ..host_execution.attention import DTYPES, SAMPLES, WINDOW_SAMPLES, Kernels, gate, prepared, window_call, window_gate

# B, H, N, D of attention; B, H, W, heads, D, window and shift of windows
LARGER = {
    "vit": (16, 12, 197, 64),
    "clip": (4, 16, 257, 80),
    "swin": (2048, 3, 49, 32),
    "bert": (16, 12, 128, 64),
    "widest": (2, 3, 320, 128),
}
MAPS = {
    "swin": (16, 56, 56, 3, 32, 7, 3),
    "swin_v2": (8, 64, 64, 3, 32, 8, 4),
    "padded": (2, 100, 76, 6, 32, 7, 3),
    "w16": (2, 64, 64, 4, 32, 16, 8),
}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_attention(kernels, sample, dtype):
    gate(kernels, sample.make, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sample", WINDOW_SAMPLES.values(), ids=WINDOW_SAMPLES)
def test_window_attention(kernels, sample, dtype):
    window_gate(kernels, sample.make, dtype, "cuda")


@pytest.mark.parametrize("shape", LARGER.values(), ids=LARGER)
def test_larger(kernels, shape):
    make = lambda dtype, device, seed: attention_arguments(*shape, dtype, device, seed)  # noqa: E731
    gate(kernels, make, torch.bfloat16, "cuda")
    args, kwargs = make(torch.bfloat16, "cuda", 0)
    first = kernels.attention(prepared(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(first, kernels.attention(prepared(*args, **kwargs)), strict=True))


@pytest.mark.parametrize("cosine", [False, True], ids=["scaled", "cosine"])
@pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
def test_larger_maps(kernels, shape, cosine):
    *shape, shift = shape
    make = lambda dtype, device, seed: window_arguments(*shape, dtype, device, seed, shift=shift, cosine=cosine)  # noqa: E731
    window_gate(kernels, make, torch.bfloat16, "cuda")
    call = window_call(make, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(kernels.window_attention(call), kernels.window_attention(call), strict=True))


@pytest.mark.skipif(not _library.has_cuda_kernels(), reason="pyops was built without CUDA kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_more_heads_than_a_grid_has_rows(dtype):
    """70,000 windows' worth of heads, through the public functions."""
    query = torch.randn(70_000, 1, 4, 8, device="cuda", dtype=dtype)
    found, eager = (flash_attention(query, query, query, backend=backend) for backend in ("cuda", "eager"))
    truth = flash_attention(*[query.double()] * 3, backend="eager")
    assert within_gate([(found, truth, eager)], dtype) is None
    qkv = torch.randn(1, 560, 500, 24, device="cuda", dtype=dtype)
    found, eager = (window_attention(qkv, 1, 2, backend=backend) for backend in ("cuda", "eager"))
    assert within_gate([(found, window_attention(qkv.double(), 1, 2, backend="eager"), eager)], dtype) is None
