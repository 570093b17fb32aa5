"""Depthwise convolution, forward and backward, in the terms of csrc/conv/depthwise.h.

    z[n, y, x, c] = bias[c] + sum over taps of weight[c, ky, kx] * input[n, y*stride - pad + ky*dilation, ..., c] + residual
    output = activation(z)    means[n, c] = mean of output over y, x

Images are [N, H, W, C] in memory (channels_last), weight [C, KH, KW]; all arithmetic is fp32.

Tiling: a program owns BLOCK_P positions of an image (neighbours in rows, wrapping) x BLOCK_C channels and walks the taps, one tile
of the other image each: channels are contiguous, so loads are 16 bytes a thread, and the taps' overlap is left to L1. A program of the
weight's gradient owns 16 taps and walks `passes` tiles of outputs, its sums in registers; the bias is the tap whose input is 1. Sums
over programs go through fp32 partial sums that PyTorch adds up: no atomics, the same call gives the same bits.

Floors: input (gradients: and grad_output) once, output once; 2*KH*KW flops an output, for each gradient again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, differentiate
from .images import empty_image, image, on, store_image, sum_positions

TILE_BYTES = 4096  # of a program's tile: two vectors of 16 bytes a thread
BLOCK_TAPS = 16
MOST_SLOTS = 256  # programs that share a channel block of the weight's gradient: rows of partial sums


@triton.jit
def load_filter(weight_ptr, c, tap, C, TAPS: tl.constexpr):
    """One tap of each channel.  # [1, BLOCK_C]"""
    return tl.load(weight_ptr + c.to(tl.int64) * TAPS + tap, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_positions(image_ptr, y, x, W, C, mask):
    """The channels of the positions (y, x) of an image, zero where there are none.  # [BLOCK_P, BLOCK_C]"""
    return tl.load(image_ptr + (y.to(tl.int64) * W + x)[:, None] * C, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def conv_kernel(
    input_ptr, weight_ptr, bias_ptr, residual_ptr, output_ptr, sums_ptr, grad_output_ptr, grad_means_ptr,
    H, W, C, OH, OW, slope,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output = activation(z) and sums [N, tiles, C] of it; GRADIENT: output is activation'(z) * (grad_output + grad_means / (OH*OW))."""
    channel_blocks, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(OH * OW, BLOCK_P)
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // channel_blocks // tiles).to(tl.int64)
    tile = program // channel_blocks % tiles
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    oy, ox = position // OW, position % OW
    inside = (position < OH * OW)[:, None] & (c < C)[None, :]
    z = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if not GRADIENT or ACTIVATION != 0:  # the gradient of none needs no z
        for ky in range(KH):
            for kx in range(KW):
                y, x = oy * STRIDE_H - PAD_H + ky * DILATION_H, ox * STRIDE_W - PAD_W + kx * DILATION_W
                there = (y >= 0) & (y < H) & (x >= 0) & (x < W)
                value = load_positions(input_ptr + n * H * W * C + c[None, :], y, x, W, C, inside & there[:, None])
                z += value * load_filter(weight_ptr, c, ky * KW + kx, C, KH * KW)
    if bias_ptr is not None:
        z += load_filter(bias_ptr, c, 0, C, 1)
    at = n * OH * OW * C + position.to(tl.int64)[:, None] * C + c[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GRADIENT:
        g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        if grad_output_ptr is not None:
            g += tl.load(grad_output_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if grad_means_ptr is not None:
            g += tl.load(grad_means_ptr + n * C + c, mask=c < C, other=0.0)[None, :] / (OH * OW * 1.0)
        result = g * differentiate(z, ACTIVATION, slope)
    else:
        result = activate(z, ACTIVATION, slope)
    store_image(output_ptr + at, result, inside)
    if sums_ptr is not None:
        total = sum_positions(tl.where(inside, result, 0.0), BLOCK_P, BLOCK_C)
        tl.store(sums_ptr + (n * tiles + tile) * C + c, total, mask=c < C)


@triton.jit
def grad_input_kernel(
    dz_ptr, weight_ptr, grad_input_ptr,
    H, W, C, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel_blocks, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(H * W, BLOCK_P)
    program = tl.program_id(0)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (program // channel_blocks // tiles).to(tl.int64)
    position = program // channel_blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    iy, ix = position // W, position % W
    inside = (position < H * W)[:, None] & (c < C)[None, :]
    dx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for ky in range(KH):
        for kx in range(KW):
            qy, qx = iy + PAD_H - ky * DILATION_H, ix + PAD_W - kx * DILATION_W
            oy, ox = qy // STRIDE_H, qx // STRIDE_W
            there = (qy >= 0) & (qx >= 0) & (oy * STRIDE_H == qy) & (ox * STRIDE_W == qx) & (oy < OH) & (ox < OW)
            value = load_positions(dz_ptr + n * OH * OW * C + c[None, :], oy, ox, OW, C, inside & there[:, None])
            dx += value * load_filter(weight_ptr, c, ky * KW + kx, C, KH * KW)
    at = n * H * W * C + position.to(tl.int64)[:, None] * C + c[None, :]
    store_image(grad_input_ptr + at, dx, inside)


@triton.jit
def grad_weight_kernel(
    dz_ptr, input_ptr, partials_ptr,
    N, H, W, C, OH, OW, passes,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [slots, KH*KW + 1, C]"""
    TAPS: tl.constexpr = KH * KW
    channel_blocks, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(OH * OW, BLOCK_P)
    program, slot = tl.program_id(0), tl.program_id(1)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = program // channel_blocks * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for step in range(passes):
        flat = slot * passes + step
        image = flat // tiles  # the last slot's may be past the end
        n = image.to(tl.int64)
        position = flat % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        oy, ox = position // OW, position % OW
        inside = (position < tl.where(image < N, OH * OW, 0))[:, None] & (c < C)[None, :]
        g = load_positions(dz_ptr + n * OH * OW * C + c[None, :], oy, ox, OW, C, inside)
        for t in range(BLOCK_T if TAPS >= BLOCK_T else TAPS + 1):
            tap = first + t
            y, x = oy * STRIDE_H - PAD_H + tap // KW * DILATION_H, ox * STRIDE_W - PAD_W + tap % KW * DILATION_W
            there = (y >= 0) & (y < H) & (x >= 0) & (x < tl.where(tap < TAPS, W, 0))
            value = load_positions(input_ptr + n * H * W * C + c[None, :], y, x, W, C, inside & there[:, None])
            total = sum_positions(tl.where(tap == TAPS, g, value * g), BLOCK_P, BLOCK_C)
            sums += tl.where((row == t)[:, None], total[None, :], 0.0)
    at = (slot.to(tl.int64) * (TAPS + 1) + first + row)[:, None] * C + c[None, :]
    tl.store(partials_ptr + at, sums, mask=(first + row <= TAPS)[:, None] & (c < C)[None, :])


def forward(input, weight, bias, residual, stride, padding, dilation, activation, slope, means):
    """(output, means [N, C] fp32 or empty), as pyops::depthwise_fwd."""
    input, weight, residual = image(input), weight.contiguous(), image(residual)
    bias = None if bias is None else bias.contiguous()
    N, C, H, W = input.shape
    OH, OW = output_size(input, weight, stride, padding, dilation)
    output = empty_image(input, N, C, OH, OW)
    block = launch_config(C, input.dtype)
    tiles = triton.cdiv(OH * OW, block["BLOCK_P"])
    sums = torch.empty(N, tiles, C, dtype=torch.float32, device=input.device) if means else None
    constants = _constants(weight, stride, padding, dilation) | {"ACTIVATION": activation, "GRADIENT": False} | block
    if output.numel():
        with on(input):
            conv_kernel[_grid(N, tiles, C, block)](
                input, weight, bias, residual, output, sums, None, None, H, W, C, OH, OW, slope, **constants
            )
    if sums is None:
        return output, torch.empty(0, dtype=torch.float32, device=input.device)
    return output, sums.sum(1) / (OH * OW)


def backward(
    grad_output, grad_means, input, weight, bias, residual, stride, padding, dilation, activation, slope, needs_input, needs_weight
):  # fmt: skip
    """(grad_input, grad_weight, grad_bias, grad_residual), as pyops::depthwise_bwd: empty where not wanted."""
    input, weight, residual, grad_output = image(input), weight.contiguous(), image(residual), image(grad_output)
    bias, grad_means = (None if t is None else t.contiguous() for t in (bias, grad_means))
    N, C, H, W = input.shape
    OH, OW = output_size(input, weight, stride, padding, dilation)
    block, geometry = launch_config(C, input.dtype), _constants(weight, stride, padding, dilation)
    tiles = triton.cdiv(OH * OW, block["BLOCK_P"])
    nothing = input.new_empty(0)
    grad_input, grad_weight, grad_bias, grad_residual = (nothing,) * 4
    dz = grad_output
    with on(input):
        if activation != 0 or residual is not None or grad_means is not None or grad_output is None:
            dz = empty_image(input, N, C, OH, OW)
            constants = geometry | {"ACTIVATION": activation, "GRADIENT": True} | block
            if dz.numel():
                conv_kernel[_grid(N, tiles, C, block)](
                    input, weight, bias, residual, dz, None, grad_output, grad_means, H, W, C, OH, OW, slope, **constants
                )
        if residual is not None:
            grad_residual = dz
        if needs_input:
            grad_input = empty_image(input, N, C, H, W)
            if grad_input.numel():
                grid = _grid(N, triton.cdiv(H * W, block["BLOCK_P"]), C, block)
                grad_input_kernel[grid](dz, weight, grad_input, H, W, C, OH, OW, **geometry, **block)
        if needs_weight:
            taps = weight.shape[2] * weight.shape[3]
            passes = max(1, triton.cdiv(N * tiles, MOST_SLOTS))
            partials = torch.empty(triton.cdiv(N * tiles, passes), taps + 1, C, dtype=torch.float32, device=input.device)
            if partials.numel():
                programs = triton.cdiv(C, block["BLOCK_C"]) * triton.cdiv(taps + 1, BLOCK_TAPS)
                grad_weight_kernel[programs, partials.shape[0]](
                    dz, input, partials, N, H, W, C, OH, OW, passes, **geometry, BLOCK_T=BLOCK_TAPS, **block
                )
            sums = partials.sum(0)
            grad_weight = sums[:taps].t().reshape(weight.shape).to(weight.dtype).contiguous()
            if bias is not None:
                grad_bias = sums[taps].to(bias.dtype).contiguous()
    return grad_input, grad_weight, grad_bias, grad_residual


def output_size(input: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


def launch_config(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time tile of any kernel: fixed by channels and dtype, so that a shape has one binary and one result.

    Channels that are no multiple of 16 are read one by one, each with an address: half as many, or the addresses would spill.
    """
    channels = 16 if C <= 16 else 32 if C <= 32 else 64
    elements = TILE_BYTES // dtype.itemsize // (1 if C % 16 == 0 else 2)
    return {"BLOCK_P": elements // channels, "BLOCK_C": channels, "num_warps": 4, "num_stages": 2}


def _constants(weight: Tensor, stride, padding, dilation) -> dict[str, int]:
    pairs = {"K": weight.shape[2:], "STRIDE": stride, "PAD": padding, "DILATION": dilation}
    found = {f"{name}_{axis}": int(value) for name, pair in pairs.items() for axis, value in zip("HW", pair, strict=True)}
    return {name.replace("K_", "K"): value for name, value in found.items()}


def _grid(N: int, tiles: int, C: int, block: dict[str, int]) -> tuple[int]:
    return (N * tiles * triton.cdiv(C, block["BLOCK_C"]),)
