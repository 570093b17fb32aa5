"""Attention's gradients, in the terms of pyops/ops/_attention_ops.py: three kernels, each computing its scores again from lse.

    p = exp(score - lse)    dp = dropout(grad value^T)    delta = sum of grad * output - grad_lse    ds = p (dp - delta)
    grad_query = dx key    grad_key = dx^T query    grad_value = dropout(p)^T grad    grad_bias = ds, summed over what it is broadcast over

dx is ds with the soft cap's gradient, times scale.

Tiling: of grad_query a program owns BLOCK_M rows of a head and walks the keys they see; it leaves delta for the others. Of grad_key and
grad_value one owns BLOCK_N keys of a key head and walks the rows that see them, of each query head in turn. Of grad_bias one owns a tile
and walks a share of the sequences and heads that it is broadcast over, and blocks of a broadcast side; PyTorch adds the shares up. No
atomics: sizes alone fix every order.

Floors: the forward's and twice its tensors more; 14*N*M*D flops a head instead of 10 (scores and dp twice), a bias' gradient 4 more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import (
    LOG2E,
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
    rows_seeing,
    scores,
    span,
    store_rows,
    tile_count,
    written,
    zeros,
)
from .common import rounded
from .images import on

BIAS_SIZES = ("sequences", "heads", "rows", "columns", "row_tiles", "column_tiles", "repeats", "shares")
PROGRAMS = 528  # of the bias' gradient, about: four for each multiprocessor of a large GPU


@triton.jit
def load_lse(lse_ptr, inside):
    """In units of log 2; infinite for rows that see nothing, so that their weights are zero."""
    lse = tl.load(lse_ptr, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def score_grad(p, dp, delta, slack, SINGLE: tl.constexpr, CAPPED: tl.constexpr):
    """SINGLE: there is one key, whose weight is one whatever its score; delta is -grad_lse alone then, so that nothing cancels in vain."""
    ds = -p * delta[:, None] if SINGLE else p * (dp - delta[:, None])
    return ds * slack if CAPPED else ds


@triton.jit
def add_columns(
    dq, dq2, q, q2, g, g2, key_ptr, value_ptr, key_n, value_n, i, first, low, high, n, m, s, h, lse, delta,
    bias_ptr, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, rescale, scale, softcap, left, right,
    MASKED: tl.constexpr, SINGLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The rows' gradient after the columns from low to high."""
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k, k2 = load_rows(ahead(key_ptr, start, key_n, UNIT), j < m, key_n, not MASKED, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
        x, slack = scores(
            multiply(q, q2, k, k2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION), i[:, None], j[None, :], n, m, bias_ptr, bias_n, bias_m,
            slopes_ptr, slope, scale, softcap, left, right, CAPPED, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        p = tl.exp2(x - lse[:, None])
        v, v2 = load_rows(ahead(value_ptr, start, value_n, UNIT), j < m, value_n, not MASKED, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
        dp = multiply(g, g2, v, v2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION)
        if seed_ptr is not None:
            dp = tl.where(kept(seed_ptr, s, h, first, start, threshold, BLOCK_M, BLOCK_N), dp * rescale, 0.0)
        ds = score_grad(p, dp, delta, slack, SINGLE, CAPPED)
        dq, dq2 = add_rows(dq, dq2, rounded(ds, k.dtype), k, k2, BLOCK_E, PRECISION)
    return dq, dq2


@triton.jit(do_not_specialize=SIZES)
def grad_query_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, slopes_ptr, spans_ptr, seed_ptr, output_ptr, lse_ptr, grad_ptr, grad_lse_ptr, delta_ptr,
    grad_query_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n, grad_b, grad_h, grad_n,
    grad_query_b, grad_query_h, grad_query_n,
    bias_b, bias_h, bias_n, bias_m, slopes_s, tiles, S, N, M, H, group, left, right, threshold, scale, softcap, rescale,
    SINGLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RAGGED: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta [B, H, N]"""
    b, h, s, first, row, n, column, m = place(spans_ptr, tiles, H, S, N, M, 0, RAGGED, BLOCK_M)
    i = first + tl.arange(0, BLOCK_M)
    real = i < n
    at = row_of(query_ptr, b, h, row + first, query_b, query_h, query_n, UNIT)
    q, q2 = load_rows(at, real, query_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
    at = row_of(grad_ptr, b, h, row + first, grad_b, grad_h, grad_n, UNIT)
    g, g2 = load_rows(at, real, grad_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
    at = row_of(output_ptr, b, h, row + first, output_b, output_h, output_n, UNIT)
    y, y2 = load_rows(at, real, output_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
    if BLOCK_E != 0:
        delta += tl.sum(g2.to(tl.float32) * y2.to(tl.float32), axis=1)
    if SINGLE:
        delta *= 0.0
    flat = (b * H + h) * N + row + i
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + flat, mask=real, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=real)
    lse = load_lse(lse_ptr + flat, real)
    key_ptr = row_of(key_ptr, b, h // group, column, key_b, key_h, key_n, UNIT)
    value_ptr = row_of(value_ptr, b, h // group, column, value_b, value_h, value_n, UNIT)
    slope = 0.0
    if bias_ptr is not None:
        bias_ptr += s.to(tl.int64) * bias_b + h * bias_h
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + s * slopes_s + h)
    low, middle, high = columns_seen(first, n, m, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    dq, dq2 = zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    for masked in tl.static_range(2):
        dq, dq2 = add_columns(
            dq, dq2, q, q2, g, g2, key_ptr, value_ptr, key_n, value_n, i, first, middle if masked else low, high if masked else middle,
            n, m, s, h, lse, delta, bias_ptr, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, rescale, scale, softcap, left, right,
            masked == 1, SINGLE, CAPPED, LEFT, RIGHT, D, UNIT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    r, stored = written(i, first, row, n, N, RAGGED)
    to = row_of(grad_query_ptr, b, h, row + first, grad_query_b, grad_query_h, grad_query_n, UNIT)
    store_rows(to, dq * scale, dq2 * scale, r, stored, grad_query_n, D, UNIT, BLOCK_D, BLOCK_E)


@triton.jit
def add_tile_rows(
    dk, dk2, dv, dv2, k, k2, v, v2, query_ptr, grad_ptr, lse_ptr, delta_ptr, query_n, grad_n, j, first, low, high, n, m, s, h,
    bias_ptr, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, rescale, scale, softcap, left, right,
    SINGLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The columns' gradients after the rows from low to high. Columns beyond m go unmasked: they spoil only what is not stored."""
    for start in range(low, high, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q, q2 = load_rows(ahead(query_ptr, start, query_n, UNIT), i < n, query_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
        x, slack = scores(
            multiply(q, q2, k, k2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION), i[:, None], j[None, :], n, m, bias_ptr, bias_n, bias_m,
            slopes_ptr, slope, scale, softcap, left, right, CAPPED, LEFT, RIGHT, LEFT or RIGHT,
        )  # fmt: skip
        p = tl.exp2(x - load_lse(lse_ptr + i, i < n)[:, None])
        g, g2 = load_rows(ahead(grad_ptr, start, grad_n, UNIT), i < n, grad_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
        dp = multiply(g, g2, v, v2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION)
        weights = p
        if seed_ptr is not None:
            keep = kept(seed_ptr, s, h, start, first, threshold, BLOCK_M, BLOCK_N)
            dp, weights = tl.where(keep, dp * rescale, 0.0), tl.where(keep, p, 0.0)
        dv, dv2 = add_rows(dv, dv2, tl.trans(rounded(weights, g.dtype)), g, g2, BLOCK_E, PRECISION)
        ds = score_grad(p, dp, tl.load(delta_ptr + i, mask=i < n, other=0.0), slack, SINGLE, CAPPED)
        dk, dk2 = add_rows(dk, dk2, tl.trans(rounded(ds, q.dtype)), q, q2, BLOCK_E, PRECISION)
    return dk, dk2, dv, dv2


@triton.jit(do_not_specialize=SIZES)
def grad_key_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, slopes_ptr, spans_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr, grad_key_ptr, grad_value_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, grad_b, grad_h, grad_n,
    grad_key_b, grad_key_h, grad_key_n, grad_value_b, grad_value_h, grad_value_n,
    bias_b, bias_h, bias_n, bias_m, slopes_s, tiles, S, N, M, H, group, left, right, threshold, scale, softcap, rescale,
    SINGLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RAGGED: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of key and value."""
    b, head, s, first, row, n, column, m = place(spans_ptr, tiles, H // group, S, N, M, 2, RAGGED, BLOCK_N)
    j = first + tl.arange(0, BLOCK_N)
    real = j < m
    at = row_of(key_ptr, b, head, column + first, key_b, key_h, key_n, UNIT)
    k, k2 = load_rows(at, real, key_n, False, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
    at = row_of(value_ptr, b, head, column + first, value_b, value_h, value_n, UNIT)
    v, v2 = load_rows(at, real, value_n, False, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
    low, high = rows_seeing(first, n, m, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    dk, dk2 = zeros(BLOCK_N, BLOCK_D, BLOCK_E)
    dv, dv2 = zeros(BLOCK_N, BLOCK_D, BLOCK_E)
    for member in range(group):
        h = head * group + member
        query = row_of(query_ptr, b, h, row, query_b, query_h, query_n, UNIT)
        grad = row_of(grad_ptr, b, h, row, grad_b, grad_h, grad_n, UNIT)
        flat = (b * H + h) * N + row
        bias, slope = bias_ptr, 0.0
        if bias_ptr is not None:
            bias += s.to(tl.int64) * bias_b + h * bias_h
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + s * slopes_s + h)
        dk, dk2, dv, dv2 = add_tile_rows(
            dk, dk2, dv, dv2, k, k2, v, v2, query, grad, lse_ptr + flat, delta_ptr + flat, query_n, grad_n, j, first, low, high, n, m, s, h,
            bias, bias_n, bias_m, slopes_ptr, slope, seed_ptr, threshold, rescale, scale, softcap, left, right,
            SINGLE, CAPPED, LEFT, RIGHT, D, UNIT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    r, stored = written(j, first, column, m, M, RAGGED)
    dk, dk2 = tl.where(real[:, None], dk, 0.0) * scale, tl.where(real[:, None], dk2, 0.0) * scale
    dv, dv2 = tl.where(real[:, None], dv, 0.0) * rescale, tl.where(real[:, None], dv2, 0.0) * rescale
    to = row_of(grad_key_ptr, b, head, column + first, grad_key_b, grad_key_h, grad_key_n, UNIT)
    store_rows(to, dk, dk2, r, stored, grad_key_n, D, UNIT, BLOCK_D, BLOCK_E)
    to = row_of(grad_value_ptr, b, head, column + first, grad_value_b, grad_value_h, grad_value_n, UNIT)
    store_rows(to, dv, dv2, r, stored, grad_value_n, D, UNIT, BLOCK_D, BLOCK_E)


@triton.jit(do_not_specialize=[*SIZES, *BIAS_SIZES])
def grad_bias_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, slopes_ptr, spans_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr, partial_ptr,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, grad_b, grad_h, grad_n,
    bias_b, bias_h, bias_n, bias_m, slopes_s, S, N, M, H, group, left, right, threshold, scale, softcap, rescale,
    sequences, heads, rows, columns, row_tiles, column_tiles, repeats, shares,
    SINGLE: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RAGGED: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr, ALL_HEADS: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [shares, sequences, heads, rows, columns], the last four the bias' sizes; ALL_ are those that it is broadcast over, and
    `repeats` the sequences and heads among them."""
    program = tl.program_id(0)
    column_tile, program = program % column_tiles, program // column_tiles
    row_tile, program = program % row_tiles, program // row_tiles
    share, own = program % shares, program // shares  # own: the bias' sequence and head
    size = tl.cdiv(repeats, shares)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for repeat in range(share * size, tl.minimum(share * size + size, repeats)):
        h = tl.cast(repeat % H if ALL_HEADS else own % heads, tl.int64)
        s = (repeat // H if ALL_HEADS else repeat) if ALL_SEQUENCES else own // heads
        b = tl.cast(s * 0 if RAGGED else s, tl.int64)
        row, n, column, m = span(spans_ptr, s, N, M)
        flat = (b * H + h) * N + row
        slope = 0.0
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + s * slopes_s + h)
        bias = bias_ptr + tl.cast(s, tl.int64) * bias_b + h * bias_h
        top, last = row_tile * BLOCK_M, n
        if not ALL_ROWS:
            last = tl.minimum(top + BLOCK_M, n)
        for first in range(top, last, BLOCK_M):
            i = first + tl.arange(0, BLOCK_M)
            at = row_of(query_ptr, b, h, row + first, query_b, query_h, query_n, UNIT)
            q, q2 = load_rows(at, i < n, query_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
            at = row_of(grad_ptr, b, h, row + first, grad_b, grad_h, grad_n, UNIT)
            g, g2 = load_rows(at, i < n, grad_n, False, D, UNIT, BLOCK_M, BLOCK_D, BLOCK_E)
            lse, delta = load_lse(lse_ptr + flat + i, i < n), tl.load(delta_ptr + flat + i, mask=i < n, other=0.0)
            low, high = columns_seen(first, n, m, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)[::2]
            if not ALL_COLUMNS:
                low, high = tl.maximum(low, column_tile * BLOCK_N), tl.minimum(high, column_tile * BLOCK_N + BLOCK_N)
            for start in range(low, high, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                at = row_of(key_ptr, b, h // group, column + start, key_b, key_h, key_n, UNIT)
                k, k2 = load_rows(at, j < m, key_n, False, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
                at = row_of(value_ptr, b, h // group, column + start, value_b, value_h, value_n, UNIT)
                v, v2 = load_rows(at, j < m, value_n, False, D, UNIT, BLOCK_N, BLOCK_D, BLOCK_E)
                x, slack = scores(
                    multiply(q, q2, k, k2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION), i[:, None], j[None, :], n, m, bias, bias_n, bias_m,
                    slopes_ptr, slope, scale, softcap, left, right, CAPPED, LEFT, RIGHT, True,
                )  # fmt: skip
                dp = multiply(g, g2, v, v2, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION)
                if seed_ptr is not None:
                    dp = tl.where(kept(seed_ptr, s, h, first, start, threshold, BLOCK_M, BLOCK_N), dp * rescale, 0.0)
                sums += score_grad(tl.exp2(x - lse[:, None]), dp, delta, slack, SINGLE, False)
    i, j = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    to = partial_ptr + ((share * sequences + own // heads).to(tl.int64) * heads + own % heads) * rows * columns
    if ALL_ROWS and ALL_COLUMNS:
        tl.store(to, tl.sum(tl.sum(sums, axis=1), axis=0))
    elif ALL_ROWS:
        tl.store(to + j, tl.sum(sums, axis=0), mask=j < columns)
    elif ALL_COLUMNS:
        tl.store(to + i, tl.sum(sums, axis=1), mask=i < rows)
    else:
        tl.store(to + i.to(tl.int64)[:, None] * columns + j[None, :], sums, mask=(i < rows)[:, None] & (j < columns)[None, :])


def attention_grad_into(
    grad, grad_lse, query, key, value, bias, slopes, spans, seed, output, lse, scale, left, right, softcap, dropout_p,
    grad_query, grad_key, grad_value, grad_bias,
) -> None:  # fmt: skip
    """As pyops::attention_grad_into."""
    to = (grad_query, grad_key, grad_value)
    written = [t if t.stride(-1) == 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in to]
    grad, query, key, value, output = (readable(t) for t in (grad, query, key, value, output))
    tensors = {"query": query, "key": key, "value": value, "output": output, "grad": grad}
    tensors |= dict(zip(("grad_query", "grad_key", "grad_value"), written, strict=True))
    given = common_arguments(query, key, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p, tensors.values())
    (B, H, N, D), (G, M) = query.shape, key.shape[1:3]
    delta = torch.empty(B, H, N, dtype=torch.float32, device=query.device)
    given |= {"lse_ptr": lse.contiguous(), "delta_ptr": delta, "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous()}
    given |= {"SINGLE": M == 1}
    if given["RAGGED"]:  # rows of no sequence have no tile
        for t in written:
            t.zero_()
    with on(query):
        for kernel, heads, size, side in ((grad_query_kernel, H, N, "BLOCK_M"), (grad_key_kernel, G, M, "BLOCK_N")):
            config = launch_config(kernel, N, M, D, query.dtype)
            tiles = tile_count(size, given, config[side])
            if B and tiles and given["S"]:
                _launch(kernel, B * heads * tiles, given | config | {"tiles": tiles}, tensors)
        if grad_bias is not None:
            _grad_bias(grad_bias, given | launch_config(grad_bias_kernel, N, M, D, query.dtype), tensors)
    for t, found in zip(to, written, strict=True):
        if t is not found:
            t.copy_(found)


def _launch(kernel, programs: int, given: dict, tensors: dict[str, Tensor]) -> None:
    arguments = given | named(tensors, given["UNIT"])
    kernel[(programs,)](**{name: value for name, value in arguments.items() if name in kernel.arg_names or name.startswith("num_")})


def _grad_bias(grad_bias: Tensor, given: dict, tensors: dict[str, Tensor]) -> None:
    sequences, heads, rows, columns = grad_bias.shape
    whole = {f"ALL_{name}": size == 1 for name, size in zip(("SEQUENCES", "HEADS", "ROWS", "COLUMNS"), grad_bias.shape, strict=True)}
    repeats = (given["S"] if whole["ALL_SEQUENCES"] else 1) * (given["H"] if whole["ALL_HEADS"] else 1)
    tiles = triton.cdiv(rows, given["BLOCK_M"]), triton.cdiv(columns, given["BLOCK_N"])
    programs = sequences * heads * tiles[0] * tiles[1]
    if not programs or not repeats:
        grad_bias.zero_()
        return
    shares = max(1, min(repeats, PROGRAMS // programs))
    partial = grad_bias[None] if shares == 1 else grad_bias.new_empty(shares, *grad_bias.shape)
    sizes = dict(zip(BIAS_SIZES, (sequences, heads, rows, columns, *tiles, repeats, shares), strict=True))
    _launch(grad_bias_kernel, programs * shares, given | sizes | whole | {"partial_ptr": partial}, tensors)
    if shares > 1:
        torch.sum(partial, 0, out=grad_bias)


def launch_config(kernel, N: int, M: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time tile: fixed by sizes and dtype, so that a call has one binary and one result."""
    multiplied, of_rows, stages = precision(dtype), kernel is grad_query_kernel, 2
    if dtype == torch.float32 and multiplied == "ieee":
        rows, columns, warps, stages = (32, 32, 8, 3 if D <= 64 else 2) if D <= 128 else (16, 16, 8, 2)
    elif D <= 64:
        rows, columns, warps = (64, 32, 4) if of_rows else (32, 64, 4)
    else:
        rows, columns, warps = ((64, 64, 8) if of_rows else (32, 64, 8)) if D <= 128 else (32, 32, 8)
    blocks = {"BLOCK_M": block_of(N, rows), "BLOCK_N": block_of(M, columns)}
    return {"PRECISION": multiplied, **blocks, "num_warps": warps, "num_stages": stages}
