"""Attention modules: torch's MultiheadAttention and a vision transformer's Attention on `flash_attention`, and a cache for decoding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyops.nn._derived import Keeps, has_hooks
from pyops.nn.linear import run_packed
from pyops.ops import _attention_reference, _conv_call
from pyops.ops.flash_attention import flash_attention


class KeyValueCache:
    """What one attention module has seen while it decodes step by step; `new_cache` of the modules makes one that fits.

    ``key`` and ``value`` are buffers ``[B, H, max_length, D]``, the first ``length`` positions of which are written. ``memory`` holds the
    keys and values ``[B, H, M, D]`` of a cross-attention's source once they are projected. For inference: it carries no gradients.
    """

    def __init__(self, batch_size: int, num_heads: int, max_length: int, head_dim: int, device=None, dtype=None):
        shape = (batch_size, num_heads, max_length, head_dim)
        for name, size in zip(("batch_size", "num_heads", "max_length", "head_dim"), shape, strict=True):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"KeyValueCache: {name}: expected an int, got {size!r}")
            if size < 1:
                raise ValueError(f"KeyValueCache: {name}: expected 1 or more, got {size}")
        self.key = torch.empty(shape, device=device, dtype=dtype)
        self.value = torch.empty_like(self.key)
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    @property
    def max_length(self) -> int:
        return self.key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``[B, H, n, D]`` behind what is there; all keys and values so far, as views of the buffers.

        Raises ValueError where they do not fit, RuntimeError where they ask for gradients.
        """
        _refuse_gradients(key, value)
        B, H, most, D = self.key.shape
        n = key.shape[2]
        for name, t in (("key", key), ("value", value)):
            if tuple(t.shape) != (B, H, n, D):
                raise ValueError(f"KeyValueCache: {name}: expected shape {(B, H, n, D)}, got {tuple(t.shape)}")
        end = self.length + n
        if end > most:
            raise ValueError(f"KeyValueCache: {n} positions after {self.length} are more than max_length {most}")
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def reset(self) -> None:
        """Forgets everything, the memory too; the buffers stay."""
        self.length, self.memory = 0, None

    def reorder(self, index: Tensor, memory: bool = True) -> None:
        """Row b becomes what row ``index[b]`` was, as beam search asks for; an index of another length changes the batch size.

        ``memory=False`` leaves the memory where it is: for rows that change places only with rows of the same source. Raises ValueError
        where they would then be more or fewer than the memory's.
        """
        B, H, most, D = self.key.shape
        if not memory and self.memory is not None and len(index) != B:
            raise ValueError(f"KeyValueCache: index: expected {B} rows, as many as the memory that stays, got {len(index)}")
        for name in ("key", "value"):
            buffer = getattr(self, name)
            rows = buffer[:, :, : self.length].index_select(0, index)
            if rows.shape[0] != B:
                buffer = buffer.new_empty(rows.shape[0], H, most, D)
                setattr(self, name, buffer)
            buffer[:, :, : self.length] = rows
        if memory and self.memory is not None:
            self.memory = (self.memory[0].index_select(0, index), self.memory[1].index_select(0, index))


class DecoderCache(list[KeyValueCache]):
    """A `KeyValueCache` for each layer of a TransformerDecoder."""

    def __init__(self, caches: Iterable[KeyValueCache]):
        super().__init__(caches)

    @property
    def length(self) -> int:
        """How many positions have been decoded."""
        return self[0].length if self else 0

    def reset(self) -> None:
        for cache in self:
            cache.reset()

    def reorder(self, index: Tensor, memory: bool = True) -> None:
        for cache in self:
            cache.reorder(index, memory)


def unchanged_if_refused(caches: Iterable[KeyValueCache], call: Callable[[], Any]) -> Any:
    """``call()``; where it raises, the caches are as they were, so that it can be made again."""
    if torch.compiler.is_compiling():
        return call()
    before = [(cache, cache.length, cache.memory) for cache in caches]
    try:
        return call()
    except Exception:
        for cache, length, memory in before:
            cache.length, cache.memory = length, memory
        raise


def _refuse_gradients(*tensors: Tensor) -> None:
    if _conv_call.needs_grad(*tensors):
        raise RuntimeError("KeyValueCache: it carries no gradients; decode under torch.no_grad() or torch.inference_mode()")


class MultiheadAttention(Keeps, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with the same arguments, parameters and results, plus ``backend`` and a ``cache``.

    ``need_weights=False`` runs `pyops.flash_attention`; torch's default, True, asks for the matrix of weights, which PyTorch's plain
    operations compute. Other differences to torch's: a row that sees no key gives zeros (torch's: NaN), the output is contiguous, forward
    hooks on ``out_proj`` fire, the ``is_causal`` hint is only taken where there are as many queries as keys (elsewhere `attn_mask` says
    what is seen), and dropout draws other random numbers from the same generator. Nested tensors, torch.jit.trace, torch.func and
    forward-mode gradients run torch's own.

    Raises torch's errors for torch's mistakes, ValueError for a cache that does not fit or a backend that cannot run the call.
    """

    backend: str | None = None

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend = backend

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache on the parameters' device; its dtype is theirs, or autocast's where that is on."""
        weight = self.out_proj.weight
        if dtype is None:
            dtype = torch.get_autocast_dtype(weight.device.type) if _conv_call.is_autocast(weight.device.type) else weight.dtype
        return KeyValueCache(batch_size, self.num_heads, max_length, self.head_dim, weight.device, dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's. With a `cache`, self-attention (query, key and value one tensor) adds the step's keys and values to it and attends,
        causally, to all that are there; masks then have a column for each of those. Cross-attention projects key and value at the first
        call and keeps them in ``cache.memory``: later calls read only their shape, and may pass None."""
        is_self = query is key and key is value
        decodes = cache is not None and is_self
        if is_causal and attn_mask is None and not decodes:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if cache is not None:
            self._check_cache(query, key, value, key_padding_mask, attn_mask, cache, is_self)
        elif _conv_call.is_recorded() or not self._takes(query, key, value, key_padding_mask, attn_mask):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.", stacklevel=2
            )
        is_batched = query.dim() == 3
        if not is_batched:
            query = query[None]
            key, value = (query, query) if is_self else (key if key is None else key[None], value if value is None else value[None])
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        first = self.batch_first or not is_batched
        heads = self._project(query, key, value, is_self, first, cache)
        if cache is not None and decodes:
            q, k, v = _split(*heads)
            heads = (q, *cache.append(k, v))
        elif self.bias_k is not None or self.add_zero_attn:
            heads = self._with_extra_keys(*_split(*heads))
        options = (key_padding_mask, need_weights, attn_mask, is_causal, decodes)
        output, weights = self._attend(heads, *options)
        output = output.flatten(2)
        output = output if first else output.transpose(0, 1)
        out = self.out_proj
        is_plain = type(out) is NonDynamicallyQuantizableLinear and not has_hooks(out)
        output = self._product("out", output, out.weight, out.bias) if is_plain else out(output)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            output, weights = output[0], None if weights is None else weights[0]
        return output, weights

    def _takes(self, query, key, value, key_padding_mask, attn_mask, keys: int | None = None) -> bool:
        """Whether the arguments fit each other; if not, torch's own code has the right error. keys: where not as many as key's rows."""
        if any(t is not None and t.is_nested for t in (query, key, value)) or query.dim() not in (2, 3):
            return False
        if query.shape[-1] != self.embed_dim:
            return False
        at, batch = (0, ()) if query.dim() == 2 else (1, query.shape[:1]) if self.batch_first else (0, query.shape[1:2])
        if keys is None:
            if key.dim() != query.dim() or key.shape[-1] != self.kdim or value.shape[-1] != self.vdim or key.shape[:-1] != value.shape[:-1]:
                return False
            if tuple(key.shape[:-1]) != (*batch[:at], key.shape[at], *batch[at:]):
                return False
            keys = key.shape[at]
        rows = query.shape[at]
        for mask, shapes in (
            (key_padding_mask, ((*batch, keys),)),
            (attn_mask, ((rows, keys), (math.prod(batch) * self.num_heads, rows, keys))),
        ):
            if mask is not None and (tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point())):
                return False
        return True

    def _check_cache(self, query, key, value, key_padding_mask, attn_mask, cache: KeyValueCache, is_self: bool) -> None:
        name = type(self).__name__
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError(f"{name}: cache: not with add_bias_kv or add_zero_attn")
        at = 1 if self.batch_first and query.dim() == 3 else 0
        if is_self:
            keys = cache.length + query.shape[at]
        elif cache.memory is not None:
            keys = cache.memory[0].shape[2]
            if key is not None and key.shape[at] != keys:
                raise ValueError(f"{name}: cache: it keeps a memory of {keys} positions, key has {key.shape[at]}; reset() forgets it")
        elif key is None or value is None:
            raise ValueError(f"{name}: cache: it keeps no memory yet; expected key and value")
        elif not self._takes(query, key, value, None, None):
            raise ValueError(
                f"{name}: expected query, key and value of one batch and sizes {self.embed_dim}, {self.kdim}, {self.vdim}, "
                f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        else:
            keys = key.shape[at]
        if not self._takes(query, key, value, key_padding_mask, attn_mask, keys):
            shapes = ", ".join("None" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (query, key_padding_mask, attn_mask))
            raise ValueError(
                f"{name}: cache: expected a query of size {self.embed_dim}, and bool or floating masks with {keys} columns, one for each "
                f"key that is there; query, key_padding_mask and attn_mask are {shapes}"
            )

    def _project(self, query, key, value, is_self: bool, first: bool, cache: KeyValueCache | None):
        """(query, key, value), [B, H, N, D] each, or (packed [B, N, 3, H, D], None, None): views of what the products wrote."""
        weight, bias, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim

        def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = self._product(name, x, weight, bias).unflatten(-1, (-1, self.num_heads, self.head_dim))
            return y if first else y.transpose(0, 1)

        if is_self and self._qkv_same_embed_dim:
            return product("qkv", query, weight, bias), None, None
        same = self._qkv_same_embed_dim
        weights = weight.chunk(3) if same else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q = product("q", query, weights[0], biases[0])[:, :, 0].transpose(1, 2)
        if cache is not None and not is_self and cache.memory is not None:
            return q, *cache.memory
        if key is value and same:
            both = product("kv", key, weight[E:], None if bias is None else bias[E:])
            k, v = both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)
        else:
            k, v = (product(*args)[:, :, 0].transpose(1, 2) for args in zip("kv", (key, value), weights[1:], biases[1:], strict=True))
        if cache is not None and not is_self:
            _refuse_gradients(k, v)
            cache.memory = k, v
        return q, k, v

    def _product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return run_packed(x, weight, bias, lambda: self._kept.get(self, dict).setdefault(name, {}))

    def _with_extra_keys(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the learned key and value of add_bias_kv, and add_zero_attn's zeros, behind the others."""
        if self.bias_k is not None and self.bias_v is not None:
            size = (self.num_heads, 1, self.head_dim)
            extra = [b.view(size).expand(k.shape[0], *size).to(k.dtype) for b in (self.bias_k, self.bias_v)]
            k, v = torch.cat([k, extra[0]], 2), torch.cat([v, extra[1]], 2)
        return (q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if self.add_zero_attn else (q, k, v)

    def _attend(self, heads, key_padding_mask, need_weights, attn_mask, is_causal, decodes) -> tuple[Tensor, Tensor | None]:
        """(output [B, N, H, D], weights [B, H, N, M] where they are needed)"""
        packed = heads[1] is None
        rows, keys = (heads[0].shape[1],) * 2 if packed else (heads[0].shape[2], heads[1].shape[2])
        dropout_p = self.dropout if self.training else 0.0
        plain = need_weights or dropout_p == 1  # which no kernel takes
        causal, lengths = decodes and rows > 1, None
        if is_causal and not decodes and rows == keys and not plain:
            causal, attn_mask = True, None
        if key_padding_mask is not None and key_padding_mask.dtype == torch.bool and not plain and _is_readable(key_padding_mask):
            lengths = _lengths(key_padding_mask)
            padded = lengths is None or bool((lengths < key_padding_mask.shape[1]).any())
            if not padded or causal or keys != key_padding_mask.shape[1]:  # causal: lengths would move the diagonal
                lengths = None
            key_padding_mask = key_padding_mask if padded and lengths is None else None
        bias = _bias(attn_mask, key_padding_mask, self.num_heads, keys)
        if plain:
            y, weights = _attend_plainly(*_split(*heads), bias, causal, self.head_dim, lambda t: F.dropout(t, dropout_p))
            return y.transpose(1, 2), weights if need_weights else None
        options: dict = dict(attn_bias=bias, is_causal=causal, key_lengths=lengths, dropout_p=dropout_p, backend=self.backend)
        output: Any = flash_attention(*heads, **options)
        return output if packed else output.transpose(1, 2), None

    def extra_repr(self) -> str:
        return super().extra_repr() + (f"backend={self.backend!r}" if self.backend else "")


def _split(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if key is not None and value is not None:
        return query, key, value
    query, key, value = query.transpose(1, 3).unbind(2)  # [B, H, 3, N, D]
    return query, key, value


def _is_readable(mask: Tensor) -> bool:
    """Whether looking at values costs little and breaks nothing."""
    return mask.is_cpu and not _conv_call.is_followed()


def _lengths(mask: Tensor) -> Tensor | None:
    """How many keys of each row are real, where padding [B, M] (True: padding) stands behind all of them; else None."""
    keys = mask.shape[1]
    lengths = keys - mask.sum(1)
    return lengths if torch.equal(mask, torch.arange(keys) >= lengths[:, None]) else None


def _bias(attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, keys: int) -> Tensor | None:
    """torch's masks (bool: True is not seen) as one bias, [.., .., N, M] (bool: True is seen); keys beyond the masks' are seen."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    masks = [attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]]
    found = [t if t.shape[-1] == keys else F.pad(t, (0, keys - t.shape[-1])) for t in masks if t is not None]
    hidden = [t for t in found if t.dtype == torch.bool]
    added = [t for t in found if t.dtype != torch.bool]
    if not found:
        return None
    if not added:
        return ~hidden[0] if len(hidden) == 1 else ~(hidden[0] | hidden[1])
    bias = added[0] if len(added) == 1 else added[0] + added[1]
    return bias.masked_fill(hidden[0], -math.inf) if hidden else bias


def _attend_plainly(q, k, v, bias, causal: bool, size: int, drop: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(output [B, H, N, D], weights [B, H, N, M]), as torch computes them where weights are asked for."""
    scores = (q / math.sqrt(size)) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.to(scores.dtype)
    if causal:
        rows, keys = scores.shape[-2:]
        scores = scores.masked_fill(~_attention_reference.visible(scores.device, rows, keys, rows, keys, -1, 0), -math.inf)
    weights = scores.softmax(-1)
    if bias is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    weights = drop(weights)
    return weights.to(v.dtype) @ v, weights


class Attention(nn.Module):
    """Multi-head self-attention of vision transformers, timm's parameter names and results: ``[B, N, dim] -> [B, N, dim]``.

    The heads are read where ``qkv`` wrote them, and their gradients are written where it reads them: nothing is split or copied.

    Raises ValueError for a dim that num_heads does not divide, or a backend that cannot run the call.

    Source: Dosovitskiy et al., 2021.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0, proj_bias: bool = True,
        backend: str | None = None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"Attention: dim: expected a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.head_dim, self.backend = num_heads, dim // num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """attn_mask: added to the scores, or bool, True where a query sees a key; it broadcasts to ``[B, num_heads, N, N]``."""
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        drop = self.attn_drop
        y: Any
        if _conv_call.is_recorded() or type(drop) is not nn.Dropout or has_hooks(drop) or drop.p == 1:  # no kernel drops everything
            y = _attend_plainly(*_split(packed, None, None), attn_mask, is_causal, self.head_dim, drop)[0].transpose(1, 2)
        else:
            options: dict = dict(attn_bias=attn_mask, is_causal=is_causal, dropout_p=drop.p if drop.training else 0.0)
            y = flash_attention(packed, **options, backend=self.backend)
        return self.proj_drop(self.proj(y.flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}" + (f", backend={self.backend!r}" if self.backend else "")
