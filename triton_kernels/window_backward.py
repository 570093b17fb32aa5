"""Window attention's gradients, in the terms of pyops/ops/_window_attention_ops.py and of window_attention.py.

    p = exp(score - lse)    dp = dropout(grad v^T)    delta = sum of p dp / sum of p    ds = p (dp - delta)
    grad_q = dx k    grad_k = dx^T q    grad_v = dropout(p)^T grad    grad_table = ds, summed by relative position

dx is ds times scale, q and k are unit rows for cosines. delta is divided, since lse was rounded and sums of ds would feel it.

Tiling: programs are those of the forward. A window of one block of tokens is taken whole: one kernel computes its scores once. Of larger
ones three kernels do: of blocks of queries, which first walk the keys for the sum of p dp; of blocks of keys; of tiles of scores. What the
table, logit_scale and qkv_bias gather from a program's windows stays in registers and goes to partials, one a program, that PyTorch adds
up, the table's folded by relative position: no atomics, sizes alone fix every order.

Floors: qkv and grad read once, grad_qkv written once; 10*N*C flops a token (of large windows 22).
"""

import torch
import triton
import triton.language as tl

from .attention_backward import load_lse
from .attention_tile import add_piece, kept
from .common import rounded
from .images import on, store_image, sum_positions
from .pointwise_conv import add_product
from .window_attention import (
    EPS,
    SIZES,
    common_arguments,
    factor_of,
    inverse_norm,
    launch,
    load_tokens,
    locate,
    place,
    relative,
    window_scores,
)

FOLDED = 2048  # elements of the tile that sums scores by relative position


@triton.jit
def unit(x, r, COSINE: tl.constexpr):
    return rounded(x.to(tl.float32) * r, x.dtype) if COSINE else x


@triton.jit
def mean_of(sums, total):
    """Zero for what fills up a block."""
    return tl.where(total > 0.0, sums / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def input_grad(g, x, r, COSINE: tl.constexpr):
    """Of a row, given that of its unit row."""
    if COSINE:
        x = x.to(tl.float32) * r
        along = tl.where(r < 1.0 / EPS, tl.sum(g * x, axis=1)[:, None], 0.0)
        return (g - x * along) * r
    else:
        return g


@triton.jit
def store_tokens(grad_ptr, value, pixel, real, channel, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    store_image(grad_ptr + pixel[:, None] * (heads * (3 * D)) + (channel * D + d), value, real[:, None] & (d < D))


@triton.jit
def add_beyond(sums, value, real, inside, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """What tokens beyond the map add to qkv_bias' gradient.  # [BLOCK_D]"""
    return sums + sum_positions(tl.where((inside & ~real)[:, None], value, 0.0), BLOCK, BLOCK_D)


@triton.jit
def store_beyond(beyond_ptr, sums, row, channel, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """beyond [chunks * blocks, 3C]"""
    if beyond_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        tl.store(beyond_ptr + (row * heads * 3 + channel).to(tl.int64) * D + d, sums, mask=d < D)


@triton.jit
def load_grad(grad_ptr, pixel, real, h, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(grad_ptr + pixel[:, None] * (heads * D) + (h * D + d), mask=real[:, None] & (d < D), other=0.0)


@triton.jit
def weights(
    q, k, v, g, rq, rk, factor, bias, region_t, region_u, lse, seed_ptr, window, h, row, column, threshold, rescale,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(p, what dropout leaves of it but for its factor, dp, what `factor` multiplies)  # [BLOCK, BLOCK]"""
    s, x = window_scores(q, k, rq, rk, factor, bias, region_t, region_u, COSINE, SHIFTED, PRECISION, BLOCK)
    p = tl.exp2(s - lse[:, None])
    dp = add_product(g, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
    if seed_ptr is None:
        return p, p, dp, x
    else:
        keep = kept(seed_ptr, window, h, row, column, threshold, BLOCK, BLOCK)
        return p, tl.where(keep, p, 0.0), tl.where(keep, dp * rescale, 0.0), x


@triton.jit
def store_scores(table_ptr, logit_ptr, table, logit, chunk, tile, tiles, t, u, h, heads, N: tl.constexpr):
    """table [chunks, heads, N, N], logit [chunks * tiles, heads]"""
    if table_ptr is not None:
        to = table_ptr + (h + chunk * heads).to(tl.int64) * (N * N) + (t[:, None] * N + u[None, :])
        tl.store(to, table, mask=(t < N)[:, None] & (u < N)[None, :])
    if logit_ptr is not None:
        tl.store(logit_ptr + (chunk * tiles + tile) * heads + h, tl.sum(logit, axis=0))


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    qkv_ptr, qkv_bias_ptr, table_ptr, logit_ptr, seed_ptr, grad_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, beyond_ptr, tables_ptr, logits_ptr,
    H, W, shift_y, shift_x, windows, per, heads, threshold, scale, rescale,
    WH: tl.constexpr, WW: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of queries, and of all else where a window is one block; else it leaves delta [windows, heads, N]."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    ONE: tl.constexpr = BLOCKS == 1
    COSINE: tl.constexpr = logit_ptr is not None
    block, h, chunk, first, last = place(windows, per, heads, BLOCKS)
    t = block * BLOCK + tl.arange(0, BLOCK)
    factor = factor_of(logit_ptr, h, scale)
    beyond_q, beyond_k, beyond_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    table, logit = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if ONE:
        bias = relative(table_ptr, t, t, h, heads, WH, WW)
    for window in range(first, last):
        pixel, real, region = locate(window, t, H, W, shift_y, shift_x, WH, WW)
        q = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, t < N, h, heads, PADS, D, BLOCK_D)
        g = load_grad(grad_ptr, pixel, real, h, heads, D, BLOCK_D)
        rq = inverse_norm(q, COSINE)
        flat = (h + window * heads).to(tl.int64) * N
        lse = load_lse(lse_ptr + flat + t, t < N)
        if ONE:
            k = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, t < N, heads + h, heads, PADS, D, BLOCK_D)
            v = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, t < N, 2 * heads + h, heads, PADS, D, BLOCK_D)
            rk = inverse_norm(k, COSINE)
            p, dropped, dp, x = weights(
                q, k, v, g, rq, rk, factor, bias, region, region, lse, seed_ptr, window, h, 0, 0, threshold, rescale,
                COSINE, SHIFTED, PRECISION, BLOCK,
            )  # fmt: skip
            ds = p * (dp - mean_of(tl.sum(p * dp, axis=1), tl.sum(p, axis=1))[:, None])
            if N == 1:  # one key's weight is one whatever its score
                ds = tl.zeros_like(ds)
            dx = rounded(ds * factor, k.dtype)
            nothing = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            dq = add_product(dx, unit(k, rk, COSINE), nothing, PRECISION)
            dk = input_grad(add_product(tl.trans(dx), unit(q, rq, COSINE), nothing, PRECISION), k, rk, COSINE)
            dv = add_product(tl.trans(rounded(dropped, g.dtype)), g, nothing, PRECISION) * rescale
            store_tokens(grad_qkv_ptr, dk, pixel, real, heads + h, heads, D, BLOCK_D)
            store_tokens(grad_qkv_ptr, dv, pixel, real, 2 * heads + h, heads, D, BLOCK_D)
            if beyond_ptr is not None:
                beyond_k, beyond_v = (
                    add_beyond(beyond_k, dk, real, t < N, BLOCK, BLOCK_D),
                    add_beyond(beyond_v, dv, real, t < N, BLOCK, BLOCK_D),
                )
            if tables_ptr is not None:
                table += ds
            if logits_ptr is not None:
                logit += tl.sum(ds * x, axis=1)
        else:
            delta, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            for step in range(2 * BLOCKS):  # the keys twice: delta is known the second time
                start = step % BLOCKS * BLOCK
                u = start + tl.arange(0, BLOCK)
                other, there, region_u = locate(window, u, H, W, shift_y, shift_x, WH, WW)
                k = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, heads + h, heads, PADS, D, BLOCK_D)
                v = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, 2 * heads + h, heads, PADS, D, BLOCK_D)
                rk = inverse_norm(k, COSINE)
                p, _dropped, dp, _x = weights(
                    q, k, v, g, rq, rk, factor, relative(table_ptr, t, u, h, heads, WH, WW), region, region_u, lse, seed_ptr, window, h,
                    block * BLOCK, start, threshold, rescale, COSINE, SHIFTED, PRECISION, BLOCK,
                )  # fmt: skip
                if step < BLOCKS:
                    delta, total = delta + tl.sum(p * dp, axis=1), total + tl.sum(p, axis=1)
                else:
                    dq = add_piece(dq, rounded(p * (dp - mean_of(delta, total)[:, None]) * factor, k.dtype), unit(k, rk, COSINE), PRECISION)
            tl.store(delta_ptr + flat + t, mean_of(delta, total), mask=t < N)
        dq = input_grad(dq, q, rq, COSINE)
        store_tokens(grad_qkv_ptr, dq, pixel, real, h, heads, D, BLOCK_D)
        if beyond_ptr is not None:
            beyond_q = add_beyond(beyond_q, dq, real, t < N, BLOCK, BLOCK_D)
    row = chunk * BLOCKS + block
    store_beyond(beyond_ptr, beyond_q, row, h, heads, D, BLOCK_D)
    if ONE:
        store_beyond(beyond_ptr, beyond_k, row, heads + h, heads, D, BLOCK_D)
        store_beyond(beyond_ptr, beyond_v, row, 2 * heads + h, heads, D, BLOCK_D)
        store_scores(tables_ptr, logits_ptr, table, logit, chunk, 0, 1, t, t, h, heads, N)


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    qkv_ptr, qkv_bias_ptr, table_ptr, logit_ptr, seed_ptr, grad_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, beyond_ptr,
    H, W, shift_y, shift_x, windows, per, heads, threshold, scale, rescale,
    WH: tl.constexpr, WW: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of keys and values of larger windows."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    COSINE: tl.constexpr = logit_ptr is not None
    block, h, chunk, first, last = place(windows, per, heads, BLOCKS)
    u = block * BLOCK + tl.arange(0, BLOCK)
    factor = factor_of(logit_ptr, h, scale)
    beyond_k, beyond_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for window in range(first, last):
        pixel, real, region_u = locate(window, u, H, W, shift_y, shift_x, WH, WW)
        k = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, u < N, heads + h, heads, PADS, D, BLOCK_D)
        v = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, u < N, 2 * heads + h, heads, PADS, D, BLOCK_D)
        rk = inverse_norm(k, COSINE)
        flat = (h + window * heads).to(tl.int64) * N
        dk, dv = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for start in range(0, N, BLOCK):
            t = start + tl.arange(0, BLOCK)
            other, there, region = locate(window, t, H, W, shift_y, shift_x, WH, WW)
            q = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, t < N, h, heads, PADS, D, BLOCK_D)
            g = load_grad(grad_ptr, other, there, h, heads, D, BLOCK_D)
            rq = inverse_norm(q, COSINE)
            p, dropped, dp = weights(
                q, k, v, g, rq, rk, factor, relative(table_ptr, t, u, h, heads, WH, WW), region, region_u,
                load_lse(lse_ptr + flat + t, t < N), seed_ptr, window, h, start, block * BLOCK, threshold, rescale,
                COSINE, SHIFTED, PRECISION, BLOCK,
            )[:3]  # fmt: skip
            dv = add_piece(dv, tl.trans(rounded(dropped, g.dtype)), g, PRECISION)
            delta = tl.load(delta_ptr + flat + t, mask=t < N, other=0.0)
            dx = rounded(p * (dp - delta[:, None]) * factor, k.dtype)
            dk = add_piece(dk, tl.trans(dx), unit(q, rq, COSINE), PRECISION)
        dk, dv = input_grad(dk, k, rk, COSINE), dv * rescale
        store_tokens(grad_qkv_ptr, dk, pixel, real, heads + h, heads, D, BLOCK_D)
        store_tokens(grad_qkv_ptr, dv, pixel, real, 2 * heads + h, heads, D, BLOCK_D)
        if beyond_ptr is not None:
            beyond_k, beyond_v = (
                add_beyond(beyond_k, dk, real, u < N, BLOCK, BLOCK_D),
                add_beyond(beyond_v, dv, real, u < N, BLOCK, BLOCK_D),
            )
    store_beyond(beyond_ptr, beyond_k, chunk * BLOCKS + block, heads + h, heads, D, BLOCK_D)
    store_beyond(beyond_ptr, beyond_v, chunk * BLOCKS + block, 2 * heads + h, heads, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    qkv_ptr, qkv_bias_ptr, table_ptr, logit_ptr, seed_ptr, grad_ptr, lse_ptr, delta_ptr, tables_ptr, logits_ptr,
    H, W, shift_y, shift_x, windows, per, heads, threshold, scale, rescale,
    WH: tl.constexpr, WW: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of larger windows' table and logit_scale: a program owns a tile of scores."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    COSINE: tl.constexpr = logit_ptr is not None
    tile, h, chunk, first, last = place(windows, per, heads, BLOCKS * BLOCKS)
    row, column = tile // BLOCKS * BLOCK, tile % BLOCKS * BLOCK
    t, u = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    factor, bias = factor_of(logit_ptr, h, scale), relative(table_ptr, t, u, h, heads, WH, WW)
    table, logit = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for window in range(first, last):
        pixel, real, region = locate(window, t, H, W, shift_y, shift_x, WH, WW)
        other, there, region_u = locate(window, u, H, W, shift_y, shift_x, WH, WW)
        q = load_tokens(qkv_ptr, qkv_bias_ptr, pixel, real, t < N, h, heads, PADS, D, BLOCK_D)
        k = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, heads + h, heads, PADS, D, BLOCK_D)
        v = load_tokens(qkv_ptr, qkv_bias_ptr, other, there, u < N, 2 * heads + h, heads, PADS, D, BLOCK_D)
        g = load_grad(grad_ptr, pixel, real, h, heads, D, BLOCK_D)
        flat = (h + window * heads).to(tl.int64) * N
        p, _dropped, dp, x = weights(
            q, k, v, g, inverse_norm(q, COSINE), inverse_norm(k, COSINE), factor, bias, region, region_u,
            load_lse(lse_ptr + flat + t, t < N), seed_ptr, window, h, row, column, threshold, rescale, COSINE, SHIFTED, PRECISION, BLOCK,
        )  # fmt: skip
        ds = p * (dp - tl.load(delta_ptr + flat + t, mask=t < N, other=0.0)[:, None])
        table += ds
        if logits_ptr is not None:
            logit += tl.sum(ds * x, axis=1)
    store_scores(tables_ptr, logits_ptr, table, logit, chunk, tile, BLOCKS * BLOCKS, t, u, h, heads, N)


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(
    tables_ptr, grad_table_ptr, heads, chunks, WH: tl.constexpr, WW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr
):
    """tables [chunks, heads, N, N] -> [(2 * WH - 1) * (2 * WW - 1), heads]: of BLOCK_R relative positions the pairs of each are summed."""
    N: tl.constexpr = WH * WW
    ENTRIES: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    h = tl.program_id(0) % heads
    entry, t = tl.program_id(0) // heads * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)[None, :]
    i = t // WW - (entry // (2 * WW - 1) - (WH - 1))[:, None]
    j = t % WW - (entry % (2 * WW - 1) - (WW - 1))[:, None]
    inside = (t < N) & (i >= 0) & (i < WH) & (j >= 0) & (j < WW) & (entry < ENTRIES)[:, None]
    sums = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for chunk in range(chunks):
        tables = tables_ptr + (h + chunk * heads).to(tl.int64) * (N * N)
        sums += tl.load(tables + (t * N + i * WW + j), mask=inside, other=0.0)
    tl.store(grad_table_ptr + entry * heads + h, tl.sum(sums, axis=1), mask=entry < ENTRIES)


def grad_into(
    grad, qkv, qkv_bias, table, logit_scale, seed, lse, heads, window, shift, scale, dropout_p,
    grad_qkv, grad_qkv_bias, grad_table, grad_logit_scale,
) -> None:  # fmt: skip
    """As pyops::window_attention_grad_into."""
    given = common_arguments(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p)
    N, chunks = window[0] * window[1], given["chunks"]
    blocks = triton.cdiv(N, given["BLOCK"])
    tiles, delta = blocks * blocks, lse
    new = lambda *sizes: torch.empty(sizes, dtype=torch.float32, device=qkv.device)  # noqa: E731
    if blocks > 1:
        delta = new(*lse.shape)
    beyond = new(chunks * blocks, qkv.shape[3]) if grad_qkv_bias is not None and given["PADS"] else None
    tables = new(chunks, heads, N, N) if grad_table is not None else None
    logits = new(chunks * tiles, heads) if grad_logit_scale is not None else None
    given |= {"grad_ptr": grad.contiguous(), "lse_ptr": lse.contiguous(), "delta_ptr": delta, "grad_qkv_ptr": grad_qkv}
    given |= {"beyond_ptr": beyond, "tables_ptr": tables, "logits_ptr": logits, "grad_table_ptr": grad_table}
    with on(qkv):
        launch(rows_kernel, chunks * heads * blocks, given)
        if blocks > 1:
            launch(columns_kernel, chunks * heads * blocks, given)
            if tables is not None or logits is not None:
                launch(scores_kernel, chunks * heads * tiles, given)
        if grad_table is not None:
            block = triton.next_power_of_2(N)
            config = {"BLOCK_T": block, "BLOCK_R": max(1, FOLDED // block), "num_warps": 4}
            launch(fold_kernel, triton.cdiv(grad_table.shape[0], config["BLOCK_R"]) * heads, given | config)
    for to, partials in ((grad_qkv_bias, beyond), (grad_logit_scale, logits)):
        if partials is not None:
            torch.sum(partials, 0, out=to)
        elif to is not None:  # no token is beyond the map
            to.zero_()
