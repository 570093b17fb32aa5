"""Two linear layers whose hidden rows stay on chip, in the terms of pyops/ops/_mlp_ops.py.

    output[m] = second @ activation(first @ x[m] + first_bias) + second_bias + residual[m]

input [M, C], residual and output [M, O], first [H, C], second [O, H]; x is input, with `norm` each row less its mean over its deviation.
Biases are fp32, as are sums, statistics and activation; products are of operands in input's dtype, so x and hidden rows are rounded.

Tiling: a program owns BLOCK_M rows and all O outputs, whose sums it keeps, and walks the hidden units in blocks of BLOCK_H: a product
gives the block's hidden rows, another adds what they give. Tensor cores multiply 16 bits, with the rows of x kept as well. fp32 has
none: x is read (from L1) and normalised BLOCK_K inputs at a time, and each block's products are summed apart, since one sequence as
long as H would lose digits. C and O are padded to powers of two, so programs keep at most MOST of them. The same bits every call.

Floors: input and residual read once, output written once, weights read M / BLOCK_M times, but for one from L2; 2*M*H*(C + O) flops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .channel import load_vector
from .common import rounded
from .images import on, store_image
from .pointwise_conv import add_product, load_weight

MOST = 256  # inputs, and outputs
SIZES = ("M", "C_units", "H_units", "O_units")  # one binary whatever they are


@triton.jit
def load_rows(input_ptr, m, c, M, C, mean, rstd, NORM: tl.constexpr):
    """x, in input's dtype.  # [BLOCK_M, columns of c]"""
    inside = (m < M)[:, None] & (c < C)[None, :]
    x = tl.load(input_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0)
    if NORM:
        x = tl.where(inside, (x.to(tl.float32) - mean) * rstd, 0.0)
    return rounded(x, input_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=SIZES)
def mlp_kernel(
    input_ptr, first_ptr, first_bias_ptr, second_ptr, second_bias_ptr, residual_ptr, output_ptr, M, C_units, H_units, O_units, eps, slope,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """KEPT: the rows of x are. Sizes come in UNITs, so that their alignment is known."""
    C, H, O = C_units * UNIT, H_units * UNIT, O_units * UNIT
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    operand: tl.constexpr = input_ptr.dtype.element_ty
    mean, rstd = 0.0, 1.0
    if NORM:
        inside = (m < M)[:, None] & (c < C)[None, :]
        x = tl.load(input_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = (tl.sum(x, axis=1) / C)[:, None]
        x = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / C + eps)[:, None]
    if KEPT:
        kept = load_rows(input_ptr, m, c, M, C, mean, rstd, NORM)
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        hidden = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        if KEPT:
            hidden = add_product(kept, load_weight(first_ptr, c, h, C, H, operand), hidden, "ieee")
        else:
            for column in range(0, C, BLOCK_K):
                k = column + tl.arange(0, BLOCK_K)
                part = load_rows(input_ptr, m, k, M, C, mean, rstd, NORM)
                hidden = add_product(part, load_weight(first_ptr, k, h, C, H, operand), hidden, "ieee")
        hidden += load_vector(first_bias_ptr, 0, h, H)
        hidden = rounded(activate(hidden, ACTIVATION, slope), operand)
        weight = load_weight(second_ptr, h, o, H, O, operand)
        if KEPT:
            sums = add_product(hidden, weight, sums, "ieee")
        else:
            sums += add_product(hidden, weight, tl.zeros([BLOCK_M, BLOCK_O], tl.float32), "ieee")
    sums += load_vector(second_bias_ptr, 0, o, O)
    inside = (m < M)[:, None] & (o < O)[None, :]
    at = m[:, None] * O + o[None, :]
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    store_image(output_ptr + at, sums, inside)


def run(input, first, first_bias, second, second_bias, residual, norm, eps, activation, slope) -> Tensor:
    """[M, O], as pyops::mlp_run."""
    (M, C), (O, H) = input.shape, second.shape
    reason = unsupported(C, O)
    if reason is not None:
        raise ValueError(f"mlp_run: {reason}")
    tensors = (input, first, first_bias, second, second_bias, residual)
    input, first, first_bias, second, second_bias, residual = (None if t is None else t.contiguous() for t in tensors)
    output = torch.empty(M, O, dtype=input.dtype, device=input.device)
    if output.numel():
        config = launch_config(C, H, O, input.dtype)
        sizes = (M, *(size // config["UNIT"] for size in (C, H, O)))
        with on(input):
            mlp_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
                input, first, first_bias, second, second_bias, residual, output, *sizes, eps, slope,
                NORM=norm, ACTIVATION=activation, **config,
            )  # fmt: skip
    return output


def unsupported(C: int, O: int) -> str | None:
    """None when a program can keep rows of C inputs and O outputs, else why not."""
    return None if min(C, O) >= 1 and max(C, O) <= MOST else f"expected 1 to {MOST} inputs and outputs, got {C} and {O}"


def launch_config(C: int, H: int, O: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Compile-time tile: fixed by sizes and dtype, so that a call has one binary and one result. UNIT divides every size.

    Sums of more than 128 outputs, or rows of more inputs, would spill from the registers of four warps; and beside them the addresses of
    elements that are read one by one from those of eight, but for half the rows.
    """
    unit, wide = 8 if all(size % 8 == 0 for size in (C, H, O)) else 1, dtype == torch.float32
    inputs, outputs = (max(16, triton.next_power_of_2(size)) for size in (C, O))
    many = max(inputs, outputs) > 128
    rows = (32 if wide else 64) // (2 if many and unit == 1 else 1)
    return {
        "UNIT": unit, "KEPT": not wide, "BLOCK_M": rows, "BLOCK_C": inputs, "BLOCK_O": outputs,
        "BLOCK_H": 32, "BLOCK_K": 16, "num_warps": 8 if many else 4, "num_stages": 2,
    }  # fmt: skip
