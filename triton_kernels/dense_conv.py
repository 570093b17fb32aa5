"""Convolution with full or grouped filters and its transpose as implicit matrix products, in the terms of pyops/ops/_dense_ops.py.

    output[n,q,o] = activation(sum over taps and c of weight[o,c,tap] * input[n, origin + q*scale + j*move, c] + bias[o] + residual)

input [N, H, W, groups*C], residual and output [N, OH, OW, groups*O] in memory, weight [groups*O, KH, KW, C], the transpose's
[groups*C, KH, KW, O]: what channels_last weights are. C and O count one group's channels.

The transpose gathers: outputs y of one phase y % stride meet the same taps, those with (y + padding - tap*dilation) % stride == 0, which
are `step` apart; so a phase is a convolution of stride 1 with few taps, and no product is with a zero that the stride put in.

Tiling: a program owns BLOCK_M positions of one phase x BLOCK_O outputs of one group and walks the taps; within a tap, whose mask and
rows are found once, C in blocks of BLOCK_K. Masked addresses are clamped into the image. FOLD, where C is short or not a multiple of 8: a
walk takes a whole row of taps, whose kx and c run as one dimension, so that a stem of 3 channels does not multiply padding. Precision and
the order of programs are pointwise_conv's; moments are those of each tile's stored output, merged by moments.py, and those of a transpose
with a stride, whose tiles are not of one size, are read back from the output. The same bits every call. POOL, 1 the maximum or 2 the
average of whole 2x2 windows: four rows of a tile in a row are a window, so that pooling is within the tile and [N, OH//2, OW//2,
groups*O] is what is written.

Four warps always: with eight, compilers have given wrong results for convolutions of this form.

Floors: input and residual read once, output written once (input is read KH*KW*O / BLOCK_O times, but for one from L2 or L1);
2*M*KH*KW*C*O*groups flops.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import channel
from .activations import activate
from .channel import load_vector
from .common import rounded
from .depthwise_conv import output_size
from .images import empty_image, image, on, store_image
from .moments import merge, merge_moments, store_moments
from .pointwise_conv import GROUP, SEGMENT, add_product

SIZES = (
    "N", "H", "W", "OH", "OW", "groups", "C_units", "O_units", "KH", "KW", "stride_h", "stride_w", "padding_h", "padding_w",
    "dilation_h", "dilation_w", "step_h", "step_w",
)  # fmt: skip


@triton.jit
def locate(block, P, BLOCK: tl.constexpr):
    """(image, position in it) of rows block*BLOCK and on: a long division in binary, since the hardware divides no 64 bits.  # [BLOCK]"""
    n, rest = block // P, block % P
    rows = 1
    while rows < BLOCK:
        over = (rest >= P - rest).to(tl.int32)
        n, rest = n * 2 + over, rest * 2 - over * P
        rows *= 2
    row = rest + tl.arange(0, BLOCK)
    return n + row // P, row % P


@triton.jit
def taps_of(phase, kernel, stride, padding, dilation, step, TRANSPOSED: tl.constexpr):
    """(first, count, origin, move) along one axis: position q of the phase meets tap first + j*step at origin + q*scale + j*move."""
    if TRANSPOSED:
        first = kernel  # none
        for tap in range(step):
            first = tl.where((phase + padding - tap * dilation) % stride == 0, tap, first)
        count = tl.maximum(kernel - first + step - 1, 0) // step
        return first, count, (phase + padding - first * dilation) // stride, -(step * dilation // stride)
    else:
        return 0, kernel, -padding, dilation


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(at, size):
    return tl.minimum(tl.maximum(at, 0), size - 1)


@triton.jit
def add_tap(
    sums, begin, end, extent, input_ptr, weight_ptr, line, x, there, tap, g, o, C, O, W, taps, pixel, move, step,
    TRANSPOSED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + the products of k = begin .. end of one tap, or of one row of taps; line: positions before the input's line, [BLOCK_M]."""
    if not FOLD:
        rows = (line + clamp(x, W)) * pixel + g * C
        there = there & (x >= 0) & (x < W)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if FOLD:
            j = k // C
            c = k % C
            xs = x[:, None] + (j * move)[None, :]
            inside = there[:, None] & (xs >= 0) & (xs < W) & (k < extent)[None, :]
            a = tl.load(input_ptr + (line[:, None] + clamp(xs, W)) * pixel + (g * C + c)[None, :], mask=inside, other=0.0)
            t = tap + j * step
        else:
            c = k
            a = tl.load(input_ptr + rows[:, None] + k[None, :], mask=there[:, None] & (k < C)[None, :], other=0.0)
            t = tap
        if TRANSPOSED:
            at = (((g * C + c).to(tl.int64) * taps + t) * O)[:, None] + o[None, :]
        else:
            at = ((g * O + o).to(tl.int64) * taps * C)[None, :] + (t * C + c)[:, None]
        weight = tl.load(weight_ptr + at, mask=(k < extent)[:, None] & (o < O)[None, :], other=0.0)
        sums = add_product(a, weight, sums, PRECISION)
    return sums


@triton.jit(do_not_specialize=SIZES)
def dense_kernel(
    input_ptr, weight_ptr, bias_ptr, residual_ptr, output_ptr, moments_ptr,
    N, H, W, OH, OW, groups, C_units, O_units, KH, KW,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, step_h, step_w, slope,
    TRANSPOSED: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr, POOL: tl.constexpr,
    PRECISION: tl.constexpr, C_UNIT: tl.constexpr, O_UNIT: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """moments [cdiv(N*OH*OW, BLOCK_M), 2, groups*O], where there is one phase. Sizes come in UNITs, so that their alignment is known."""
    C, O = C_units * C_UNIT, O_units * O_UNIT
    if TRANSPOSED:  # positions of a phase are `stride` apart in the output, and neighbours in the input
        apart_h, apart_w, scale_h, scale_w = stride_h, stride_w, 1, 1
    else:
        apart_h, apart_w, scale_h, scale_w = 1, 1, stride_h, stride_w
    PH, PW = (OH + apart_h - 1) // apart_h, (OW + apart_w - 1) // apart_w
    P = (OH // 2) * (OW // 2) * 4 if POOL != 0 else PH * PW
    M = N.to(tl.int64) * P
    blocks, columns = tl.cdiv(M, BLOCK_M).to(tl.int32), tl.cdiv(O, BLOCK_O)
    phase = tl.program_id(0) // (blocks * columns * groups)
    program = tl.program_id(0) % (blocks * columns * groups)
    band = program // (GROUP * columns * groups)
    members = tl.minimum(blocks - band * GROUP, GROUP)
    within = program % (GROUP * columns * groups)
    block = band * GROUP + within % members
    g = within // members // columns
    o = within // members % columns * BLOCK_O + tl.arange(0, BLOCK_O)
    phase_y, phase_x = phase // apart_w, phase % apart_w
    first_y, count_y, origin_y, move_y = taps_of(phase_y, KH, stride_h, padding_h, dilation_h, step_h, TRANSPOSED)
    first_x, count_x, origin_x, move_x = taps_of(phase_x, KW, stride_w, padding_w, dilation_w, step_w, TRANSPOSED)

    n, position = locate(block, P, BLOCK_M)
    if POOL != 0:
        qy, qx = position // 4 // (OW // 2) * 2 + position % 4 // 2, position // 4 % (OW // 2) * 2 + position % 2
    else:
        qy, qx = position // PW, position % PW
    in_range = n < N
    image = tl.minimum(n, N - 1).to(tl.int64) * H
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    pixel = groups * C
    extent = count_x * C if FOLD else C
    for tap in range(count_y if FOLD else count_y * count_x):
        if FOLD:
            jy, jx = tap, 0
        else:
            jy, jx = tap // count_x, tap % count_x
        y = qy * scale_h + origin_y + jy * move_y
        x = qx * scale_w + origin_x + jx * move_x
        there = in_range & (y >= 0) & (y < H)
        line = (image + clamp(y, H)) * W
        t = (first_y + jy * step_h) * KW + first_x + jx * step_w
        if PRECISION == "ieee":
            for segment in range(0, extent, SEGMENT):
                part = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
                end = tl.minimum(segment + SEGMENT, extent)
                sums += add_tap(
                    part, segment, end, extent, input_ptr, weight_ptr, line, x, there, t, g, o, C, O, W, KH * KW, pixel, move_x, step_w,
                    TRANSPOSED, FOLD, PRECISION, BLOCK_K,
                )  # fmt: skip
        else:
            sums = add_tap(
                sums, 0, extent, extent, input_ptr, weight_ptr, line, x, there, t, g, o, C, O, W, KH * KW, pixel, move_x, step_w,
                TRANSPOSED, FOLD, PRECISION, BLOCK_K,
            )  # fmt: skip

    channels = groups * O
    channel = tl.where(o < O, g * O + o, channels)
    if bias_ptr is not None:
        sums += load_vector(bias_ptr, 0, channel, channels)
    if TRANSPOSED:
        oy, ox = qy * apart_h + phase_y, qx * apart_w + phase_x
        in_range = in_range & (oy < OH) & (ox < OW)
        pixels = (n.to(tl.int64) * OH + oy) * OW + ox
    elif POOL != 0:
        pixels = (n.to(tl.int64) * OH + qy) * OW + qx
    else:
        pixels = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = in_range[:, None] & (o < O)[None, :]
    at = (pixels * channels + g * O)[:, None] + o[None, :]
    if residual_ptr is not None and not RESIDUAL_LAST:
        sums += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = activate(sums, ACTIVATION, slope)
    if residual_ptr is not None and RESIDUAL_LAST:
        result += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if POOL != 0:
        windows = tl.reshape(result, [BLOCK_M // 4, 4, BLOCK_O])
        result = tl.reduce(windows, 1, larger) if POOL == 1 else tl.sum(windows, axis=1) * 0.25
        window = block.to(tl.int64) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        inside = (window < M // 4)[:, None] & (o < O)[None, :]
        at = (window * channels + g * O)[:, None] + o[None, :]
    store_image(output_ptr + at, result, inside)
    if moments_ptr is not None:
        stored = rounded(result, output_ptr.dtype.element_ty).to(tl.float32)
        mean, squares = merge(stored, tl.zeros_like(stored), in_range.to(tl.float32), BLOCK_M, BLOCK_O)
        store_moments(moments_ptr, block.to(tl.int64), mean, squares, channel, channels)


def run(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, residual_last, moments, tf32=False, pool=0
) -> tuple[Tensor, Tensor]:
    """(output, moments [2, O] or empty), as pyops::conv_run."""
    size = output_size(input, weight, stride, padding, dilation)
    output = empty_image(input, input.shape[0], weight.shape[0], *((n // 2 for n in size) if pool else size))
    epilogue = (activation, slope, residual_last, moments, tf32, pool)
    return output, _launch(output, size, input, weight, bias, residual, stride, padding, dilation, groups, *epilogue)


def transpose_run(
    input, weight, bias, residual, stride, padding, output_size, dilation, groups, activation, slope, residual_last, moments, tf32=False
) -> tuple[Tensor, Tensor]:
    """(output, moments [2, O] or empty), as pyops::conv_transpose_run."""
    output = empty_image(input, input.shape[0], weight.shape[1] * groups, *output_size)
    epilogue = (activation, slope, residual_last, moments, tf32)
    call = (output, output_size, input, weight, bias, residual, stride, padding, dilation, groups, *epilogue)
    return output, _launch(*call, transposed=True)


def _launch(
    output, size, input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, residual_last, moments, tf32,
    pool=0, transposed=False,
) -> Tensor:  # fmt: skip
    """Writes output, `size` before pooling; its moments where they are wanted."""
    N, C, H, W = input.shape
    channels, (OH, OW) = output.shape[1], size
    nothing = torch.zeros((2, channels) if moments else 0, dtype=torch.float32, device=input.device)
    if not output.numel():
        return nothing
    input, residual, weight = image(input), image(residual), weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    apart_h, apart_w = stride if transposed else (1, 1)
    C, O, M = C // groups, channels // groups, N * triton.cdiv(OH, apart_h) * triton.cdiv(OW, apart_w)
    if pool:
        M = 4 * N * (OH // 2) * (OW // 2)
    phases = apart_h * apart_w
    config = launch_config(M * phases, C, O, groups, input.dtype, tf32)
    blocks = triton.cdiv(M, config["BLOCK_M"])
    merged = moments and phases == 1 and not pool
    partials = torch.empty(blocks, 2, channels, dtype=torch.float32, device=input.device) if merged else None
    steps = [s // gcd(s, d) if transposed else 1 for s, d in zip(stride, dilation, strict=True)]
    sizes = (N, H, W, OH, OW, groups, C // config["C_UNIT"], O // config["O_UNIT"], *weight.shape[2:], *stride, *padding, *dilation, *steps)
    constants = config | {"TRANSPOSED": transposed, "ACTIVATION": activation, "RESIDUAL_LAST": residual_last, "POOL": pool}
    with on(input):
        dense_kernel[(phases * blocks * groups * triton.cdiv(O, config["BLOCK_O"]),)](
            input, weight, bias, residual, output, partials, *sizes, slope, **constants
        )
    if partials is not None:
        return merge_moments(partials, int(config["BLOCK_M"]), M)
    return channel.moments(output) if moments else nothing


def launch_config(M: int, C: int, O: int, groups: int, dtype: torch.dtype, tf32: bool) -> dict[str, int | str]:
    """Compile-time tile: fixed by sizes and dtype, so that a call has one binary and one result. C and O are those of one group.

    Elements that are read one by one each have an address, and fp32 without tensor cores has operands in registers and two sums: smaller
    tiles, lest they spill.
    """
    units = operand_units(C, O)
    wide, fold = dtype == torch.float32, units["C_UNIT"] == 1 or C < 32
    ieee, unaligned = wide and not tf32, 1 in units.values()
    columns = 16 if O <= 16 else 32 if O <= 32 or units["O_UNIT"] == 1 else 64
    small = M * groups * triton.cdiv(O, columns) <= 128 * 132  # too few programs for a large GPU: twice as many, of half the positions
    return {
        **units, "FOLD": fold, "PRECISION": "ieee" if ieee else "tf32", "GROUP": GROUP, "SEGMENT": SEGMENT,
        "BLOCK_M": 32 if ieee else 64 if wide or fold or unaligned or small else 128, "BLOCK_O": columns,
        "BLOCK_K": 16 if ieee or units["C_UNIT"] == 1 else 32 if wide or unaligned or C % 64 else 64,
        "num_warps": 4, "num_stages": 2 if ieee and (unaligned or columns < 64) else 3,
    }  # fmt: skip


def operand_units(C: int, O: int) -> dict[str, int]:
    """What divides one group's channels: 8, which makes 16 bytes of the smallest elements, or nothing that helps."""
    return {"C_UNIT": 8 if C % 8 == 0 else 1, "O_UNIT": 8 if O % 8 == 0 else 1}
