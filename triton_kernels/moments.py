"""Merges moments: (mean, sum of squared deviations from it) of several parts, as those of the whole.

    mean = sum of count_i / total * mean_i    squares = sum of squares_i + count_i * (mean_i - mean)^2

Moments are fp32 [slots, 2, C]. Tiling: a program merges MERGED slots of 16 channels, and launches follow each other until one slot is
left: a tree of fixed order, so the same partial moments give the same bits. Floors: partial moments read once; launch latency is what
there is to see. Source: Chan, Golub and LeVeque, 1979.
"""

import triton
import triton.language as tl
from torch import Tensor

from .images import on, sum_positions

MERGED = 128  # slots of one program


@triton.jit
def merge(mean, squares, count, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Moments of R rows as one, row r of count[r] values. Weights are at most 1, so nothing overflows; the mean's own rounding is found
    from the distances to it, so that one far larger than the deviations does not spoil them.  # [R, BLOCK_C] -> [BLOCK_C], [BLOCK_C]"""
    there = (count > 0.0)[:, None]
    weight = (count / tl.sum(count, axis=0))[:, None]
    merged = sum_positions(tl.where(there, mean, 0.0) * weight, R, BLOCK_C)
    merged += sum_positions(tl.where(there, mean - merged[None, :], 0.0) * weight, R, BLOCK_C)
    distance = tl.where(there, mean - merged[None, :], 0.0)
    return merged, sum_positions(tl.where(there, squares, 0.0) + distance * distance * count[:, None], R, BLOCK_C)


@triton.jit
def store_moments(sums_ptr, slot, mean, squares, c, C):
    """# [slots, 2, C]"""
    tl.store(sums_ptr + slot * 2 * C + c, mean, mask=c < C)
    tl.store(sums_ptr + (slot * 2 + 1) * C + c, squares, mask=c < C)


@triton.jit(do_not_specialize=("total", "slots", "span", "C"))
def merge_kernel(partials_ptr, sums_ptr, total, slots, span, C, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials [slots, 2, C] of `span` values each (the last: what remains of total) -> sums [cdiv(slots, R), 2, C]"""
    blocks = tl.cdiv(C, BLOCK_C)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = group * R + tl.arange(0, R)
    inside = (slot < slots)[:, None] & (c < C)[None, :]
    at = (slot * 2 * C)[:, None] + c[None, :]
    count = tl.maximum(tl.minimum(total - slot * span, span), 0).to(tl.float32)
    mean, squares = tl.load(partials_ptr + at, mask=inside, other=0.0), tl.load(partials_ptr + at + C, mask=inside, other=0.0)
    mean, squares = merge(mean, squares, count, R, BLOCK_C)
    store_moments(sums_ptr, group, mean, squares, c, C)


def merge_moments(partials: Tensor, span: int, total: int) -> Tensor:
    """[slots, 2, C], of `span` values each and in all `total` of them -> [2, C]"""
    slots, _, C = partials.shape
    while slots > 1:
        merged, config = partials.new_empty(triton.cdiv(slots, MERGED), 2, C), merge_config()
        with on(partials):
            merge_kernel[(merged.shape[0] * triton.cdiv(C, config["BLOCK_C"]),)](partials, merged, total, slots, span, C, **config)
        partials, slots, span = merged, merged.shape[0], span * MERGED
    return partials[0]


def merge_config() -> dict[str, int]:
    return {"R": MERGED, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
