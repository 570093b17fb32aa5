"""What the recurrent kernels share: activations, the product with a weight tile, and tiles of weights, states and steps.

A tile of the batch is [B, H] here: BLOCK_B rows and one hidden row padded to BLOCK_H. Padding is read as zero and never written.
"""

import triton
import triton.language as tl

# The interpreter's dot multiplies the bits of bf16 as integers. A product of two 16-bit floats is exact in fp32: the sums are the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to a narrower type, to nearest even. The interpreter's conversion to bf16 cuts bits off, so there the bits are rounded first."""
    if dtype == tl.float32 or x.dtype == dtype:
        return x
    elif INTERPRETED and dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def tanh(x):
    """Two units in the last place: exp(-2|x|) cancels near zero, so small arguments take an odd polynomial (Cephes, tanhf)."""
    s = x * x
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0.390625, p * s * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def product(a, weight):
    """a @ weight, accumulated in fp32.  # [B, H] x [H, H] -> [B, H]

    16 bits: tensor cores, a rounded to the weight's type. fp32: BLOCK_B is 1, and each thread multiplies the part of the weight it
    keeps in registers. The tensor cores have no fp32; a tl.dot without them re-reads the weights from shared memory every step, and
    Triton 3.9's compiler aborts on one here for sm_90.
    """
    if weight.dtype == tl.float32:
        return tl.sum(a[:, :, None] * weight[None, :, :], axis=1)
    elif INTERPRETED:
        return tl.dot(a.to(weight.dtype).to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(weight.dtype), weight)


@triton.jit
def slice_lengths(lengths_ptr, rows, T, B):
    """Steps each row takes part in; 0 for the rows that pad the slice.  # [B, 1]"""
    length = tl.where(rows < B, T, 0)
    if lengths_ptr is not None:
        given = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
        length = tl.minimum(tl.maximum(given, 0), T).to(tl.int32)
    return length[:, None]


@triton.jit
def load_weight(weight_ptr, gate: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """W_hh of one gate.  # [H, H] = (unit, input)"""
    unit = tl.arange(0, BLOCK_H)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    return tl.load(weight_ptr + (gate * H + unit) * H + col, mask=(unit < H) & (col < H), other=0.0)


@triton.jit
def load_bias(bias_ptr, gate: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """b_hh of one gate; zeros when there is none.  # [1, H]"""
    col = tl.arange(0, BLOCK_H)[None, :]
    if bias_ptr is None:
        return tl.zeros([1, BLOCK_H], tl.float32)
    else:
        return tl.load(bias_ptr + gate * H + col, mask=col < H, other=0.0).to(tl.float32)


@triton.jit
def load_state(state_ptr, rows, B, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """A state, or the gradient of one; zeros when it is absent.  # [B, H]"""
    col = tl.arange(0, BLOCK_H)[None, :]
    if state_ptr is None:
        return tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    else:
        mask = (rows < B)[:, None] & (col < H)
        return tl.load(state_ptr + rows.to(tl.int64)[:, None] * H + col, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(state_ptr, state, rows, B, H: tl.constexpr, BLOCK_H: tl.constexpr):
    col = tl.arange(0, BLOCK_H)[None, :]
    mask = (rows < B)[:, None] & (col < H)
    tl.store(state_ptr + rows.to(tl.int64)[:, None] * H + col, state.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def step_mask(t, length, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Which elements of step t exist; none before the first step.  # [B, H]"""
    step = t + tl.zeros_like(length)
    return (step >= 0) & (step < length) & (tl.arange(0, BLOCK_H)[None, :] < H)


@triton.jit
def load_step(tile_ptr, t, stride_t, mask):
    """One step of a [T, B, H] tensor, given the tile's pointers at step 0.  # [B, H]"""
    return tl.load(tile_ptr + t.to(tl.int64) * stride_t, mask=mask, other=0.0)


@triton.jit
def store_step(tile_ptr, t, stride_t, value, mask):
    tl.store(tile_ptr + t.to(tl.int64) * stride_t, value.to(tile_ptr.dtype.element_ty), mask=mask)
