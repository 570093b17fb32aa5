"""1x1 convolution: one matrix product with what comes before and after it done on the way, in the terms of csrc/conv/pointwise.h.

    x = (input - rows[0][m]) * rows[1][m]    a = activation_in((x - mean[c]) * scale[c] + shift[c]) * gate[n,c]
    output[m,o] = activation((sum over c of weight[o,c] * a[m,c] + bias[o]) * keep[n] + residual[m,o])

input [M, C], residual and output [M, O]: M = N*P positions, each `stride` elements from the next (a slice of wider rows may be); weight
[O, C], rows [2, M], affine [3, C], gate [N, C], keep [N]; position m is of image m / P. Vectors are fp32, as are sums.

Tiling: a program owns BLOCK_M positions x BLOCK_O output channels and walks C in blocks of BLOCK_K. Tensor cores multiply 16-bit tiles,
`a` and weight rounded to input's dtype, and fp32 ones with `tf32`. Otherwise fp32 sums SEGMENT products
in order and then adds the segments: one sequence as long as C would lose digits. Programs are numbered so that GROUP row blocks share
the weights and their input from L2. Moments are those of each tile's stored output, merged by moments.py: the same bits every call.

Floors: input and residual read once, output written once (input is read O / BLOCK_O times, but for one from L2); 2*M*C*O flops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .channel import load_vector
from .common import INTERPRETED, rounded
from .images import empty_image, on, store_image
from .moments import merge, merge_moments, store_moments

GROUP = 8  # row blocks whose programs run side by side
SEGMENT = 128  # products that an fp32 sum takes one after another
SIZES = ("M", "P", "C_units", "O_units", "input_units", "residual_units", "output_units")  # one binary whatever they are


@triton.jit
def load_operand(input_ptr, rows_ptr, affine_ptr, gate_ptr, m, n, k, M, C, stride, slope, ACTIVATION: tl.constexpr):
    """a, in input's dtype.  # [BLOCK_M, BLOCK_K]"""
    inside = (m < M)[:, None] & (k < C)[None, :]
    a = tl.load(input_ptr + m[:, None] * stride + k[None, :], mask=inside, other=0.0)
    if rows_ptr is not None:
        mean, scale = tl.load(rows_ptr + m, mask=m < M, other=0.0), tl.load(rows_ptr + M + m, mask=m < M, other=0.0)
        a = (a.to(tl.float32) - mean[:, None]) * scale[:, None]
    if affine_ptr is not None:
        mean, scale, shift = load_vector(affine_ptr, 0, k, C), load_vector(affine_ptr, 1, k, C), load_vector(affine_ptr, 2, k, C)
        a = (a.to(tl.float32) - mean) * scale + shift
    if ACTIVATION != 0:
        a = activate(a.to(tl.float32), ACTIVATION, slope)
    if gate_ptr is not None:
        a = a.to(tl.float32) * tl.load(gate_ptr + n[:, None] * C + k[None, :], mask=inside, other=0.0)
    if rows_ptr is not None:  # what pads C is no longer zero, and may be infinite when rounded
        a = tl.where(inside, a, 0.0)
    return rounded(a, input_ptr.dtype.element_ty)


@triton.jit
def load_weight(weight_ptr, k, o, C, O, dtype: tl.constexpr):
    """# [BLOCK_K, BLOCK_O]"""
    inside = (k < C)[:, None] & (o < O)[None, :]
    return rounded(tl.load(weight_ptr + o.to(tl.int64)[None, :] * C + k[:, None], mask=inside, other=0.0), dtype)


@triton.jit
def add_product(a, weight, sums, PRECISION: tl.constexpr):
    """sums + a @ weight.  # [BLOCK_M, BLOCK_K] x [BLOCK_K, BLOCK_O] -> [BLOCK_M, BLOCK_O]"""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), weight.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, weight, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def pointwise_kernel(
    input_ptr, weight_ptr, rows_ptr, affine_ptr, gate_ptr, bias_ptr, keep_ptr, residual_ptr, output_ptr, moments_ptr,
    M, P, C_units, O_units, input_units, residual_units, output_units, input_slope, slope,
    INPUT_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """moments [cdiv(M, BLOCK_M), 2, O] of each row block. Sizes come in UNITs, so that their alignment is known."""
    C, O = C_units * UNIT, O_units * UNIT
    blocks, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    group = tl.program_id(0) // (GROUP * columns)
    members = tl.minimum(blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    block = (group * GROUP + within % members).to(tl.int64)
    o = within // members * BLOCK_O + tl.arange(0, BLOCK_O)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // P
    row = tl.arange(0, BLOCK_K)
    input_stride = input_units * UNIT
    operand: tl.constexpr = input_ptr.dtype.element_ty
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    if PRECISION == "ieee":
        for segment in range(0, C, SEGMENT):
            part = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
            for first in range(segment, tl.minimum(segment + SEGMENT, C), BLOCK_K):
                k = first + row
                a = load_operand(input_ptr, rows_ptr, affine_ptr, gate_ptr, m, n, k, M, C, input_stride, input_slope, INPUT_ACTIVATION)
                part = add_product(a, load_weight(weight_ptr, k, o, C, O, operand), part, PRECISION)
            sums += part
    else:
        for first in range(0, C, BLOCK_K):
            k = first + row
            a = load_operand(input_ptr, rows_ptr, affine_ptr, gate_ptr, m, n, k, M, C, input_stride, input_slope, INPUT_ACTIVATION)
            sums = add_product(a, load_weight(weight_ptr, k, o, C, O, operand), sums, PRECISION)
    if bias_ptr is not None:
        sums += load_vector(bias_ptr, 0, o, O)
    if keep_ptr is not None:
        sums *= tl.load(keep_ptr + n, mask=m < M, other=0.0)[:, None]
    inside = (m < M)[:, None] & (o < O)[None, :]
    if residual_ptr is not None:
        at = m[:, None] * (residual_units * UNIT) + o[None, :]
        sums += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = activate(sums, ACTIVATION, slope)
    store_image(output_ptr + m[:, None] * (output_units * UNIT) + o[None, :], result, inside)
    if moments_ptr is not None:
        stored = rounded(result, output_ptr.dtype.element_ty).to(tl.float32)
        mean, squares = merge(stored, tl.zeros_like(stored), (m < M).to(tl.float32), BLOCK_M, BLOCK_O)
        store_moments(moments_ptr, block, mean, squares, o, O)


def run(
    input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope, moments, tf32=False
) -> tuple[Tensor, Tensor]:
    """(output, moments [2, O] or empty), as pyops::pointwise_run."""
    N, _, H, W = input.shape
    O = weight.shape[0]
    output = empty_image(input, N, O, H, W)
    arguments = (input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope)
    found = _launch(output, *arguments, moments, tf32)
    if found is None:  # not wanted, or of no positions
        found = torch.zeros((2, O) if moments else 0, dtype=torch.float32, device=input.device)
    return output, found


def into(
    output, input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope, tf32=False
) -> None:
    """As pyops::pointwise_into."""
    arguments = (input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope)
    if position_stride(output) is None:
        output.copy_(run(*arguments, False, tf32)[0])
    else:
        _launch(output, *arguments, False, tf32)


def _launch(
    output, input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope, moments, tf32
) -> Tensor | None:
    """Writes output, whose positions are evenly apart; its moments where they are wanted."""
    N, C, H, W = input.shape
    O, M = output.shape[1], N * H * W
    if not output.numel():
        return None
    input, residual, weight = _rows(input), _rows(residual), weight.contiguous()
    vectors = [None if each is None else each.contiguous() for each in (rows, affine, gate, bias, keep)]
    sizes = [C, O, *(0 if each is None else position_stride(each) for each in (input, residual, output))]
    config = launch_config(M, C, O, input.dtype, tf32, 8 if all(size % 8 == 0 for size in sizes) else 1)
    blocks = triton.cdiv(M, config["BLOCK_M"])
    partials = torch.empty(blocks, 2, O, dtype=torch.float32, device=input.device) if moments else None
    rows, affine, gate, bias, keep = vectors
    tensors = (input, weight, rows, affine, gate, bias, keep, residual, output, partials)
    units = [size // config["UNIT"] for size in sizes]
    constants = config | {"INPUT_ACTIVATION": input_activation, "ACTIVATION": activation}
    with on(input):
        pointwise_kernel[(blocks * triton.cdiv(O, config["BLOCK_O"]),)](*tensors, M, H * W, *units, input_slope, slope, **constants)
    return None if partials is None else merge_moments(partials, int(config["BLOCK_M"]), M)


def launch_config(M: int, C: int, O: int, dtype: torch.dtype, tf32: bool, unit: int) -> dict[str, int | str]:
    """Compile-time tile: fixed by sizes, strides and dtype, so that a call has one binary and one result. unit divides every size.

    Elements that are read one by one each have an address, and fp32 without tensor cores has an operand in registers: smaller tiles, or
    more threads, lest they spill.
    """
    wide, addresses = dtype == torch.float32, unit == 1
    ieee = wide and not tf32
    columns = 16 if O <= 16 else 32 if O <= 32 else 64 if O <= 64 or wide or addresses else 128
    small = M * triton.cdiv(O, columns) <= 128 * 132  # too few programs for a large GPU: twice as many, of half the positions
    positions = 64 if ieee or addresses or small else 128
    return {
        "PRECISION": "ieee" if ieee else "tf32", "UNIT": unit, "GROUP": GROUP, "SEGMENT": SEGMENT, "BLOCK_M": positions, "BLOCK_O": columns,
        "BLOCK_K": 16 if ieee and not addresses else 32, "num_warps": 8 if positions * columns == 128 * 128 or (wide and addresses) else 4,
        "num_stages": 2 if ieee and not addresses else 3,
    }  # fmt: skip


def position_stride(image: Tensor) -> int | None:
    """Elements from one position of an image to the next, in memory of neighbouring channels; None for any other layout."""
    N, C, H, W = image.shape
    found = next((stride for size, stride in ((W, image.stride(3)), (H, image.stride(2)), (N, image.stride(0))) if size > 1), C)
    expected = zip(image.shape, image.stride(), (H * W * found, 1, W * found, found), strict=True)
    return found if found >= C and all(size == 1 or stride == e for size, stride, e in expected) else None


def _rows(image: Tensor | None) -> Tensor | None:
    """The image itself where its positions are evenly apart, else a channels_last copy."""
    if image is None or position_stride(image) is not None:
        return image
    return image.contiguous(memory_format=torch.channels_last)
