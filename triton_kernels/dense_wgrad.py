"""The gradient of a convolution's filter as an implicit matrix product, in the terms of dense_conv.py.

    wgrad[o,tap,c] = sum over n,q of grad[n,q,o] * input[n, q*stride - padding + tap*dilation, c]

Tiling: a program owns BLOCK_O outputs x BLOCK_C channels of one tap and walks `passes` blocks of BLOCK_P positions, whose coordinates
are carried along, not divided out. FOLD, where C is short or not a multiple of 8: its columns are taps and channels as one dimension.
Programs of other positions leave fp32 partial sums [slots, groups*O, KH*KW*C], which PyTorch adds up: no atomics, and sizes alone fix the
order, so the same call gives the same bits. Precision is pointwise_conv's.

Floors: grad and input read once (grad is read KH*KW*C / BLOCK_C times, input KH*KW*O / BLOCK_O times, but for one from L2), partial sums
written and read once; 2*M*KH*KW*C*O*groups flops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_conv import clamp, locate, operand_units
from .images import image, on
from .pointwise_conv import SEGMENT, add_product

PROGRAMS = 1024  # as a goal: they fill the largest GPUs a few times
LEAST_PASSES = 8  # of a program; fewer would write as much as they read
SIZES = (
    "N", "H", "W", "OH", "OW", "groups", "C_units", "O_units", "KH", "KW", "stride_h", "stride_w", "padding_h", "padding_w",
    "dilation_h", "dilation_w", "passes",
)  # fmt: skip


@triton.jit
def add_block(sums, grad_ptr, input_ptr, m, left, n, y, x, o, c, there, C, O, H, W, groups, PRECISION: tl.constexpr):
    """sums + grad^T @ input of positions m: grad's rows from this program's first on, input's the windows at images n, (y, x).

    y and x are [BLOCK_P, 1], or [BLOCK_P, BLOCK_C] where columns are of several taps.  # [BLOCK_O, BLOCK_C]
    """
    at = tl.minimum(m, left - 1).to(tl.int64)[:, None] * (groups * O) + o[None, :]
    grad = tl.load(grad_ptr + at, mask=(m < left)[:, None] & (o < O)[None, :], other=0.0)
    inside = (m < left)[:, None] & there[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = ((n.to(tl.int64)[:, None] * H + clamp(y, H)) * W + clamp(x, W)) * (groups * C) + c[None, :]
    value = tl.load(input_ptr + at, mask=inside, other=0.0)
    return add_product(tl.trans(grad), value, sums, PRECISION)


@triton.jit
def advance(n, oy, ox, step_n, step_y, step_x, OH, OW):
    """The position that step_n images, step_y rows and step_x columns lead to, all steps within one image's size."""
    ox += step_x
    oy += step_y + (ox >= OW).to(tl.int32)
    n += step_n + (oy >= OH).to(tl.int32)
    return n, tl.where(oy >= OH, oy - OH, oy), tl.where(ox >= OW, ox - OW, ox)


@triton.jit(do_not_specialize=SIZES)
def wgrad_kernel(
    grad_ptr, input_ptr, partials_ptr,
    N, H, W, OH, OW, groups, C_units, O_units, KH, KW, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, passes,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, C_UNIT: tl.constexpr, O_UNIT: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [slots, groups*O, KH*KW*C]. Sizes come in UNITs, so that their alignment is known."""
    C, O = C_units * C_UNIT, O_units * O_UNIT
    extent = KH * KW * C
    of_tap = tl.cdiv(C, BLOCK_C)
    columns = tl.cdiv(extent, BLOCK_C) if FOLD else KH * KW * of_tap
    rows = tl.cdiv(O, BLOCK_O)
    program = tl.program_id(0)
    column = program % columns
    o = program // columns % rows * BLOCK_O + tl.arange(0, BLOCK_O)
    g = program // columns // rows % groups
    slot = program // columns // rows // groups
    if FOLD:
        j = column * BLOCK_C + tl.arange(0, BLOCK_C)
        tap, c, there = (j // C)[None, :], j % C, j < extent
    else:
        tap = column // of_tap
        c = column % of_tap * BLOCK_C + tl.arange(0, BLOCK_C)
        j, there = tap * C + c, c < C
    shift_y, shift_x = tap // KW * dilation_h - padding_h, tap % KW * dilation_w - padding_w

    P = OH * OW
    row = tl.arange(0, BLOCK_P)
    start = slot.to(tl.int64) * passes * BLOCK_P
    left = tl.minimum(N.to(tl.int64) * P - start, passes * BLOCK_P).to(tl.int32)
    n, position = locate(slot * passes, P, BLOCK_P)
    oy, ox = position // OW, position % OW
    step_n, step_y, step_x = BLOCK_P // P, BLOCK_P % P // OW, BLOCK_P % P % OW
    grad_ptr += start * (groups * O) + g * O
    input_ptr += g * C
    sums = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    if PRECISION == "ieee":
        for segment in range(0, passes * BLOCK_P, SEGMENT):
            part = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
            for first in range(segment, tl.minimum(segment + SEGMENT, passes * BLOCK_P), BLOCK_P):
                image = tl.minimum(n, N - 1)
                y, x = oy[:, None] * stride_h + shift_y, ox[:, None] * stride_w + shift_x
                part = add_block(part, grad_ptr, input_ptr, first + row, left, image, y, x, o, c, there, C, O, H, W, groups, PRECISION)
                n, oy, ox = advance(n, oy, ox, step_n, step_y, step_x, OH, OW)
            sums += part
    else:
        for first in range(0, passes * BLOCK_P, BLOCK_P):
            image = tl.minimum(n, N - 1)
            y, x = oy[:, None] * stride_h + shift_y, ox[:, None] * stride_w + shift_x
            sums = add_block(sums, grad_ptr, input_ptr, first + row, left, image, y, x, o, c, there, C, O, H, W, groups, PRECISION)
            n, oy, ox = advance(n, oy, ox, step_n, step_y, step_x, OH, OW)
    at = ((slot.to(tl.int64) * groups + g) * O + o)[:, None] * extent + j[None, :]
    tl.store(partials_ptr + at, sums, mask=(o < O)[:, None] & there[None, :])


def wgrad(grad, input, kernel_size, stride, padding, dilation, groups, tf32=False) -> Tensor:
    """[O, C / groups, KH, KW], as pyops::conv_wgrad."""
    grad, input = image(grad), image(input)
    N, C, H, W = input.shape
    _, O, OH, OW = grad.shape
    KH, KW = kernel_size
    C, O = C // groups, O // groups
    found = input.new_empty(groups * O, C, KH, KW)
    if not grad.numel() or not found.numel():
        return found.zero_()
    config = launch_config(C, O, input.dtype, tf32)
    taps = triton.cdiv(KH * KW * C, config["BLOCK_C"]) if config["FOLD"] else KH * KW * triton.cdiv(C, config["BLOCK_C"])
    tiles = groups * triton.cdiv(O, config["BLOCK_O"]) * taps
    steps = triton.cdiv(N * OH * OW, config["BLOCK_P"])
    passes = triton.cdiv(steps, max(1, min(PROGRAMS // tiles, steps // LEAST_PASSES)))
    slots = triton.cdiv(steps, passes)
    partials = torch.empty(slots, groups * O, KH * KW * C, dtype=torch.float32, device=input.device)
    sizes = (N, H, W, OH, OW, groups, C // config["C_UNIT"], O // config["O_UNIT"], KH, KW, *stride, *padding, *dilation, passes)
    with on(input):
        wgrad_kernel[(slots * tiles,)](grad, input, partials, *sizes, **config)
    sums = partials[0] if slots == 1 else partials.sum(0)
    return found.copy_(sums.view(groups * O, KH, KW, C).permute(0, 3, 1, 2))


def launch_config(C: int, O: int, dtype: torch.dtype, tf32: bool) -> dict[str, int | str]:
    """Compile-time tile: fixed by one group's channels and dtype, so that a call has one binary and one result. Smaller, lest they spill,
    where elements are read one by one, each with an address, and without tensor cores, where operands are in registers."""
    units = operand_units(C, O)
    wide, fold = dtype == torch.float32, units["C_UNIT"] == 1 or C < 32
    ieee, addresses = wide and not tf32, fold or units["O_UNIT"] == 1
    return {
        **units, "FOLD": fold, "PRECISION": "ieee" if ieee else "tf32", "SEGMENT": SEGMENT,
        "BLOCK_P": 16 if ieee or units["C_UNIT"] == 1 else 32,
        "BLOCK_O": 16 if O <= 16 else 32 if O <= 32 else 64 if O <= 64 or wide or addresses else 128,
        "BLOCK_C": 32 if ieee or (C <= 32 and not fold) else 64, "num_warps": 4, "num_stages": 2 if ieee else 3,
    }  # fmt: skip
