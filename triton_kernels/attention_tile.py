"""What attention's kernels share: a program's place, rows of a head, the scores of a tile, and how a call is handed over.

Rows and columns are numbered i and j within their sequence. A tile of scores is [BLOCK_M, BLOCK_N], or its transpose where keys own the
program: functions take i and j shaped so that they broadcast to either. Scores are in units of log 2, for exp2.

A row of D values is read in two pieces of BLOCK_D and BLOCK_E (0: none), powers of two, where that pads much less than one: 80 = 64 + 16.
Strides come in UNITs, so that their alignment is known. Offsets are 64 bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import tanh
from .images import store_image
from .pointwise_conv import add_product

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
CHUNK = tl.constexpr(128)  # sequences whose tiles are counted at once
ROUNDS = tl.constexpr(7)  # of Philox
TENSORS = ("query", "key", "value", "output", "grad", "grad_query", "grad_key", "grad_value")
STRIDES = [f"{tensor}_{dim}" for tensor in TENSORS for dim in "bhn"]
SIZES = [*STRIDES, "bias_b", "bias_h", "slopes_s", "tiles", "S", "N", "M", "H", "group", "left", "right", "threshold"]


@triton.jit
def clamp(x, most):
    return tl.minimum(tl.maximum(x, 0), most)


@triton.jit
def span(spans_ptr, s, N, M):
    """(first row, rows, first column, columns) of a sequence, within the tensors."""
    if spans_ptr is None:
        return N * 0, N, M * 0, M
    else:
        row, column = clamp(tl.load(spans_ptr + 4 * s), N), clamp(tl.load(spans_ptr + 4 * s + 2), M)
        return row, clamp(tl.load(spans_ptr + 4 * s + 1), N - row), column, clamp(tl.load(spans_ptr + 4 * s + 3), M - column)


@triton.jit
def find_tile(spans_ptr, tile, S, size, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, or S or more beyond the last; tile within it) of the tile's number in a ragged batch, counted from the spans."""
    number, begin, total = 0, 0, 0
    for start in range(0, S, CHUNK):
        s = start + tl.arange(0, CHUNK)
        first = clamp(tl.load(spans_ptr + 4 * s + SIDE, mask=s < S, other=0), size)
        tiles = tl.cdiv(clamp(tl.load(spans_ptr + 4 * s + SIDE + 1, mask=s < S, other=0), size - first), BLOCK)
        ends = total + tl.cumsum(tiles, 0)
        before = (ends <= tile) & (s < S)
        number += tl.sum(before.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(before, ends, 0), 0))
        total += tl.sum(tiles, 0)
    return number, tile - begin


@triton.jit
def place(spans_ptr, tiles, heads, S, N, M, SIDE: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head, sequence, the tile's first row (SIDE 2: column) within it, and its span). Last tiles first: causal ones are longest."""
    program = tl.program_id(0)
    tile, head, batch = tiles - 1 - program % tiles, (program // tiles % heads).to(tl.int64), program // tiles // heads
    if RAGGED:
        found, tile = find_tile(spans_ptr, tile, S, M if SIDE else N, SIDE, BLOCK)
        s = tl.minimum(found, S - 1)
        row, n, column, m = span(spans_ptr, s, N, M)
        return batch.to(tl.int64), head, s, tile * BLOCK, row, tl.where(found < S, n, 0), column, tl.where(found < S, m, 0)
    else:
        row, n, column, m = span(spans_ptr, batch, N, M)
        return batch.to(tl.int64), head, batch, tile * BLOCK, row, n, column, m


@triton.jit
def written(i, first, row, n, N, RAGGED: tl.constexpr):
    """(rows of the tensor less that of the tile, which of them are written). Those before a padded sequence are numbered after those beyond
    it, so that its tiles write zeros to all; a ragged batch has none of its own."""
    if RAGGED:
        return (i - first).to(tl.int64), i < n
    else:
        return (i - first - tl.where(row + i >= N, N, 0)).to(tl.int64), i < N


@triton.jit
def row_of(ptr, b, h, n, stride_b, stride_h, stride_n, UNIT: tl.constexpr):
    return ptr + (b * stride_b + h * stride_h + n.to(tl.int64) * stride_n) * UNIT


@triton.jit
def ahead(ptr, rows, stride_n, UNIT: tl.constexpr):
    return ptr + rows * (stride_n.to(tl.int64) * UNIT)


@triton.jit
def piece(r, stride_n, UNIT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """(offsets, columns) of a piece of rows r.  # [BLOCK, WIDTH], [1, WIDTH]"""
    d = FIRST + tl.arange(0, WIDTH)[None, :]
    return (r.to(tl.int64) * stride_n * UNIT)[:, None] + d, d


@triton.jit
def load_piece(ptr, inside, offsets, d, D: tl.constexpr, PADDED: tl.constexpr, ALL: tl.constexpr):
    if ALL and not PADDED:
        return tl.load(ptr + offsets)
    elif ALL:
        return tl.load(ptr + offsets, mask=d < D, other=0.0)
    elif not PADDED:
        return tl.load(ptr + offsets, mask=inside[:, None], other=0.0)
    else:
        return tl.load(ptr + offsets, mask=inside[:, None] & (d < D), other=0.0)


@triton.jit
def load_rows(
    ptr, inside, stride_n,
    ALL: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Both pieces of BLOCK rows from ptr on, zeros where not inside; ALL: all are.  # [BLOCK, BLOCK_D], [BLOCK, BLOCK_E]"""
    r = tl.arange(0, BLOCK)
    offsets, d = piece(r, stride_n, UNIT, 0, BLOCK_D)
    a = load_piece(ptr, inside, offsets, d, D, BLOCK_D > D, ALL)
    if BLOCK_E == 0:
        return a, a
    else:
        offsets, d = piece(r, stride_n, UNIT, BLOCK_D, BLOCK_E)
        return a, load_piece(ptr, inside, offsets, d, D, BLOCK_D + BLOCK_E > D, ALL)


@triton.jit
def store_rows(ptr, a, b, r, inside, stride_n, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Both pieces to rows r from ptr on."""
    offsets, d = piece(r, stride_n, UNIT, 0, BLOCK_D)
    store_image(ptr + offsets, a, inside[:, None] & (d < D))
    if BLOCK_E != 0:
        offsets, d = piece(r, stride_n, UNIT, BLOCK_D, BLOCK_E)
        store_image(ptr + offsets, b, inside[:, None] & (d < D))


@triton.jit
def zeros(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums of both pieces; the second of any width where there is none, since nothing is added to it."""
    return tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_E if BLOCK_E else 16], tl.float32)


@triton.jit
def multiply(a, a2, b, b2, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T of rows in two pieces.  # [ROWS, COLUMNS]"""
    x = add_product(a, tl.trans(b), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    if BLOCK_E != 0:
        x = add_product(a2, tl.trans(b2), x, PRECISION)
    return x


@triton.jit
def add_piece(sums, weights, values, PRECISION: tl.constexpr):
    """sums + weights @ values. In fp32 each block is summed apart: one sequence as long as the keys would lose digits."""
    if values.dtype == tl.float32 and PRECISION == "ieee":
        return sums + add_product(weights, values, tl.zeros_like(sums), PRECISION)
    else:
        return add_product(weights, values, sums, PRECISION)


@triton.jit
def add_rows(sums, sums2, weights, values, values2, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr):
    sums = add_piece(sums, weights, values, PRECISION)
    if BLOCK_E != 0:
        sums2 = add_piece(sums2, weights, values2, PRECISION)
    return sums, sums2


@triton.jit
def scores(
    products, i, j, n, m, bias_ptr, bias_n, bias_m, slopes_ptr, slope, scale, softcap, left, right,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(scores, what the soft cap's gradient multiplies). bias_ptr and slope are the head's; -inf beyond m and what a window hides, where
    MASKED: else nothing is."""
    slack = products
    if CAPPED:
        t = tanh(products * (scale / softcap))
        x = t * (softcap * LOG2E)
        slack = 1.0 - t * t
    else:
        x = products * (scale * LOG2E)
    if slopes_ptr is not None:
        x -= slope * LOG2E * tl.abs(i + (m - n) - j).to(tl.float32)
    if bias_ptr is not None:
        at = bias_ptr + (i.to(tl.int64) * bias_n + j.to(tl.int64) * bias_m)
        bias = tl.load(at, mask=(i < n) & (j < m), other=0)
        if bias_ptr.dtype.element_ty == tl.uint8:
            x = tl.where(bias != 0, x, float("-inf"))
        else:
            x += bias.to(tl.float32) * LOG2E
    if MASKED:
        x = tl.where(j < m, x, float("-inf"))
        if LEFT:
            x = tl.where(j - i - (m - n) >= -left, x, float("-inf"))
        if RIGHT:
            x = tl.where(j - i - (m - n) <= right, x, float("-inf"))
    return x, slack


@triton.jit
def kept(seed_ptr, s, h, row, column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which scores dropout keeps, as pyops/ops/_philox.py says: four neighbouring columns share a block of random words.
    # [BLOCK_M, BLOCK_N] from (row, column) on, a multiple of four"""
    i, block = row + tl.arange(0, BLOCK_M), column // 4 + tl.arange(0, BLOCK_N // 4)
    i, block = tl.broadcast(i[:, None], block[None, :])
    h, s = (i * 0 + h).to(tl.int32), (i * 0 + s).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), block, i, h, s, n_rounds=ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # of [.., .., k, l] word 2 * k + l
    return tl.reshape(words, [BLOCK_M, BLOCK_N]) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def columns_seen(first, n, m, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, end of those that need no mask, end) of the columns that a block of rows sees, the first two multiples of BLOCK_N."""
    last = tl.minimum(first + BLOCK_M, n) - 1
    low, high, full = m * 0, m, m
    if RIGHT:
        high = clamp(last + (m - n) + right + 1, m)
        full = clamp(first + (m - n) + right + 1, m)
    if LEFT:
        low = clamp(first + (m - n) - left, m) // BLOCK_N * BLOCK_N
        full = low
    high = tl.where(last < first, low, high)
    return low, tl.maximum(low, tl.minimum(full, high) // BLOCK_N * BLOCK_N), high


@triton.jit
def rows_seeing(first, n, m, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, a multiple of BLOCK_M; end) of the rows that see a block of columns."""
    last = tl.minimum(first + BLOCK_N, m) - 1
    low, high = n * 0, n
    if RIGHT:
        low = clamp(first - (m - n) - right, n) // BLOCK_M * BLOCK_M
    if LEFT:
        high = clamp(last - (m - n) + left + 1, n)
    return low, tl.where(last < first, low, high)


def head_pieces(D: int) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_E): two where a quarter of one's power of two and more would be padding."""
    whole = max(16, triton.next_power_of_2(D))
    rest = max(16, triton.next_power_of_2(max(1, D - whole // 2)))
    return (whole // 2, rest) if whole > 32 and rest <= whole // 4 else (whole, 0)


def strides(t: Tensor, unit: int) -> list[int]:
    """Of batch, head and row; nothing is stepped over where there is one."""
    return [stride // unit if size > 1 else 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]


def named(tensors: dict[str, Tensor], unit: int) -> dict[str, Tensor | int]:
    """A kernel's pointers and strides."""
    steps = {f"{name}_{dim}": s for name, t in tensors.items() for dim, s in zip("bhn", strides(t, unit), strict=True)}
    return {f"{name}_ptr": t for name, t in tensors.items()} | steps


def readable(t: Tensor | None) -> Tensor | None:
    """Itself where a row's elements are neighbours, else a copy."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def keep_threshold(p: float) -> int:
    """What a random word must reach, as 32 signed bits."""
    word = min(round(p * 2**32), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


def common_arguments(query, key, bias, slopes, spans, seed, scale, left, right, softcap, dropout_p, tensors) -> dict:
    """What every kernel takes, by name. tensors: those [B, H, N, D] whose strides they are given."""
    (B, H, N, D), M = query.shape, key.shape[2]
    unit = 8 if all(stride % 8 == 0 for t in tensors for stride in strides(t, 1)) else 1
    if bias is not None:
        bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
        bias_strides = [stride if size > 1 else 0 for size, stride in zip(bias.shape, bias.stride(), strict=True)]
    else:
        bias_strides = [0] * 4
    BLOCK_D, BLOCK_E = head_pieces(D)
    return {
        "bias_ptr": bias, "slopes_ptr": None if slopes is None else slopes.contiguous(),
        "spans_ptr": None if spans is None else spans.contiguous(), "seed_ptr": seed if dropout_p else None,
        **dict(zip(("bias_b", "bias_h", "bias_n", "bias_m"), bias_strides, strict=True)),
        "slopes_s": H if slopes is not None and slopes.shape[0] > 1 else 0,
        "S": B if spans is None else spans.shape[0], "N": N, "M": M, "H": H, "group": H // key.shape[1],
        "scale": scale, "softcap": softcap, "left": min(left, N + M), "right": min(right, N + M),
        "threshold": keep_threshold(dropout_p), "rescale": 1 / (1 - dropout_p),
        "CAPPED": softcap > 0, "LEFT": left >= 0, "RIGHT": right >= 0, "RAGGED": spans is not None and B == 1,
        "D": D, "UNIT": unit, "BLOCK_D": BLOCK_D, "BLOCK_E": BLOCK_E,
    }  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """Of fp32 products: torch's own switch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_count(size: int, given: dict, block: int) -> int:
    """Of a head: in a ragged batch at most, since only the device knows the lengths."""
    return size // block + min(given["S"], size) if given["RAGGED"] else triton.cdiv(size, block)


def block_of(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))
