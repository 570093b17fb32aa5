"""Attention's forward kernel, in the terms of pyops/ops/_attention_ops.py.

    output[i] = dropout(softmax(score[i, :])) value      lse[i] = log(sum of exp(score[i, :]))

query, output [B, H, N, D], key and value [B, H_k, M, D], lse [B, H, N].

Tiling: a program owns BLOCK_M rows of a head and walks the keys they see in blocks of BLOCK_N, with the largest score and the sum of
exponentials so far. Blocks in which a window hides nothing go without masks; those that no row sees are not read. The tiles of a ragged
batch are counted from the spans by each program. Tensor cores multiply 16 bits, and fp32 where PyTorch's switch allows tf32; softmax
and sums are fp32.

Floors: query, key and value read once (keys again from L2 by each block of rows), output written once; 4*N*M*D flops and N*M exponentials
a head, of the scores that are seen.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .attention_backward import attention_grad_into as attention_grad_into
from .attention_tile import (
    LN2,
    SIZES,
    add_rows,
    ahead,
    block_of,
    columns_seen,
    common_arguments,
    kept,
    load_rows,
    multiply,
    named,
    place,
    precision,
    readable,
    row_of,
    scores,
    store_rows,
    tile_count,
    written,
    zeros,
)
from .common import rounded
from .images import on


@triton.jit
def attend(
    sums, sums2, most, total, q, q2, key_ptr, value_ptr, key_n, value_n, i, first, low, high, n, m, s, h,
    bias_ptr, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, scale, softcap, left, right,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The state of softmax after the columns from low to high."""
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k, k2 = load_rows(ahead(key_ptr, start, key_n, UNIT), j < m, key_n, not MASKED, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
        x = scores(
            multiply(q, q2, k, k2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION), i[:, None], j[None, :], n, m, bias_ptr, bias_n, bias_m,
            slopes_ptr, slope, scale, softcap, left, right, CAPPED, LEFT, RIGHT, MASKED,
        )[0]  # fmt: skip
        above = tl.maximum(most, tl.max(x, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet
        shrink = tl.exp2(most - base)
        p = tl.exp2(x - base[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        most = above
        if seed_ptr is not None:
            p = tl.where(kept(seed_ptr, s, h, first, start, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v, v2 = load_rows(ahead(value_ptr, start, value_n, UNIT), j < m, value_n, not MASKED, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
        p = rounded(p, v.dtype)
        sums, sums2 = add_rows(sums * shrink[:, None], sums2 * shrink[:, None], p, v, v2, BLOCK_E, PRECISION)
    return sums, sums2, most, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, slopes_ptr, spans_ptr, seed_ptr, output_ptr, lse_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n,
    bias_b, bias_h, bias_n, bias_m, slopes_s, tiles, S, N, M, H, group, left, right, threshold, scale, softcap, rescale,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RAGGED: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`rescale` is of what dropout keeps."""
    b, h, s, first, row, n, column, m = place(spans_ptr, tiles, H, S, N, M, 0, RAGGED, BLOCK_M)
    i = first + tl.arange(0, BLOCK_M)
    real = i < n
    q, q2 = load_rows(
        row_of(query_ptr, b, h, row + first, query_b, query_h, query_n, UNIT), real, query_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E
    )
    key_ptr = row_of(key_ptr, b, h // group, column, key_b, key_h, key_n, UNIT)
    value_ptr = row_of(value_ptr, b, h // group, column, value_b, value_h, value_n, UNIT)
    slope = 0.0
    if bias_ptr is not None:
        bias_ptr += s.to(tl.int64) * bias_b + h * bias_h
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + s * slopes_s + h)
    low, middle, high = columns_seen(first, n, m, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    sums, sums2 = zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    most, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for masked in tl.static_range(2):
        sums, sums2, most, total = attend(
            sums, sums2, most, total, q, q2, key_ptr, value_ptr, key_n, value_n, i, first,
            middle if masked else low, high if masked else middle, n, m, s, h,
            bias_ptr, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, scale, softcap, left, right,
            masked == 1, CAPPED, LEFT, RIGHT, D, UNIT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    alive = real & (total > 0.0)
    total = tl.where(alive, total, 1.0)
    share = tl.where(alive, rescale / total, 0.0)[:, None]
    r, stored = written(i, first, row, n, N, RAGGED)
    to = row_of(output_ptr, b, h, row + first, output_b, output_h, output_n, UNIT)
    store_rows(to, sums * share, sums2 * share, r, stored, output_n, D, UNIT, BLOCK_D, BLOCK_E)
    lse = tl.where(alive, (most + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + (b * H + h) * N + row + first + r, lse, mask=stored)


def attention_into(query, key, value, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p, output, lse) -> None:
    """As pyops::attention_into."""
    written = output if output.stride(-1) == 1 else torch.empty(output.shape, dtype=output.dtype, device=output.device)
    tensors: dict[str, Any] = {"query": readable(query), "key": readable(key), "value": readable(value), "output": written}
    given = common_arguments(query, key, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p, tensors.values())
    if given["RAGGED"]:  # rows of no sequence have no tile
        written.zero_(), lse.fill_(float("-inf"))
    (B, H, N, D), M = query.shape, key.shape[2]
    config = launch_config(N, M, D, query.dtype)
    tiles = tile_count(N, given, config["BLOCK_M"])
    if B and tiles and given["S"]:
        with on(query):
            forward_kernel[(B * H * tiles,)](lse_ptr=lse, tiles=tiles, **named(tensors, given["UNIT"]), **given, **config)
    if written is not output:
        output.copy_(written)


def launch_config(N: int, M: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time tile: fixed by sizes and dtype, so that a call has one binary and one result."""
    multiplied = precision(dtype)
    if dtype == torch.float32 and multiplied == "ieee":
        rows, columns, warps = (64, 32, 8) if D <= 64 else (32, 32, 8) if D <= 128 else (16, 16, 8)
    else:
        rows, columns, warps = (128, 64 if D <= 64 else 32, 8) if D <= 128 else (64, 32, 8)
    rows = block_of(N, rows)
    return {
        "PRECISION": multiplied, "BLOCK_M": rows, "BLOCK_N": block_of(M, columns), "num_warps": 4 if rows < 64 else warps, "num_stages": 2,
    }  # fmt: skip
