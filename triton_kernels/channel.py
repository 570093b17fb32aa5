"""Channelwise operations on images: statistics, affine, activation, gates and their gradients, in the terms of csrc/conv/channel.h.

    z = (input - mean[c]) * scale[c] + bias[c]    u = z * keep[n] + residual    a = activation(u)    output = a * gate[n,c] + offset[n,c]

Images are [N, P, C] in memory (channels_last, P = H*W), vectors fp32: affine [3, C], terms [2, C], keep [N], gate and offset [N, C];
all arithmetic is fp32.

Tiling: a program owns BLOCK_P positions of an image x BLOCK_C channels, and where it adds up it walks `passes` such tiles, one sum a
lane, before its lanes are added as a tree. What takes no vector of an image's own sees one image of N*P positions. Sums over programs
are fp32 partials [slots, ...] that PyTorch adds up, moments partials [slots, 2, C] that moments.py merges: no
atomics, and sizes alone fix the order, so the same call gives the same bits.

Floors: each image read once, each result written once; a few flops an element, and an exponential for some activations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .images import empty_image, image, on, store_image, sum_positions
from .moments import merge, merge_moments, store_moments

TILE_BYTES = 4096  # of a program's tile: two vectors of 16 bytes a thread
PROGRAMS = 1024  # of a sum, as a goal: they fill the largest GPUs once
MOST_PASSES = 64  # values that a lane adds one after another
SIZES = ("P", "units", "tiles", "slots", "passes")  # one binary whatever they are


@triton.jit
def place(units, slots, passes, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(C, slot, image, first position, channels) of this program; C as a product, so that its alignment is known."""
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return C, slot.to(tl.int64), (slot // slots).to(tl.int64), (slot % slots).to(tl.int64) * passes * BLOCK_P, c


@triton.jit
def load_image(image_ptr, at, inside):
    """# [BLOCK_P, BLOCK_C]"""
    return tl.load(image_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_vector(vector_ptr, row, c, C):
    """One row of [rows, C]; zeros when there is none.  # [1, BLOCK_C]"""
    if vector_ptr is None:
        return tl.zeros_like(c).to(tl.float32)[None, :]
    else:
        return tl.load(vector_ptr + row * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def load_keep(keep_ptr, n):
    if keep_ptr is None:
        return 1.0
    else:
        return tl.load(keep_ptr + n)


@triton.jit
def before_activation(x, mean, scale, bias, keep, affine_ptr, keep_ptr, residual_ptr, at, inside):
    """u; an absent step is left out, so that integers and infinities stay what they are."""
    if affine_ptr is not None:
        x = (x - mean) * scale + bias
    if keep_ptr is not None:
        x *= keep
    if residual_ptr is not None:
        x += load_image(residual_ptr, at, inside)
    return x


@triton.jit
def gated(x, gate, offset, gate_ptr, offset_ptr):
    if gate_ptr is not None:
        x *= gate
    if offset_ptr is not None:
        x += offset
    return x


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(input_ptr, sums_ptr, P, units, slots, passes, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums [slots, 2, C]: Welford's recurrence in each lane, then the lanes merged. One image."""
    C, slot, _, first, c = place(units, slots, passes, UNIT, BLOCK_P, BLOCK_C)
    row = tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(passes):
        position = first + step * BLOCK_P + row
        inside = (position < P)[:, None] & (c < C)[None, :]
        x = load_image(input_ptr, position[:, None] * C + c[None, :], inside)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (step + 1.0))  # a lane's values come first: where one is there, so are all before it
        squares += delta * (x - mean)
    count = tl.minimum((P - first - row + BLOCK_P - 1) // BLOCK_P, passes)
    mean, squares = merge(mean, squares, tl.maximum(count, 0).to(tl.float32), BLOCK_P, BLOCK_C)
    store_moments(sums_ptr, slot, mean, squares, c, C)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    input_ptr, affine_ptr, keep_ptr, residual_ptr, gate_ptr, offset_ptr, output_ptr, P, units, tiles, slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C, _, n, first, c = place(units, tiles, 1, UNIT, BLOCK_P, BLOCK_C)
    position = first + tl.arange(0, BLOCK_P)
    inside = (position < P)[:, None] & (c < C)[None, :]
    at = (n * P + position)[:, None] * C + c[None, :]
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    u = load_image(input_ptr, at, inside)
    u = before_activation(u, mean, scale, bias, load_keep(keep_ptr, n), affine_ptr, keep_ptr, residual_ptr, at, inside)
    gate, offset = load_vector(gate_ptr, n, c, C), load_vector(offset_ptr, n, c, C)
    store_image(output_ptr + at, gated(activate(u, ACTIVATION, slope), gate, offset, gate_ptr, offset_ptr), inside)


@triton.jit(do_not_specialize=SIZES)
def totals_kernel(
    input_ptr, grad_ptr, affine_ptr, keep_ptr, residual_ptr, sums_ptr, P, units, slots, passes, slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [N * slots, C] of a, or of a * grad"""
    C, slot, n, first, c = place(units, slots, passes, UNIT, BLOCK_P, BLOCK_C)
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    keep = load_keep(keep_ptr, n)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(passes):
        position = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (position < P)[:, None] & (c < C)[None, :]
        at = (n * P + position)[:, None] * C + c[None, :]
        u = load_image(input_ptr, at, inside)
        u = before_activation(u, mean, scale, bias, keep, affine_ptr, keep_ptr, residual_ptr, at, inside)
        a = activate(u, ACTIVATION, slope)
        if grad_ptr is not None:
            a *= load_image(grad_ptr, at, inside)
        sums += tl.where(inside, a, 0.0)
    tl.store(sums_ptr + slot * C + c, sum_positions(sums, BLOCK_P, BLOCK_C), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    grad_ptr, input_ptr, affine_ptr, keep_ptr, residual_ptr, gate_ptr, offset_ptr, sums_ptr, P, units, slots, passes, slope,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [N * slots, 2, C] of dz and of dz * (input - mean)"""
    C, slot, n, first, c = place(units, slots, passes, UNIT, BLOCK_P, BLOCK_C)
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    gate, offset = load_vector(gate_ptr, n, c, C), load_vector(offset_ptr, n, c, C)
    keep = load_keep(keep_ptr, n)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(passes):
        position = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (position < P)[:, None] & (c < C)[None, :]
        at = (n * P + position)[:, None] * C + c[None, :]
        x = load_image(input_ptr, at, inside)
        dz = gated(load_image(grad_ptr, at, inside), gate, offset, gate_ptr, offset_ptr)
        if ACTIVATION != 0:  # the gradient of none needs no u
            u = before_activation(x, mean, scale, bias, keep, affine_ptr, keep_ptr, residual_ptr, at, inside)
            dz *= differentiate(u, ACTIVATION, slope)
        dz = tl.where(inside, dz * keep, 0.0)
        sums += dz
        products += dz * (x - mean)
    store_moments(sums_ptr, slot, sum_positions(sums, BLOCK_P, BLOCK_C), sum_positions(products, BLOCK_P, BLOCK_C), c, C)


@triton.jit(do_not_specialize=SIZES)
def grad_kernel(
    grad_ptr, input_ptr, affine_ptr, terms_ptr, keep_ptr, residual_ptr, gate_ptr, offset_ptr, output_ptr, grad_residual_ptr,
    P, units, tiles, slope, ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output may be grad: a tile is read before it is written, and nobody else reads it."""
    C, _, n, first, c = place(units, tiles, 1, UNIT, BLOCK_P, BLOCK_C)
    position = first + tl.arange(0, BLOCK_P)
    inside = (position < P)[:, None] & (c < C)[None, :]
    at = (n * P + position)[:, None] * C + c[None, :]
    mean, scale, bias = load_vector(affine_ptr, 0, c, C), load_vector(affine_ptr, 1, c, C), load_vector(affine_ptr, 2, c, C)
    gate, offset = load_vector(gate_ptr, n, c, C), load_vector(offset_ptr, n, c, C)
    keep = load_keep(keep_ptr, n)
    du = gated(load_image(grad_ptr, at, inside), gate, offset, gate_ptr, offset_ptr)
    if ACTIVATION != 0:  # the gradient of none needs no u
        u = load_image(input_ptr, at, inside)
        u = before_activation(u, mean, scale, bias, keep, affine_ptr, keep_ptr, residual_ptr, at, inside)
        du *= differentiate(u, ACTIVATION, slope)
    if grad_residual_ptr is not None:
        store_image(grad_residual_ptr + at, du, inside)
    dx = du * keep
    if affine_ptr is not None:
        dx *= scale
    if terms_ptr is not None:
        dx -= load_vector(terms_ptr, 0, c, C) + (load_image(input_ptr, at, inside) - mean) * load_vector(terms_ptr, 1, c, C)
    store_image(output_ptr + at, dx, inside)


def moments(input: Tensor) -> Tensor:
    """[2, C], as pyops::channel_moments."""
    input = input.contiguous(memory_format=torch.channels_last)
    N, P, C, block = _sizes(input, whole=True)
    if not input.numel():
        return torch.zeros(2, C, dtype=torch.float32, device=input.device)
    slots, passes = _walk(N, P, C, block)
    partials = torch.empty(slots, 2, C, dtype=torch.float32, device=input.device)
    with on(input):
        moments_kernel[_grid(slots, C, block)](input, partials, P, C // block["UNIT"], slots, passes, **block)
    return merge_moments(partials, passes * block["BLOCK_P"], P)


def apply(input, affine, keep, residual, gate, offset, activation, slope) -> Tensor:
    """output, as pyops::channel_apply."""
    input, residual, (affine, keep, gate, offset) = image(input), image(residual), _vectors(affine, keep, gate, offset)
    N, P, C, block = _sizes(input, whole=keep is None and gate is None and offset is None)
    output = empty_image(input, *input.shape)
    tiles = triton.cdiv(P, block["BLOCK_P"])
    if output.numel():
        with on(input):
            apply_kernel[_grid(N * tiles, C, block)](
                input, affine, keep, residual, gate, offset, output, P, C // block["UNIT"], tiles, slope, ACTIVATION=activation, **block
            )
    return output


def sums(input, grad, affine, keep, residual, activation, slope) -> Tensor:
    """[N, C], as pyops::channel_sums."""
    input, grad, residual, (affine, keep) = image(input), image(grad), image(residual), _vectors(affine, keep)
    N, P, C, block = _sizes(input, whole=False)
    slots, passes = _walk(N, P, C, block)
    partials = torch.empty(N, slots, C, dtype=torch.float32, device=input.device)
    if partials.numel():
        with on(input):
            totals_kernel[_grid(N * slots, C, block)](
                input, grad, affine, keep, residual, partials, P, C // block["UNIT"], slots, passes, slope, ACTIVATION=activation, **block
            )
    return partials[:, 0].contiguous() if slots == 1 else partials.sum(1)


def reduce(grad, input, affine, keep, residual, gate, offset, activation, slope) -> Tensor:
    """[2, C], as pyops::channel_reduce."""
    grad, input, residual, (affine, keep, gate, offset) = image(grad), image(input), image(residual), _vectors(affine, keep, gate, offset)
    N, P, C, block = _sizes(input, whole=keep is None and gate is None and offset is None)
    slots, passes = _walk(N, P, C, block)
    partials = torch.empty(N * slots, 2, C, dtype=torch.float32, device=input.device)
    tensors = (grad, input, affine, keep, residual, gate, offset, partials)
    if partials.numel():
        with on(input):
            reduce_kernel[_grid(N * slots, C, block)](
                *tensors, P, C // block["UNIT"], slots, passes, slope, ACTIVATION=activation, **block
            )  # fmt: skip
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def grad(grad, input, affine, terms, keep, residual, gate, offset, activation, slope, needs_residual) -> tuple[Tensor, Tensor]:
    """(gradient of input, gradient of residual or empty), as pyops::channel_grad."""
    output = empty_image(input, *input.shape)
    grad_residual = empty_image(input, *input.shape) if needs_residual else None
    _gradient(grad, input, affine, terms, keep, residual, gate, offset, output, grad_residual, activation, slope)
    return output, input.new_empty(0) if grad_residual is None else grad_residual


def grad_(grad, input, affine, terms, keep, residual, gate, offset, activation, slope) -> None:
    """The gradient of input, written over grad, as pyops::channel_grad_."""
    output = image(grad)
    _gradient(output, input, affine, terms, keep, residual, gate, offset, output, None, activation, slope)
    if output is not grad:
        grad.copy_(output)


def _gradient(grad, input, affine, terms, keep, residual, gate, offset, output, grad_residual, activation, slope):
    images = (image(grad), image(input), *_vectors(affine, terms, keep), image(residual), *_vectors(gate, offset), output, grad_residual)
    whole = keep is None and gate is None and offset is None
    N, P, C, block = _sizes(output, whole)
    tiles = triton.cdiv(P, block["BLOCK_P"])
    if output.numel():
        with on(output):
            grad_kernel[_grid(N * tiles, C, block)](*images, P, C // block["UNIT"], tiles, slope, ACTIVATION=activation, **block)


def launch_config(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time tile: fixed by channels and dtype, so that a shape has one binary and one result. UNIT divides C.

    Channels that are no multiple of 8 are read one by one, each with an address: half as many, or the addresses would spill.
    """
    channels, unit = 16 if C <= 16 else 32 if C <= 32 else 64, 8 if C % 8 == 0 else 1
    elements = TILE_BYTES // dtype.itemsize // (1 if unit == 8 else 2)
    return {"UNIT": unit, "BLOCK_P": elements // channels, "BLOCK_C": channels, "num_warps": 4, "num_stages": 2}


def _sizes(input: Tensor, whole: bool) -> tuple[int, int, int, dict[str, int]]:
    """(N, P, C, tile); `whole`: as one image of all positions."""
    N, C, H, W = input.shape
    return *((1, N * H * W) if whole else (N, H * W)), C, launch_config(C, input.dtype)


def _walk(N: int, P: int, C: int, block: dict[str, int]) -> tuple[int, int]:
    """(slots, passes): how many programs share an image, and how many tiles each of them walks."""
    tiles = max(1, triton.cdiv(P, block["BLOCK_P"]))
    passes = max(1, min(tiles, MOST_PASSES, N * tiles * triton.cdiv(C, block["BLOCK_C"]) // PROGRAMS))
    return triton.cdiv(tiles, passes), passes


def _grid(slots: int, C: int, block: dict[str, int]) -> tuple[int]:
    return (slots * triton.cdiv(C, block["BLOCK_C"]),)


def _vectors(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else each.contiguous() for each in vectors)
