"""Cross entropy over rows of logits, which become their own gradient, in the terms of pyops/ops/_cross_entropy_ops.py.

    y = softcap * tanh(logits / softcap), or logits      loss = lse(y) - (1 - smoothing) * y[target] - smoothing * mean(y)

logits [M, V], 16 bits or fp32; target [M] int64, scale and losses [M] fp32, as is all arithmetic.

Tiling: a program owns a row and walks it BLOCK_V at a time: once for each lane's highest logit and its sum of exponentials below that,
which the lanes then merge, and once more for the gradient. The same bits every call.

Floors: logits read once and, with scale, once more, mostly from L2, and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import tanh
from .images import on, store_image

SIZES = ("units", "ignore_index")  # one binary whatever they are
MOST_BLOCK = 2048  # logits at a time: 8 a thread with 8 warps; 16 spilled


@triton.jit
def load_capped(row_ptr, v, V, softcap, CAPPED: tl.constexpr):
    """(y, y / softcap or zero); -inf where there is no logit.  # [BLOCK_V]"""
    x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    bend = tl.zeros_like(x)
    if CAPPED:
        bend = tanh(x / softcap)
        x = tl.where(v < V, softcap * bend, x)
    return x, bend


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    logits_ptr, target_ptr, scale_ptr, losses_ptr, units, ignore_index, smoothing, softcap,
    CAPPED: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """V comes in UNITs, so that the rows' alignment is known."""
    V = units * UNIT
    m = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + m * V
    target = tl.load(target_ptr + m)
    ignored, exists = target == ignore_index, (target >= 0) & (target < V)
    chosen = tl.load(row_ptr + tl.where(exists, target, 0)).to(tl.float32)  # before the sums' barrier: the gradient is written over it
    if CAPPED:
        chosen = softcap * tanh(chosen / softcap)
    lane = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    totals = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        y, _ = load_capped(row_ptr, start + lane, V, softcap, CAPPED)
        above = tl.maximum(highest, y)
        seen = above > float("-inf")  # else the difference would be NaN
        before = tl.where(seen, tl.exp(highest - above), 0.0)
        sums = sums * before + tl.where(y == float("-inf"), 0.0, tl.exp(y - above))
        totals += tl.where(start + lane < V, y, 0.0)
        highest = above
    top = tl.max(highest, axis=0)
    total = tl.sum(tl.where(sums == 0.0, 0.0, sums * tl.exp(highest - top)), axis=0)
    loss = tl.log(total) + (1.0 - smoothing) * (top - chosen)
    if smoothing != 0.0:
        loss += smoothing * (top - tl.sum(totals, axis=0) / V)
    fixed = tl.where(ignored, 0.0, float("nan"))  # where there is no target
    usable = exists & (ignored == 0)
    tl.store(losses_ptr + m, tl.where(usable, loss, fixed))
    if scale_ptr is not None:
        scale, even = tl.load(scale_ptr + m), smoothing / V
        for start in range(0, V, BLOCK_V):
            v = start + lane
            y, bend = load_capped(row_ptr, v, V, softcap, CAPPED)
            share = tl.where(v == target, even + (1.0 - smoothing), even)
            grad = (tl.exp(y - top) / total - share) * scale * (1.0 - bend * bend)
            store_image(row_ptr + v, tl.where(usable, grad, fixed), v < V)


def launch_config(V: int) -> dict[str, int]:
    """Compile-time tile: fixed by the size, so that a shape has one binary and one result."""
    block = min(MOST_BLOCK, max(128, triton.next_power_of_2(V)))
    return {"UNIT": 8 if V % 8 == 0 else 1, "BLOCK_V": block, "num_warps": max(1, block // 256), "num_stages": 2}


def cross_entropy_rows_(
    logits: Tensor, target: Tensor, scale: Tensor | None, ignore_index: int, smoothing: float, softcap: float
) -> Tensor:
    """The losses, as pyops::cross_entropy_rows_."""
    M, V = logits.shape
    if not logits.is_contiguous():
        raise ValueError(f"cross_entropy_rows_: logits: expected a contiguous [M, V], got strides {logits.stride()}")
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    if M:
        config = launch_config(V)
        scale = None if scale is None else scale.contiguous()
        with on(logits):
            rows_kernel[(M,)](
                logits, target.contiguous(), scale, losses, V // config["UNIT"], ignore_index, smoothing, softcap,
                CAPPED=softcap != 0, **config,
            )  # fmt: skip
    return losses
