"""Checks of flash_attention's arguments, and their translation into those of `_attention_ops`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyops.ops import _conv_call, _philox
from pyops.ops._attention_reference import Options

_UNBOUNDED = -1


def prepare(
    op, make, query, key, value, attn_bias, is_causal, scale, window, softcap, alibi_slopes, dropout_p, enable_gqa,
    query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, seed,
):  # fmt: skip
    """`make(query, key, value, bias, slopes, spans, seed, options)`, or TypeError or ValueError."""
    ragged = cu_seqlens_q is not None
    _check_kinds(op, query, key, value, ragged)
    query, key, value = _conv_call.autocast(query, key, value)
    if ragged:
        query = query[None] if key is None else query.transpose(0, 1)[None]
        key, value = (t if t is None else t.transpose(0, 1)[None] for t in (key, value))
    B, H, N, M, D = _sizes(op, query, key, value, enable_gqa)
    spans: Tensor | None
    if ragged:
        spans = _ragged_spans(op, cu_seqlens_q, cu_seqlens_k, query_lengths, key_lengths, N, M, key is None, query)
    elif cu_seqlens_k is not None:
        raise ValueError(f"{op}: cu_seqlens_k: expected cu_seqlens_q with it")
    else:
        spans = _padded_spans(op, query_lengths, key_lengths, B, N, M, query)
    sequences = B if spans is None else spans.shape[0]
    bias = _bias(op, attn_bias, query, sequences, H, None if ragged else (N, M))
    if ragged and bias is not None and sequences and _readable(cu_seqlens_q):
        _check_ragged_bias(op, bias, spans)
    slopes = _slopes(op, alibi_slopes, query, sequences, H)
    options = _options(op, is_causal, scale, window, softcap, dropout_p, D)
    return make(query, key, value, bias, slopes, spans, _philox.as_seed(op, seed, query), options)


def _check_kinds(op: str, query, key, value, ragged: bool) -> None:
    _conv_call.check_tensor(op, "query", query, optional=False)
    if query.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{op}: query: expected float32, bfloat16, float16 or float64, got {query.dtype}")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if isinstance(t, Tensor) and (t.is_nested or t.layout != torch.strided):
            raise ValueError(f"{op}: {name}: expected a strided tensor, got {'a nested one' if t.is_nested else t.layout}")
    packed, like = ("[total, 3, H, D]", "[total, H, D]") if ragged else ("[B, N, 3, H, D]", "[B, H, N, D]")
    if (key is None) != (value is None):
        missing = "key" if key is None else "value"
        raise ValueError(f"{op}: {missing}: expected a Tensor beside {'value' if key is None else 'key'}, or neither with a packed query")
    if key is None:
        dims = 4 if ragged else 5
        if query.dim() != dims or query.shape[-3] != 3:
            raise ValueError(f"{op}: query: expected {packed} without key and value, got shape {tuple(query.shape)}")
        return
    for name, t in (("query", query), ("key", key), ("value", value)):
        _conv_call.check_tensor(op, name, t, query, optional=False)
        if t.dim() != (3 if ragged else 4):
            raise ValueError(f"{op}: {name}: expected {like}, got shape {tuple(t.shape)}")
        cast = _conv_call.is_autocast(query.device.type) and torch.float64 not in (t.dtype, query.dtype)  # which stays as it is
        if t.dtype != query.dtype and not cast:
            raise ValueError(f"{op}: {name}: expected query's dtype {query.dtype}, got {t.dtype}")


def _sizes(op: str, query, key, value, enable_gqa: bool) -> tuple[int, ...]:
    if key is None:
        B, N, _, H, D = query.shape
        shapes = ((B, H, N, D),) * 3
    else:
        shapes = tuple(t.shape for t in (query, key, value))
    (B, H, N, D), (Bk, G, M, Dk), (Bv, Gv, Mv, Dv) = shapes
    for name, found, wanted in (("key", (Bk, Dk), (B, D)), ("value", (Bv, Gv, Mv), (B, G, M))):
        if tuple(found) != tuple(wanted):
            dims = "batch and head size" if name == "key" else "batch, heads and length"
            raise ValueError(
                f"{op}: {name}: expected {dims} {tuple(wanted)} as in {'query' if name == 'key' else 'key'}, got {tuple(found)}"
            )
    if D == 0 or Dv == 0 or H == 0:
        raise ValueError(f"{op}: query: expected 1 head and head size or more, got shape {tuple(query.shape)}")
    if G != H and not enable_gqa:
        raise ValueError(f"{op}: key: expected query's {H} heads, got {G}; fewer need enable_gqa=True")
    if G == 0 or H % G:
        raise ValueError(f"{op}: key: expected a number of heads that divides query's {H}, got {G}")
    return B, H, N, M, D


def _integers(op: str, name: str, t, size: int | None, like: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor or None, got {type(t).__name__}")
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name}: expected int32 or int64, got {t.dtype}")
    if t.dim() != 1 or (size is not None and t.shape[0] != size) or (t.shape[0] == 0 and size is None):
        wanted = "[sequences + 1]" if size is None else f"shape ({size},)"
        raise ValueError(f"{op}: {name}: expected {wanted}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name}: expected query's device {like.device}, got {t.device}")
    return t


def _readable(t: Tensor) -> bool:
    """Whether looking at values costs nothing and breaks nothing."""
    return t.is_cpu and type(t) is Tensor and not _conv_call.is_followed()


def _lengths(op: str, name: str, t, B: int, most: int, like: Tensor) -> Tensor:
    if t is None:
        return like.new_full((B,), most, dtype=torch.int32)
    _integers(op, name, t, B, like)
    if _readable(t) and B and (int(t.min()) < 0 or int(t.max()) > most):
        raise ValueError(f"{op}: {name}: expected values from 0 to {most}, got {int(t.min())} to {int(t.max())}")
    return t.clamp(0, most).int()


def _padded_spans(op: str, query_lengths, key_lengths, B: int, N: int, M: int, like: Tensor) -> Tensor | None:
    if query_lengths is None and key_lengths is None:
        return None
    n, m = _lengths(op, "query_lengths", query_lengths, B, N, like), _lengths(op, "key_lengths", key_lengths, B, M, like)
    zero = torch.zeros_like(n)
    return torch.stack([zero, n, zero, m], 1)


def _starts(op: str, name: str, t, total: int, like: Tensor) -> Tensor:
    _integers(op, name, t, None, like)
    if _readable(t) and (int(t[0]) != 0 or int(t[-1]) != total or bool((t.diff() < 0).any())):
        raise ValueError(f"{op}: {name}: expected values that rise from 0 to the total {total}, got {t.tolist()}")
    return t.int()


def _ragged_spans(op: str, starts_q, starts_k, query_lengths, key_lengths, N: int, M: int, packed: bool, like: Tensor) -> Tensor:
    for name, t in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        if t is not None:
            raise ValueError(f"{op}: {name}: expected None beside cu_seqlens_q")
    if packed and starts_k is not None:
        raise ValueError(f"{op}: cu_seqlens_k: expected None with a packed query")
    q = _starts(op, "cu_seqlens_q", starts_q, N, like)
    k = _starts(op, "cu_seqlens_k", starts_k, M, like) if starts_k is not None else _starts(op, "cu_seqlens_q", starts_q, M, like)
    if k.shape != q.shape:
        raise ValueError(f"{op}: cu_seqlens_k: expected cu_seqlens_q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    return torch.stack([q[:-1], q.diff(), k[:-1], k.diff()], 1)


def _bias(op: str, bias, query: Tensor, sequences: int, H: int, extent: tuple[int, int] | None) -> Tensor | None:
    """Four dimensions of one or the whole; extent None: a ragged batch, whose longest sequence only the device knows."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: attn_bias: expected a Tensor or None, got {type(bias).__name__}")
    if bias.dtype not in (*_conv_call.DTYPES, torch.bool):
        raise ValueError(f"{op}: attn_bias: expected float32, bfloat16, float16, float64 or bool, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{op}: attn_bias: expected query's device {query.device}, got {bias.device}")
    wanted = (sequences, H, *(extent or ("n", "m")))
    if not 2 <= bias.dim() <= 4:
        raise ValueError(f"{op}: attn_bias: expected 2 to 4 dimensions that broadcast to {wanted}, got shape {tuple(bias.shape)}")
    found = bias[(None,) * (4 - bias.dim())]
    if any(size not in (1, most) for size, most in zip(found.shape, wanted, strict=True) if not isinstance(most, str)):
        raise ValueError(f"{op}: attn_bias: expected a shape that broadcasts to {wanted}, got {tuple(bias.shape)}")
    return found


def _check_ragged_bias(op: str, bias: Tensor, spans) -> None:
    rows, columns = int(spans[:, 1].max()), int(spans[:, 3].max())
    if any(size != 1 and size < longest for size, longest in zip(bias.shape[2:], (rows, columns), strict=True)):
        raise ValueError(f"{op}: attn_bias: expected {rows} x {columns} or larger for the longest sequences, got shape {tuple(bias.shape)}")


def _slopes(op: str, slopes, query: Tensor, sequences: int, H: int) -> Tensor | None:
    if slopes is None:
        return None
    _conv_call.check_tensor(op, "alibi_slopes", slopes, query)
    if tuple(slopes.shape) not in ((H,), (sequences, H)):
        raise ValueError(f"{op}: alibi_slopes: expected shape ({H},) or ({sequences}, {H}), got {tuple(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes: expected a tensor without gradient; a learnable slope goes into attn_bias")
    return slopes.float().view(-1, H).contiguous()


def number(op: str, name: str, value, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}: expected {low:g} to {high:g}, got {value}")
    return float(value)


def _side(op: str, value) -> int:
    if value is None:
        return _UNBOUNDED
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: window: expected ints of 0 or more, or None, got {value!r}")
    if value < 0:
        raise ValueError(f"{op}: window: expected ints of 0 or more, or None, got {value}")
    return value if value < 2**31 else _UNBOUNDED  # beyond any sequence


def _options(op: str, is_causal, scale, window, softcap, dropout_p, D: int) -> Options:
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal: expected a bool, got {is_causal!r}")
    if window is not None and (not isinstance(window, (tuple, list)) or len(window) != 2):
        raise TypeError(f"{op}: window: expected (left, right) or None, got {window!r}")
    left, right = (_side(op, side) for side in window or (None, None))
    scale = 1 / math.sqrt(D) if scale is None else number(op, "scale", scale, -math.inf, math.inf)
    softcap = 0.0 if softcap is None else number(op, "softcap", softcap, 0.0, math.inf)
    return Options(scale, left, 0 if is_causal else right, softcap, check_dropout(op, dropout_p))


def check_dropout(op: str, dropout_p) -> float:
    value = number(op, "dropout_p", dropout_p, 0.0, 1.0)
    if value == 1.0:
        raise ValueError(f"{op}: dropout_p: expected less than 1, got {dropout_p}")
    return value


def drawn(seed: Tensor | None, dropout_p: float, like: Tensor) -> Tensor | None:
    """The seed that dropout uses: the caller's, or one from PyTorch's generator; None without dropout."""
    if not dropout_p or seed is not None:
        return seed if dropout_p else None
    return _philox.drawn(like)
