"""Dynamic routing between capsules and its gradient, in the terms of pyops/ops/_capsule_ops.py and csrc/capsule/routing.h.

Tiling: a program routes one sample. It walks tiles of BLOCK_I inputs x all J outputs x all D elements, J and D padded to powers of two;
each lane keeps sums of its own through an iteration, which are added as a tree at its end. The gradient's last walk needs every
iteration's h and V: they pass through fp32 scratch [N, T, 2, BLOCK_J, BLOCK_D].

Floors: u read once an iteration, from L2 after the first; the gradient written once. One sample keeps one multiprocessor busy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import on, store_image

LANE = 8  # elements of a tile that a thread owns
MOST_WARPS = 16
SIZES = ("N", "I", "T")  # one binary whatever they are


@triton.jit
def capsule(J: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """(offsets in J capsules of D elements, which exist)  # [BLOCK_J, BLOCK_D]"""
    j, d = tl.arange(0, BLOCK_J)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return j * D + d, (j < J) & (d < D)


@triton.jit
def squash_scale(s):
    """(|s| / (1 + |s|^2), |s|, 1 + |s|^2)  # [BLOCK_J, 1]"""
    square = tl.sum(s * s, axis=1)[:, None]
    length, below = tl.sqrt_rn(square), 1.0 + square
    return length / below, length, below


@triton.jit
def squash_gradient(s, grad):
    """# [BLOCK_J, BLOCK_D]"""
    scale, length, below = squash_scale(s)
    along = tl.sum(s * grad, axis=1)[:, None] * (2.0 - below) / (below * below * tl.where(length > 0.0, length, 1.0))
    return grad * scale + s * along


@triton.jit
def locate(
    n, first, N, I, J: tl.constexpr, D: tl.constexpr, BY_INPUT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) of the tile of inputs from `first` on  # [BLOCK_I, BLOCK_J, BLOCK_D]"""
    i = (first + tl.arange(0, BLOCK_I)).to(tl.int64)
    row = i * N + n if BY_INPUT else n * I + i
    at, exists = capsule(J, D, BLOCK_J, BLOCK_D)
    return (row * (J * D))[:, None, None] + at[None, :, :], (i < I)[:, None, None] & exists[None, :, :]


@triton.jit
def couplings(u, earlier, J: tl.constexpr, BLOCK_J: tl.constexpr):
    """# [BLOCK_I, BLOCK_J]"""
    logits = tl.sum(u * earlier[None, :, :], axis=2)
    logits = tl.where((tl.arange(0, BLOCK_J) < J)[None, :], logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return share / tl.sum(share, axis=1)[:, None]


@triton.jit
def logit_gradient(u, h, c):
    """# [BLOCK_I, BLOCK_J]"""
    share = tl.sum(u * h[None, :, :], axis=2)
    return c * (share - tl.sum(c * share, axis=1)[:, None])


@triton.jit(do_not_specialize=SIZES)
def capsule_run_kernel(
    input_ptr, output_ptr, sums_ptr, N, I, T, J: tl.constexpr, D: tl.constexpr, BY_INPUT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at, exists = capsule(J, D, BLOCK_J, BLOCK_D)
    earlier = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    v = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for t in range(T):
        sums = tl.zeros([BLOCK_I, BLOCK_J, BLOCK_D], tl.float32)
        for first in range(0, I, BLOCK_I):
            offsets, inside = locate(n, first, N, I, J, D, BY_INPUT, BLOCK_I, BLOCK_J, BLOCK_D)
            u = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            sums += couplings(u, earlier, J, BLOCK_J)[:, :, None] * u
        s = tl.sum(sums, axis=0)
        tl.store(sums_ptr + (n * T + t) * (J * D) + at, s, mask=exists)
        v = s * squash_scale(s)[0]
        earlier += v
    store_image(output_ptr + n * (J * D) + at, v, exists)


@triton.jit(do_not_specialize=SIZES)
def capsule_grad_kernel(
    grad_ptr, input_ptr, sums_ptr, output_ptr, scratch_ptr, N, I, T, J: tl.constexpr, D: tl.constexpr, BY_INPUT: tl.constexpr,
    STOP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at, exists = capsule(J, D, BLOCK_J, BLOCK_D)
    sums_ptr += n * T * (J * D)
    TILE: tl.constexpr = BLOCK_J * BLOCK_D
    scratch_ptr += n * T * (2 * TILE) + tl.arange(0, BLOCK_J)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    earlier = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for t in range(T):
        tl.store(scratch_ptr + (2 * t + 1) * TILE, earlier)
        s = tl.load(sums_ptr + t * (J * D) + at, mask=exists, other=0.0)
        earlier += s * squash_scale(s)[0]
    tl.debug_barrier()
    grad = tl.load(grad_ptr + n * (J * D) + at, mask=exists, other=0.0).to(tl.float32)
    start = T - 1 if STOP else 0
    for step in range(T - 1 - start):  # from the last iteration back to the second
        t = T - 1 - step
        h = squash_gradient(tl.load(sums_ptr + t * (J * D) + at, mask=exists, other=0.0), grad)
        tl.store(scratch_ptr + 2 * t * TILE, h)
        earlier = tl.load(scratch_ptr + (2 * t + 1) * TILE)
        sums = tl.zeros([BLOCK_I, BLOCK_J, BLOCK_D], tl.float32)
        for first in range(0, I, BLOCK_I):
            offsets, inside = locate(n, first, N, I, J, D, BY_INPUT, BLOCK_I, BLOCK_J, BLOCK_D)
            u = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            sums += logit_gradient(u, h, couplings(u, earlier, J, BLOCK_J))[:, :, None] * u
        grad = tl.sum(sums, axis=0) + tl.where(step > 0, grad, 0.0)
    h = squash_gradient(tl.load(sums_ptr + start * (J * D) + at, mask=exists, other=0.0), grad)
    earlier = tl.load(scratch_ptr + (2 * start + 1) * TILE)
    tl.debug_barrier()
    for first in range(0, I, BLOCK_I):
        offsets, inside = locate(n, first, N, I, J, D, BY_INPUT, BLOCK_I, BLOCK_J, BLOCK_D)
        u = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        found = couplings(u, earlier, J, BLOCK_J)[:, :, None] * h[None, :, :]
        for t in range(start + 1, T):
            own, before = tl.load(scratch_ptr + 2 * t * TILE), tl.load(scratch_ptr + (2 * t + 1) * TILE)
            c = couplings(u, before, J, BLOCK_J)
            found += c[:, :, None] * own[None, :, :] + logit_gradient(u, own, c)[:, :, None] * before[None, :, :]
        store_image(output_ptr + offsets, found, inside)


def capsule_run(predictions, by_input, num_iterations) -> tuple[Tensor, Tensor]:
    """(v, sums), as pyops::capsule_run."""
    predictions = predictions.contiguous()
    N, I, J, D = _sizes(predictions, by_input)
    output = torch.empty(N, J, D, dtype=predictions.dtype, device=predictions.device)
    sums = torch.empty(N, num_iterations, J, D, dtype=torch.float32, device=predictions.device)
    if N:
        with on(predictions):
            capsule_run_kernel[(N,)](predictions, output, sums, N, I, num_iterations, BY_INPUT=by_input, **launch_config(J, D))
    return output, sums


def capsule_grad(grad, predictions, by_input, sums, stop_gradient) -> Tensor:
    """The predictions' gradient, as pyops::capsule_grad."""
    grad, predictions, sums = grad.contiguous(), predictions.contiguous(), sums.contiguous()
    N, I, J, D = _sizes(predictions, by_input)
    output, T, config = torch.empty_like(predictions), sums.shape[1], launch_config(J, D)
    scratch = torch.empty(N, T, 2, config["BLOCK_J"] * config["BLOCK_D"], dtype=torch.float32, device=predictions.device)
    if N:
        options = {"BY_INPUT": by_input, "STOP": stop_gradient, **config}
        with on(predictions):
            capsule_grad_kernel[(N,)](grad, predictions, sums, output, scratch, N, I, T, **options)
    return output


def launch_config(J: int, D: int) -> dict[str, int]:
    """Compile-time tile: fixed by the output capsules, so that a call has one binary and one result."""
    outputs, elements = triton.next_power_of_2(J), triton.next_power_of_2(D)
    warps = min(MOST_WARPS, max(8, outputs * elements // (32 * LANE)))
    inputs = max(1, 32 * warps * LANE // (outputs * elements))
    sizes = {"J": J, "D": D, "BLOCK_I": inputs, "BLOCK_J": outputs, "BLOCK_D": elements}
    return {**sizes, "num_warps": warps, "num_stages": 2}


def _sizes(predictions: Tensor, by_input: bool) -> tuple[int, int, int, int]:
    first, second, J, D = predictions.shape
    return (second, first, J, D) if by_input else (first, second, J, D)
