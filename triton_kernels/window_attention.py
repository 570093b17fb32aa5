"""Window attention's forward kernel and what its gradients share with it, in the terms of pyops/ops/_window_attention_ops.py.

    score = scale * q . k (or logit_scale times their cosine) + table[relative position] - 100 between regions;  output = softmax(score) v

qkv [B, H, W, 3C], output [B, H, W, C] in the map's order; table [(2 * WH - 1) * (2 * WW - 1), heads] and lse [windows, heads, N] fp32. No
roll, no partition: tokens find their pixels, and those beyond the map are qkv_bias.

Tiling: a program owns BLOCK tokens of a head and takes `per` windows in turn, each with its keys in blocks of BLOCK. Where a window is one
block, as most are, the table's tile is read once for all. Cosines are products of the raw rows over their norms, in fp32.

Floors: qkv read once, output written once; 4*N*C flops a token.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_tile import LN2, LOG2E, add_piece, block_of, keep_threshold, kept, precision
from .common import rounded
from .images import on, store_image
from .pointwise_conv import add_product

MASKED = tl.constexpr(100.0 * math.log2(math.e))  # between regions, in units of log 2
EPS = tl.constexpr(1e-12)
PROGRAMS = 1056  # about: eight for each multiprocessor of a large GPU
SIZES = ("H", "W", "shift_y", "shift_x", "windows", "per", "heads", "threshold", "chunks")


@triton.jit
def place(windows, per, heads, BLOCKS: tl.constexpr):
    """(block of tokens, head, chunk of windows, its first window, its end)"""
    program = tl.program_id(0)
    chunk = program // BLOCKS // heads
    return program % BLOCKS, program // BLOCKS % heads, chunk, chunk * per, tl.minimum(chunk * per + per, windows)


@triton.jit
def locate(window, t, H, W, shift_y, shift_x, WH: tl.constexpr, WW: tl.constexpr):
    """(pixels, which are on the map, regions) of tokens t. Windows begin where the map's other regions do: one shift a side tells apart."""
    down, across = tl.cdiv(H, WH), tl.cdiv(W, WW)
    image, within = window // (down * across), window % (down * across)
    y, x = within // across * WH + t // WW, within % across * WW + t % WW
    row, column = (y + shift_y) % (down * WH), (x + shift_x) % (across * WW)
    region = (y >= down * WH - shift_y).to(tl.int32) * 2 + (x >= across * WW - shift_x).to(tl.int32)
    return (image * H + row).to(tl.int64) * W + column, (t < WH * WW) & (row < H) & (column < W), region


@triton.jit
def load_tokens(
    qkv_ptr, qkv_bias_ptr, pixel, real, inside, channel, heads,
    PADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D values from `channel` * D on; what fills up windows where PADS.  # [BLOCK, BLOCK_D]"""
    d = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(qkv_ptr + pixel[:, None] * (heads * (3 * D)) + (channel * D + d), mask=real[:, None] & (d < D), other=0.0)
    if PADS and qkv_bias_ptr is not None:
        fill = tl.load(qkv_bias_ptr + channel * D + d, mask=d < D, other=0.0)
        x = tl.where((inside & ~real)[:, None], rounded(fill, x.dtype), x)
    return x


@triton.jit
def inverse_norm(x, COSINE: tl.constexpr):
    """# [BLOCK, 1]"""
    if COSINE:
        x = x.to(tl.float32)
        return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), EPS)[:, None]
    else:
        return 1.0


@triton.jit
def relative(table_ptr, t, u, h, heads, WH: tl.constexpr, WW: tl.constexpr):
    """The table's values, in units of log 2, zeros without one; -inf for keys that fill up a block.  # [tokens t, tokens u]"""
    t, u = t[:, None], u[None, :]
    bias = (t * u * 0).to(tl.float32)
    if table_ptr is not None:
        index = (t // WW - u // WW + WH - 1) * (2 * WW - 1) + t % WW - u % WW + WW - 1
        bias = tl.load(table_ptr + index * heads + h, mask=(t < WH * WW) & (u < WH * WW), other=0.0) * LOG2E
    return tl.where(u < WH * WW, bias, float("-inf"))


@triton.jit
def window_scores(
    q, k, rq, rk, factor, bias, region_t, region_u,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(scores in units of log 2, what `factor` multiplies)  # [BLOCK, BLOCK]"""
    x = add_product(q, tl.trans(k), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
    if COSINE:
        x = x * rq * tl.reshape(rk, [1, BLOCK])
    s = x * (factor * LOG2E) + bias
    if SHIFTED:
        s = tl.where(region_t[:, None] != region_u[None, :], s - MASKED, s)
    return s, x


@triton.jit
def factor_of(logit_ptr, h, scale):
    if logit_ptr is None:
        return scale
    else:
        return tl.load(logit_ptr + h)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv_ptr, qkv_bias_ptr, table_ptr, logit_ptr, seed_ptr, output_ptr, lse_ptr,
    H, W, shift_y, shift_x, windows, per, heads, threshold, scale, rescale,
    WH: tl.constexpr, WW: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WH * WW
    ONE: tl.constexpr = BLOCK >= N
    COSINE: tl.constexpr = logit_ptr is not None
    block, h, _chunk, first, last = place(windows, per, heads, (N + BLOCK - 1) // BLOCK)
    t = block * BLOCK + tl.arange(0, BLOCK)
    factor = factor_of(logit_ptr, h, scale)
    if ONE:
        bias = relative(table_ptr, t, t, h, heads, WH, WW)
    for window in range(first, last):
        pixel, real, region = locate(window, t, H, W, shift_y, shift_x, WH, WW)
        q = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, t < N, h, heads, PADS, D, BLOCK_D)
        rq = inverse_norm(q, COSINE)
        sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        most, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            u = start + tl.arange(0, BLOCK)
            other, there, region_u = locate(window, u, H, W, shift_y, shift_x, WH, WW)
            k = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, heads + h, heads, PADS, D, BLOCK_D)
            if not ONE:
                bias = relative(table_ptr, t, u, h, heads, WH, WW)
            rk = inverse_norm(k, COSINE)
            s = window_scores(q, k, rq, rk, factor, bias, region, region_u, COSINE, SHIFTED, PRECISION, BLOCK)[0]
            above = tl.maximum(most, tl.max(s, axis=1))  # every token sees the first block's
            shrink, p = tl.exp2(most - above), tl.exp2(s - above[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            most = above
            if seed_ptr is not None:
                p = tl.where(kept(seed_ptr, window, h, block * BLOCK, start, threshold, BLOCK, BLOCK), p, 0.0)
            v = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, 2 * heads + h, heads, PADS, D, BLOCK_D)
            sums = add_piece(sums * shrink[:, None], rounded(p, v.dtype), v, PRECISION)
        d = tl.arange(0, BLOCK_D)[None, :]
        to = output_ptr + pixel[:, None] * (heads * D) + (h * D + d)
        store_image(to, sums * (rescale / total)[:, None], real[:, None] & (d < D))
        tl.store(lse_ptr + (h + window * heads).to(tl.int64) * N + t, (most + tl.log2(total)) * LN2, mask=t < N)


def common_arguments(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p) -> dict:
    """What every kernel takes, by name."""
    (B, H, W, channels), (wh, ww) = qkv.shape, window
    D, vectors = channels // 3 // heads, [None if t is None else t.contiguous() for t in (qkv_bias, table, logit_scale)]
    config = launch_config(wh * ww, D, qkv.dtype)
    windows = B * triton.cdiv(H, wh) * triton.cdiv(W, ww)
    return {
        "qkv_ptr": qkv.contiguous(), **dict(zip(("qkv_bias_ptr", "table_ptr", "logit_ptr"), vectors, strict=True)),
        "seed_ptr": seed if dropout_p else None, "H": H, "W": W, "shift_y": shift[0], "shift_x": shift[1], "windows": windows,
        "heads": heads, "threshold": keep_threshold(dropout_p), "scale": scale, "rescale": 1 / (1 - dropout_p),
        "WH": wh, "WW": ww, "PADS": H % wh > 0 or W % ww > 0, "SHIFTED": any(shift), "D": D,
        **config, **share(windows, heads * triton.cdiv(wh * ww, config["BLOCK"])),
    }  # fmt: skip


def share(windows: int, programs: int) -> dict[str, int]:
    """How many windows a program takes, given those of one window."""
    per = triton.cdiv(windows, max(1, min(windows, PROGRAMS // programs)))
    return {"per": per, "chunks": triton.cdiv(windows, max(1, per))}


def launch(kernel, programs: int, arguments: dict) -> None:
    if programs:
        kernel[(programs,)](**{name: value for name, value in arguments.items() if name in kernel.arg_names or name.startswith("num_")})


def window_attention_into(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p, output, lse) -> None:
    """As pyops::window_attention_into."""
    given = common_arguments(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p)
    blocks = triton.cdiv(window[0] * window[1], given["BLOCK"])
    with on(qkv):
        launch(forward_kernel, given["chunks"] * heads * blocks, given | {"output_ptr": output, "lse_ptr": lse})


def launch_config(N: int, D: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Compile-time tile: fixed by sizes and dtype, so that a call has one binary and one result."""
    multiplied = precision(dtype)
    wide = dtype == torch.float32 and multiplied == "ieee"
    tokens = block_of(N, 64 if D <= 64 else 32)
    return {
        "PRECISION": multiplied, "BLOCK": tokens, "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "num_warps": 8 if wide or tokens * D > 1024 else 4, "num_stages": 2 if D <= 128 else 1,
    }  # fmt: skip


def window_attention_grad_into(*arguments) -> None:
    """As pyops::window_attention_grad_into."""
    from . import window_backward

    window_backward.grad_into(*arguments)
