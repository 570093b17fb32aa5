"""Pooling after batch norm and activation, and its gradients, in the terms of pyops/ops/_pool_ops.py.

    a = activation((input - mean[c]) * scale[c] + bias[c])    output[n,o,c] = maximum or average of a over the window of position o

Images are [N, H, W, C] in memory (channels_last), so is index, uint8; affine [3, C] and terms [2, C] are fp32, as is all arithmetic.

Tiling: a program owns BLOCK_P positions, of all images in a row, x BLOCK_C channels, and walks the taps of their windows, one tile of
the input each; the windows' overlap is left to L1. A gradient's positions are the input's: each gathers from the few windows that it
is in, so nothing is added to memory, and what is summed is in registers. Sums over programs are fp32 partials that PyTorch adds up:
no atomics, and sizes alone fix the order.

Floors: input read once, output (and index) written once; gradients: input, gradient and index read once, result written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import channel
from .activations import activate, differentiate
from .channel import before_activation, load_image, load_vector
from .dense_conv import locate
from .images import empty_image, image, on, store_image, sum_positions
from .moments import store_moments

SIZES = (
    "N", "H", "W", "OH", "OW", "units", "passes", "KH", "KW", "stride_h", "stride_w", "padding_h", "padding_w",
)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def run_kernel(
    input_ptr, affine_ptr, output_ptr, index_ptr, N, H, W, OH, OW, units, KH, KW, stride_h, stride_w, padding_h, padding_w, slope,
    MAXIMUM: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first of equal values is the maximum, and NaN is above all."""
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n, position = locate(tl.program_id(0) // blocks, OH * OW, BLOCK_P)
    n = n.to(tl.int64)
    first_y, first_x = position // OW * stride_h - padding_h, position % OW * stride_w - padding_w
    inside = (n < N)[:, None] & (c < C)[None, :]
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    result = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    index = tl.full([BLOCK_P, BLOCK_C], -1, tl.int32)
    for tap in range(KH * KW):
        y, x = first_y + tap // KW, first_x + tap % KW
        there = inside & ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
        at = ((n * H + y) * W + x)[:, None] * C + c[None, :]
        u = before_activation(load_image(input_ptr, at, there), mean, scale, bias, 1.0, affine_ptr, None, None, at, there)
        a = activate(u, ACTIVATION, slope)
        if MAXIMUM:
            taken = there & ((index < 0) | (a > result) | ((a != a) & (result == result)))
            result, index = tl.where(taken, a, result), tl.where(taken, tap, index)
        else:
            result += tl.where(there, a, 0.0)
    if not MAXIMUM:
        result = tl.div_rn(result, tl.zeros_like(result) + KH * KW)
    at = (n * OH * OW + position)[:, None] * C + c[None, :]
    store_image(output_ptr + at, result, inside)
    if index_ptr is not None:
        tl.store(index_ptr + at, index.to(tl.uint8), mask=inside)


@triton.jit
def load_dz(
    grad_ptr, index_ptr, x, mean, scale, bias, affine_ptr, n, position, c, inside, W, OH, OW, C,
    KH, KW, stride_h, stride_w, padding_h, padding_w, slope,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of what the activation takes, gathered in the order of the taps.  # [BLOCK_P, BLOCK_C]"""
    down, right = position // W + padding_h, position % W + padding_w
    rows, columns = tl.cdiv(KH, stride_h), tl.cdiv(KW, stride_w)  # the most windows that a position is in
    dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for window in range(rows * columns):
        oy, ox = down // stride_h - window // columns, right // stride_w - window % columns
        ky, kx = down - oy * stride_h, right - ox * stride_w
        there = (oy >= 0) & (oy < OH) & (ky < KH) & (ox >= 0) & (ox < OW) & (kx < KW)
        at = ((n * OH + oy) * OW + ox)[:, None] * C + c[None, :]
        there = inside & there[:, None]
        share = load_image(grad_ptr, at, there)
        if index_ptr is not None:
            chosen = tl.load(index_ptr + at, mask=there, other=0).to(tl.int32) == (ky * KW + kx)[:, None]
            share = tl.where(chosen, share, 0.0)
        dz += share
    if index_ptr is None:
        dz = tl.div_rn(dz, tl.zeros_like(dz) + KH * KW)
    if ACTIVATION != 0:
        u = before_activation(x, mean, scale, bias, 1.0, affine_ptr, None, None, None, None)
        dz *= differentiate(u, ACTIVATION, slope)
    return dz


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    grad_ptr, input_ptr, affine_ptr, index_ptr, sums_ptr, N, H, W, OH, OW, units, passes,
    KH, KW, stride_h, stride_w, padding_h, padding_w, slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [slots, 2, C] of dz and of dz * (input - mean)"""
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(passes):
        n, position = locate(slot * passes + step, H * W, BLOCK_P)
        n = n.to(tl.int64)
        inside = (n < N)[:, None] & (c < C)[None, :]
        x = load_image(input_ptr, (n * H * W + position)[:, None] * C + c[None, :], inside)
        dz = load_dz(
            grad_ptr, index_ptr, x, mean, scale, bias, affine_ptr, n, position, c, inside, W, OH, OW, C,
            KH, KW, stride_h, stride_w, padding_h, padding_w, slope, ACTIVATION, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        dz = tl.where(inside, dz, 0.0)
        sums += dz
        products += dz * (x - mean)
    totals = sum_positions(sums, BLOCK_P, BLOCK_C), sum_positions(products, BLOCK_P, BLOCK_C)
    store_moments(sums_ptr, slot.to(tl.int64), totals[0], totals[1], c, C)


@triton.jit(do_not_specialize=SIZES)
def grad_kernel(
    grad_ptr, input_ptr, affine_ptr, terms_ptr, index_ptr, output_ptr, N, H, W, OH, OW, units,
    KH, KW, stride_h, stride_w, padding_h, padding_w, slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    n, position = locate(tl.program_id(0) // blocks, H * W, BLOCK_P)
    n = n.to(tl.int64)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = (n * H * W + position)[:, None] * C + c[None, :]
    x = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if ACTIVATION != 0 or terms_ptr is not None:  # else nothing needs it
        x = load_image(input_ptr, at, inside)
    dx = load_dz(
        grad_ptr, index_ptr, x, mean, scale, bias, affine_ptr, n, position, c, inside, W, OH, OW, C,
        KH, KW, stride_h, stride_w, padding_h, padding_w, slope, ACTIVATION, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    if affine_ptr is not None:
        dx *= scale
    if terms_ptr is not None:
        dx -= load_vector(terms_ptr, 0, c, C) + (x - mean) * load_vector(terms_ptr, 1, c, C)
    store_image(output_ptr + at, dx, inside)


def run(input, affine, maximum, kernel_size, stride, padding, activation, slope, indices) -> tuple[Tensor, Tensor]:
    """(output, index or empty), as pyops::pool_run."""
    input, (affine,) = image(input), channel._vectors(affine)
    N, C, H, W = input.shape
    OH, OW = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip((H, W), kernel_size, stride, padding, strict=True))
    output = empty_image(input, N, C, OH, OW)
    index = torch.empty_like(output, dtype=torch.uint8) if maximum and indices else None
    block = channel.launch_config(C, input.dtype)
    if output.numel():
        sizes = (N, H, W, OH, OW, C // block["UNIT"], *kernel_size, *stride, *padding)
        grid = channel._grid(triton.cdiv(N * OH * OW, block["BLOCK_P"]), C, block)
        with on(input):
            run_kernel[grid](input, affine, output, index, *sizes, slope, MAXIMUM=maximum, ACTIVATION=activation, **block)
    return output, input.new_empty(0, dtype=torch.uint8) if index is None else index


def reduce(grad, input, affine, index, kernel_size, stride, padding, activation, slope) -> Tensor:
    """[2, C], as pyops::pool_reduce."""
    grad, input, index, (affine,) = image(grad), image(input), image(index), channel._vectors(affine)
    N, C, H, W = input.shape
    block = channel.launch_config(C, input.dtype)
    slots, passes = channel._walk(1, N * H * W, C, block)
    partials = torch.empty(slots if input.numel() else 0, 2, C, dtype=torch.float32, device=input.device)
    if partials.numel():
        sizes = (N, H, W, *grad.shape[2:], C // block["UNIT"], passes, *kernel_size, *stride, *padding)
        with on(input):
            reduce_kernel[channel._grid(slots, C, block)](
                grad, input, affine, index, partials, *sizes, slope, ACTIVATION=activation, **block
            )  # fmt: skip
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def grad(grad, input, affine, terms, index, kernel_size, stride, padding, activation, slope) -> Tensor:
    """The input's gradient, as pyops::pool_grad."""
    grad, input, index, (affine, terms) = image(grad), image(input), image(index), channel._vectors(affine, terms)
    N, C, H, W = input.shape
    output, block = empty_image(input, N, C, H, W), channel.launch_config(C, input.dtype)
    if output.numel():
        sizes = (N, H, W, *grad.shape[2:], C // block["UNIT"], *kernel_size, *stride, *padding)
        with on(input):
            grad_kernel[channel._grid(triton.cdiv(N * H * W, block["BLOCK_P"]), C, block)](
                grad, input, affine, terms, index, output, *sizes, slope, ACTIVATION=activation, **block
            )
    return output
