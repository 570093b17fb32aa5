"""Local response normalisation and LayerNorm over an image's channels, in the terms of pyops/ops/_norm_ops.py.

    lrn         a / (k + alpha / size * s) ** beta, s the sum of a^2 over the neighbouring channels, a = input or relu(input)
    layer_norm  (input - mean) / sqrt(variance + eps) * weight[c] + bias[c] over each position's channels

Images are [N, P, C] in memory (`rows`, then all of them are one image of N*P positions) or planes [N, C, P]; weight, bias and sums are
fp32, as is all arithmetic.

Tiling: a program owns BLOCK_P positions x all C channels, padded to BLOCK_C, so an image is read once whatever is summed over channels;
the layouts differ in addresses alone. A window's overlap is left to L1. The gradients of weight and bias are summed over `passes` tiles
in registers and go through fp32 partials that PyTorch adds up: no atomics, and sizes alone fix the order.

Floors: each image read once, the result written once; of local response normalisation a logarithm and an exponential an element, and
`size` additions (gradient: twice).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import channel
from .channel import load_image, load_vector
from .images import on, store_image, sum_positions
from .moments import store_moments

LANE = 16  # elements of a tile that a thread owns, half of them where each has an address
FEWEST = 16  # positions of a tile of planes, where they are neighbours in memory: 32 bytes of the smallest elements
MOST_WARPS = 16
SIZES = ("P", "C", "units", "slots", "passes", "size")  # one binary whatever they are


@triton.jit
def place(P, C, units, slots, passes, ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr):
    """(P, C, image, first position); the inner size as a product, so that its alignment is known."""
    n, first = (tl.program_id(0) // slots).to(tl.int64), (tl.program_id(0) % slots).to(tl.int64) * passes * BLOCK_P
    if ROWS:
        return P, units * UNIT, n, first
    else:
        return units * UNIT, C, n, first


@triton.jit
def locate(n, position, c, P, C, ROWS: tl.constexpr):
    """(offsets, mask)  # [BLOCK_P, BLOCK_C]"""
    inside = (position < P)[:, None] & (c < C)[None, :]
    if ROWS:
        return (n * P + position)[:, None] * C + c[None, :], inside
    else:
        return position[:, None] + ((n * C + c) * P)[None, :], inside


@triton.jit
def window_sums(
    values_ptr, at, apart, inside, c, C, before, size,
    RELU: tl.constexpr, SQUARED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of channels c - before and the size - 1 after it; neighbours are `apart` from each other.  # [BLOCK_P, BLOCK_C]"""
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(size):
        from_ = c + step - before
        value = load_image(values_ptr, at + (step - before) * apart, inside & ((from_ >= 0) & (from_ < C))[None, :])
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)
        if SQUARED:
            value *= value
        sums += value
    return sums


@triton.jit
def power(x, exponent):
    return tl.exp2(tl.log2(x) * exponent)


@triton.jit(do_not_specialize=SIZES)
def lrn_run_kernel(
    input_ptr, output_ptr, P, C, units, slots, size, alpha, beta, k,
    RELU: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    P, C, n, first = place(P, C, units, slots, 1, ROWS, UNIT, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    at, inside = locate(n, first + tl.arange(0, BLOCK_P), c, P, C, ROWS)
    apart = 1 if ROWS else P
    d = k + alpha / size * window_sums(input_ptr, at, apart, inside, c, C, size // 2, size, RELU, True, BLOCK_P, BLOCK_C)
    a = load_image(input_ptr, at, inside)
    if RELU:
        a = tl.where(a < 0.0, 0.0, a)
    store_image(output_ptr + at, a * power(d, -beta), inside)


@triton.jit(do_not_specialize=SIZES)
def lrn_grad_kernel(
    grad_ptr, input_ptr, output_ptr, scratch_ptr, P, C, units, slots, passes, size, alpha, beta, k,
    RELU: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With d = k + alpha / size * s: grad * d^-beta - 2 * alpha * beta / size * a * (the mirrored window's sum of grad * a * d^(-beta-1)).
    scratch [programs, tile]: what a window sums goes to the neighbours through L2."""
    P, C, n, first = place(P, C, units, slots, passes, ROWS, UNIT, BLOCK_P)
    row, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    if ROWS:
        apart, apart_kept, kept = 1, 1, row[:, None] * BLOCK_C + c[None, :]
    else:
        apart, apart_kept, kept = P, BLOCK_P, row[:, None] + c[None, :] * BLOCK_P
    scratch_ptr += tl.program_id(0).to(tl.int64) * BLOCK_P * BLOCK_C
    for step in range(passes):
        at, inside = locate(n, first + step * BLOCK_P + row, c, P, C, ROWS)
        d = k + alpha / size * window_sums(input_ptr, at, apart, inside, c, C, size // 2, size, RELU, True, BLOCK_P, BLOCK_C)
        x, g = load_image(input_ptr, at, inside), load_image(grad_ptr, at, inside)
        a = x
        if RELU:
            a = tl.where(x < 0.0, 0.0, x)
        g *= power(d, -beta)
        tl.store(scratch_ptr + kept, g * a / d, mask=inside)
        tl.debug_barrier()
        shares = window_sums(scratch_ptr, kept, apart_kept, inside, c, C, (size - 1) // 2, size, False, False, BLOCK_P, BLOCK_C)
        dx = g - 2.0 * alpha * beta / size * a * shares
        if RELU:
            dx = tl.where(x > 0.0, dx, 0.0)
        store_image(output_ptr + at, dx, inside)
        tl.debug_barrier()  # before the next pass writes over what others may still read


@triton.jit
def normalise(x, inside, C, eps):
    """(the rows less their means over their deviations, one over the deviations); zero outside.  # [BLOCK_P, BLOCK_C], [BLOCK_P, 1]"""
    x = tl.where(inside, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / C + eps)[:, None]
    return tl.where(inside, x * rstd, 0.0), rstd


@triton.jit(do_not_specialize=SIZES)
def layer_norm_run_kernel(
    input_ptr, weight_ptr, bias_ptr, output_ptr, P, C, units, slots, eps,
    ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    P, C, n, first = place(P, C, units, slots, 1, ROWS, UNIT, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    at, inside = locate(n, first + tl.arange(0, BLOCK_P), c, P, C, ROWS)
    y, _ = normalise(load_image(input_ptr, at, inside), inside, C, eps)
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, 0, c, C)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, 0, c, C)
    store_image(output_ptr + at, y, inside)


@triton.jit(do_not_specialize=SIZES)
def layer_norm_grad_kernel(
    grad_ptr, input_ptr, weight_ptr, output_ptr, sums_ptr, P, C, units, slots, passes, eps,
    ROWS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [N * slots, 2, C] of grad * normalised and of grad"""
    P, C, n, first = place(P, C, units, slots, passes, ROWS, UNIT, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(passes):
        at, inside = locate(n, first + step * BLOCK_P + tl.arange(0, BLOCK_P), c, P, C, ROWS)
        g = load_image(grad_ptr, at, inside)
        y, rstd = normalise(load_image(input_ptr, at, inside), inside, C, eps)
        products += g * y
        sums += g
        if output_ptr is not None:
            if weight_ptr is not None:
                g *= load_vector(weight_ptr, 0, c, C)
            dx = rstd * (g - (tl.sum(g, axis=1) / C)[:, None] - y * (tl.sum(g * y, axis=1) / C)[:, None])
            store_image(output_ptr + at, dx, inside)
    if BLOCK_P > 8:
        totals = sum_positions(products, BLOCK_P, BLOCK_C), sum_positions(sums, BLOCK_P, BLOCK_C)
    else:
        totals = tl.sum(products, axis=0), tl.sum(sums, axis=0)
    store_moments(sums_ptr, tl.program_id(0).to(tl.int64), totals[0], totals[1], c, C)


def lrn_run(input, rows, size, alpha, beta, k, relu) -> Tensor:
    """As pyops::lrn_run."""
    input = input.contiguous()
    output = torch.empty_like(input)
    if output.numel():
        N, P, C, block = _sizes(input, rows)
        slots = triton.cdiv(P, block["BLOCK_P"])
        with on(input):
            lrn_run_kernel[(N * slots,)](input, output, P, C, _units(P, C, block), slots, size, alpha, beta, k, RELU=relu, **block)
    return output


def lrn_grad(grad, input, rows, size, alpha, beta, k, relu) -> Tensor:
    """The input's gradient, as pyops::lrn_grad."""
    grad, input = grad.contiguous(), input.contiguous()
    output = torch.empty_like(input)
    if output.numel():
        N, P, C, block = _sizes(input, rows)
        slots, passes = channel._walk(N, P, C, block)
        scratch = torch.empty(N * slots, block["BLOCK_P"] * block["BLOCK_C"], dtype=torch.float32, device=input.device)
        sizes = (P, C, _units(P, C, block), slots, passes, size)
        with on(input):
            lrn_grad_kernel[(N * slots,)](grad, input, output, scratch, *sizes, alpha, beta, k, RELU=relu, **block)
    return output


def layer_norm_run(input, rows, weight, bias, eps) -> Tensor:
    """As pyops::layer_norm_run."""
    input, (weight, bias) = input.contiguous(), channel._vectors(weight, bias)
    output = torch.empty_like(input)
    if output.numel():
        N, P, C, block = _sizes(input, rows)
        slots = triton.cdiv(P, block["BLOCK_P"])
        with on(input):
            layer_norm_run_kernel[(N * slots,)](input, weight, bias, output, P, C, _units(P, C, block), slots, eps, **block)
    return output


def layer_norm_grad(grad, input, rows, weight, eps, needs_input) -> tuple[Tensor, Tensor]:
    """(the input's gradient or empty, [2, C]), as pyops::layer_norm_grad."""
    grad, input, (weight,) = grad.contiguous(), input.contiguous(), channel._vectors(weight)
    output = torch.empty_like(input) if needs_input else None
    N, P, C, block = _sizes(input, rows)
    slots, passes = channel._walk(N, P, C, block)
    partials = torch.empty(N * slots if input.numel() else 0, 2, C, dtype=torch.float32, device=input.device)
    if partials.numel():
        sizes = (P, C, _units(P, C, block), slots, passes)
        with on(input):
            layer_norm_grad_kernel[(N * slots,)](grad, input, weight, output, partials, *sizes, eps, **block)
    return input.new_empty(0) if output is None else output, partials.sum(0)


def launch_config(P: int, C: int, rows: bool) -> dict[str, int]:
    """Compile-time tile: fixed by sizes, so that a shape has one binary and one result. UNIT divides the inner size.

    Many channels take more warps, lest a tile spill; beyond what warps can hold it keeps one position (planes: few neighbours).
    """
    channels, fewest = triton.next_power_of_2(C), 1 if rows else FEWEST
    unit = 8 if (C if rows else P) % 8 == 0 else 1
    lane = LANE if unit == 8 else LANE // 2
    warps = min(MOST_WARPS, max(4, channels * fewest // (32 * lane)))
    positions = max(1, min(32 * warps * lane // channels, 64))
    return {"ROWS": rows, "UNIT": unit, "BLOCK_P": positions, "BLOCK_C": channels, "num_warps": warps, "num_stages": 2}


def _sizes(input: Tensor, rows: bool) -> tuple[int, int, int, dict[str, int]]:
    """(N, P, C, tile); rows are those of one image."""
    N, P, C = input.shape if rows else (input.shape[0], input.shape[2], input.shape[1])
    N, P = (1, N * P) if rows else (N, P)
    return N, P, C, launch_config(P, C, rows)


def _units(P: int, C: int, block: dict[str, int]) -> int:
    return (C if block["ROWS"] else P) // block["UNIT"]
