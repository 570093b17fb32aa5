"""The model of the machine does what CUDA and the PTX ISA say: lane layouts, rounding, shuffles, copies; and it reports faults."""

import ctypes

import numpy as np
import pytest
import torch

from .harness import checked


def array(values, dtype):
    values = np.ascontiguousarray(values, dtype=dtype)
    return values, values.ctypes.data_as(ctypes.c_void_p)


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


@pytest.mark.parametrize("by_ldmatrix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix_layouts(library, dtype, by_ldmatrix):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.full((16, 8), float("nan"))
    checked(library.primitive_matmul, *pointers(a, b, c), int(dtype == torch.bfloat16), by_ldmatrix)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_mma_layout_and_rounding(library):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.full((16, 8), float("nan"))
    checked(library.primitive_matmul_tf32, *pointers(a, b, c))
    torch.testing.assert_close(c.double(), tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6), "nothing was rounded to tf32"


def tf32(t):
    """Rounded to 10 bits of mantissa, ties away from zero, by arithmetic on the value and not on its bits."""
    mantissa, exponent = torch.frexp(t.double())
    scaled = mantissa * 2**11
    return torch.ldexp(torch.sign(scaled) * torch.floor(scaled.abs() + 0.5) / 2**11, exponent)


def test_conversions_round_like_torch(library):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    halves = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = ((halves[:-1] + halves[1:]) / 2).numpy().view(np.uint32)  # halfway between neighbouring float16
    values, values_pointer = array(np.concatenate([bits, ties, between]).view(np.float32), np.float32)
    bf16, bf16_pointer = array(np.zeros(len(values)), np.uint16)
    f16, f16_pointer = array(np.zeros(len(values)), np.uint16)
    library.primitive_round(values_pointer, bf16_pointer, f16_pointer, ctypes.c_int64(len(values)))
    finite = ~np.isnan(values)
    for mine, dtype in ((bf16, torch.bfloat16), (f16, torch.float16)):
        theirs = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (mine == theirs)[finite].all()
    every, every_pointer = array(np.arange(2**16), np.uint16)
    wide = [array(np.zeros(2**16), np.float32) for _ in range(2)]
    library.primitive_widen(every_pointer, wide[0][1], wide[1][1], ctypes.c_int64(2**16))
    for (mine, _), dtype in zip(wide, (torch.bfloat16, torch.float16), strict=True):
        theirs = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(mine, theirs)


def warp_results(mine):
    """What tests of `warp_operations` expect, from numpy alone."""
    lane = np.arange(32)
    ballot = sum(1 << i for i in range(32) if mine[i] % 3 == 0)
    rows = [
        mine[(lane + 5) % 32], mine[lane ^ 3], mine[np.where(lane < 2, lane, lane - 2)], mine[np.where(lane + 7 > 31, lane, lane + 7)],
        np.full(32, np.array(ballot, np.uint32).view(np.int32)), np.full(32, 3), np.full(32, 0),
    ]  # fmt: skip
    return np.stack(rows)


def test_shuffles_votes_and_atomics(library):
    mine, mine_pointer = array(np.arange(32), np.int32)
    for seed in range(4):
        out, out_pointer = array(np.zeros((10, 32)), np.int32)
        library.host_machine(seed, 1, 163 * 1024)
        checked(library.primitive_warp, mine_pointer, out_pointer)
        np.testing.assert_array_equal(out[:7], warp_results(mine))
        assert out[7, 0] == mine.sum() and out[8, 0] == mine.max()
        assert out[9, 0] == out[9, 1] > 0


def test_asynchronous_copies_land_at_the_wait(library):
    values, values_pointer = array(np.arange(256) + 1.0, np.float32)
    out, out_pointer = array(np.zeros(256), np.float32)
    library.host_machine(1, 1, 163 * 1024)
    checked(library.primitive_reverse, values_pointer, out_pointer, 1)
    np.testing.assert_array_equal(out, values[::-1])
    checked(library.primitive_reverse, values_pointer, out_pointer, 0)
    assert np.isnan(out).all()  # read before the wait: the copies have not landed


def test_asynchronous_copies_of_nothing_are_zeros(library):
    values, values_pointer = array(np.arange(80) + 1.0, np.float32)
    out, out_pointer = array(np.full(256, np.nan), np.float32)
    library.host_machine(1, 1, 163 * 1024)
    checked(library.primitive_copy_or_zero, values_pointer, out_pointer, 20)
    np.testing.assert_array_equal(out, np.concatenate([values, np.zeros(176)]))


def test_thread_and_block_indices(library):
    out, out_pointer = array(np.zeros(24 * 32), np.int32)
    checked(library.primitive_indices, out_pointer)
    np.testing.assert_array_equal(out.reshape(24, 32), np.arange(24)[:, None] * 10000 + np.arange(32))


def test_unwritten_shared_memory_is_nan(library):
    out, out_pointer = array(np.zeros(32), np.float32)
    checked(library.primitive_unwritten, out_pointer)
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    "kind, message",
    [(0, "40 of 64 threads reached __syncthreads"), (1, "1 of 32 threads reached __syncwarp"),
     (2, "threads that must go together"), (3, "64 threads wait for a flag"), (4, "only the full mask is modelled")],
)  # fmt: skip
def test_divergence_and_deadlock_are_errors(library, kind, message):
    library.host_machine(1, 1, 163 * 1024)
    with pytest.raises(RuntimeError, match=message):
        checked(library.primitive_diverged, kind)
