"""Each kernel on the GPU, its path asked for by name, against the float64 loop; and that the host's model of the GPU is right."""

import ctypes

import numpy as np
import pytest
import torch

from pyops import _library
from pyops import kernels as budgets

from ..budgets import REGISTER_SLACK
from ..host_execution.harness import checked, plain_name
from ..host_execution.rnn import CELLS, DTYPES, LARGER, PATHS, SHAPES, Problem, assert_as_good_as_eager
from ..host_execution.test_machine import pointers, tf32, warp_results


def run(library, problem, path):
    forward = problem.forward(library, PATHS[path])
    found = forward | problem.backward(library, forward, PATHS[path])
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, path, cell, dtype, shape):
    problem = Problem(cell, dtype, **SHAPES[shape], seed=3, device="cuda")
    first = run(library, problem, path)
    assert_as_good_as_eager(first, problem)
    for _ in range(5):
        again = run(library, problem, path)
        assert all(torch.equal(value, again[name]) for name, value in first.items()), "two runs gave different bits"


@pytest.mark.parametrize("path, cell, dtype, H, T, B", LARGER, ids=lambda v: str(v).replace("torch.", ""))
def test_larger(library, path, cell, dtype, H, T, B):
    problem = Problem(cell, dtype, T, B, H, lengths=[i % (T + 1) for i in range(B)], device="cuda")
    try:
        found = run(library, problem, path)
    except RuntimeError as reason:
        if "does not fit" in str(reason) or "fewer SMs" in str(reason):
            pytest.skip(f"this GPU: {reason}")
        raise
    assert_as_good_as_eager(found, problem)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_a_long_sequence_through_the_grid_barrier(library, cell):
    """Thousands of meetings of all blocks: a flag written too early, or seen too early, is a matter of time."""
    problem = Problem(cell, torch.bfloat16, T=2000, B=16, H=512, device="cuda")
    first = run(library, problem, "grid")
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
    again = run(library, problem, "grid")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("by_ldmatrix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix_layouts(library, dtype, by_ldmatrix):
    a, b = torch.randn(16, 16, device="cuda").to(dtype), torch.randn(16, 8, device="cuda").to(dtype)
    c = torch.full((16, 8), float("nan"), device="cuda")
    checked(library.primitive_matmul, *pointers(a, b, c), int(dtype == torch.bfloat16), by_ldmatrix)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_mma_layout_and_rounding(library):
    a, b, c = (torch.randn(*shape, device="cuda") for shape in ((16, 8), (8, 8), (16, 8)))
    checked(library.primitive_matmul_tf32, *pointers(a, b, c))
    torch.testing.assert_close(c.double(), tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)


def test_shuffles_votes_and_atomics(library):
    mine, out = torch.arange(32, dtype=torch.int32, device="cuda"), torch.zeros(10, 32, dtype=torch.int32, device="cuda")
    checked(library.primitive_warp, *pointers(mine, out))
    out = out.cpu().numpy()
    np.testing.assert_array_equal(out[:7], warp_results(mine.cpu().numpy()))
    assert out[7, 0] == mine.sum() and out[8, 0] == mine.max() and out[9, 0] == out[9, 1] > 0


def test_thread_and_block_indices(library):
    out = torch.zeros(24, 32, dtype=torch.int32, device="cuda")
    checked(library.primitive_indices, *pointers(out))
    assert torch.equal(out.cpu(), (torch.arange(24)[:, None] * 10000 + torch.arange(32)).int())


def test_asynchronous_copies(library):
    values, out = torch.arange(256, dtype=torch.float32, device="cuda"), torch.zeros(256, device="cuda")
    checked(library.primitive_reverse, *pointers(values, out), ctypes.c_int(1))
    assert torch.equal(out, values.flip(0))


def test_asynchronous_copies_of_nothing_are_zeros(library):
    values, out = torch.arange(80, dtype=torch.float32, device="cuda") + 1, torch.full((256,), float("nan"), device="cuda")
    checked(library.primitive_copy_or_zero, *pointers(values, out), ctypes.c_int(20))
    assert torch.equal(out, torch.cat([values, torch.zeros(176, device="cuda")]))


def test_what_the_driver_says_of_a_kernel_is_in_the_table():
    """cudaFuncGetAttributes of the built extension against pyops/kernel_budgets.json."""
    if not _library.has_cuda_kernels():
        pytest.skip("pyops was built without CUDA kernels")
    found = {plain_name(row["name"]): row for row in _library.extension.kernel_attributes("")}
    arch = {80: "sm_80", 90: "sm_90a"}.get(next(iter(found.values()))["binary_version"])
    if arch is None:
        pytest.skip("the table has no column for the architecture this extension was built for")
    table = {row.kernel: row for row in budgets.load() if (row.backend, row.arch) == ("cuda", arch)}
    assert set(found) == set(table)
    for name, row in found.items():
        assert row["local_bytes"] == table[name].stack_bytes, name
        assert abs(row["registers"] - table[name].registers) <= REGISTER_SLACK, (name, row["registers"], table[name].registers)
