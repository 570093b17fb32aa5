"""torch's transformer modules on pyops' attention: same constructors, parameters, state dicts and results, and decoding with a cache.

None takes torch's C++ fast path: the layers are called one by one, so that hooks and subclasses see every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops import _backends
from pyops.nn._derived import DerivedParts, Keeps, has_hooks
from pyops.nn.attention import DecoderCache, KeyValueCache, MultiheadAttention, unchanged_if_refused
from pyops.nn.linear import run_kept
from pyops.ops import _conv_call


class _Layer(Keeps):
    """What encoder and decoder layers share: whose attention they call, and how they feed forward."""

    activation: Any
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout

    @cached_property
    def _kept(self) -> DerivedParts:
        return DerivedParts()

    def _adopt(self, backend: str | None) -> None:
        """torch's attention becomes ours where it lies: the same parameters, and initial values drawn in torch's order."""
        for module in self.children():  # type: ignore[attr-defined]
            if type(module) is nn.MultiheadAttention:
                module.__class__ = MultiheadAttention
                module.backend = backend  # type: ignore[assignment]

    def _activation_name(self) -> str | None:
        """What `linear_act` calls the activation, None where it does not know it or someone watches it."""
        activation = self.activation
        if isinstance(activation, nn.Module) and has_hooks(activation):
            return None
        if activation is F.relu or activation is torch.relu or type(activation) is nn.ReLU:
            return "relu"
        if activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none"):
            return "gelu"
        return None

    def _linear(self, name: str, x: Tensor, activation: str = "none") -> Tensor | None:
        """The layer and its activation without gradients on a CPU; None where the modules are to be called."""
        layer = getattr(self, name)
        if torch.is_grad_enabled() or not x.is_cpu or type(layer) is not nn.Linear or has_hooks(layer) or _conv_call.is_followed():
            return None
        if _backends.requested(None) not in ("auto", "cpu"):  # linear_act has no other kernel
            return None
        return run_kept(self._kept[name], layer, x, None, activation, None)

    def _feed_forward(self, x: Tensor) -> Tensor:
        activation = self._activation_name()
        hidden = None if activation is None else self._linear("linear1", x, activation)
        hidden = self.dropout(self.activation(self.linear1(x)) if hidden is None else hidden)
        y = self._linear("linear2", hidden)
        return self.linear2(hidden) if y is None else y


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with the same arguments, parameters and results, plus ``backend`` (of attention).

    Masks, hints and what differs: see `MultiheadAttention`. Nested tensors run torch's own layer.
    """

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(backend)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x, masks = src, (src_mask, src_key_padding_mask)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._feed_forward(x))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with the same arguments, parameters and results, plus ``backend`` (of attention) and a ``cache``.

    Masks, hints and what differs: see `MultiheadAttention`.
    """

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(backend)

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache for up to max_length positions, on the parameters' device and of their dtype, or autocast's."""
        attention: Any = self.self_attn
        return attention.new_cache(batch_size, max_length, dtype)

    def forward(
        self,
        tgt: Tensor,
        memory: Any,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """As torch's. With a `cache`, `tgt` holds the next positions alone, each of which sees those before it without a mask; tgt_mask
        and tgt_key_padding_mask then have a column for every position so far. `memory` is projected once, and may be None afterwards."""

        def attend(x: Tensor) -> Tensor:
            if cache is None:
                return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            masks: dict = dict(key_padding_mask=tgt_key_padding_mask, attn_mask=tgt_mask)
            return self.dropout1(self.self_attn(x, x, x, need_weights=False, cache=cache, **masks)[0])

        def attend_memory(x: Tensor) -> Tensor:
            if cache is None:
                return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            masks: dict = dict(key_padding_mask=memory_key_padding_mask, attn_mask=memory_mask, is_causal=memory_is_causal)
            return self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, cache=cache, **masks)[0])

        def run() -> Tensor:
            x = tgt
            if self.norm_first:
                x = x + attend(self.norm1(x))
                x = x + attend_memory(self.norm2(x))
                return x + self._ff_block(self.norm3(x))
            x = self.norm1(x + attend(x))
            x = self.norm2(x + attend_memory(x))
            return self.norm3(x + self._ff_block(x))

        return run() if cache is None else unchanged_if_refused([cache], run)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self._feed_forward(x))


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder with the same arguments, parameters and results, of layers of any kind.

    It never makes a nested tensor of a padded one: rows of padding hold numbers, where torch's fast path leaves zeros.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        output = src
        is_causal = _is_causal(self.layers, src, mask, is_causal)
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder with the same arguments, parameters and results, plus a ``cache``::

    cache = decoder.new_cache(batch_size, max_length)
    for x in steps:                                     # [B, 1, E] each, or more positions at once
        y = decoder(x, memory, cache=cache)             # no tgt_mask: a position sees those before it
        cache.reorder(beams)                            # where beam search goes on with other rows
    """

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> DecoderCache:
        """An empty cache for every layer, for up to max_length positions."""
        return DecoderCache(layer.new_cache(batch_size, max_length, dtype) for layer in self.layers)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """As torch's; `cache`: see `TransformerDecoderLayer`. Raises ValueError for a cache of another number of layers."""
        masks: dict = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            memory_is_causal=memory_is_causal,
        )
        output = tgt
        if cache is None:
            is_causal = _is_causal(self.layers, tgt, tgt_mask, tgt_is_causal)
            for layer in self.layers:
                output = layer(output, memory, tgt_is_causal=is_causal, **masks)
            return output if self.norm is None else self.norm(output)
        if not isinstance(cache, (list, tuple)):
            raise TypeError(f"TransformerDecoder: cache: expected what new_cache makes, got {type(cache).__name__}")
        if len(cache) != len(self.layers):
            raise ValueError(f"TransformerDecoder: cache: expected one for {len(self.layers)} layers, got {len(cache)}")

        def decode() -> Tensor:
            output = tgt
            for layer, own in zip(self.layers, cache, strict=True):
                output = layer(output, memory, cache=own, **masks)
            return output if self.norm is None else self.norm(output)

        return unchanged_if_refused(cache, decode)


class Transformer(nn.Transformer):
    """torch.nn.Transformer with the same arguments, parameters and results, plus ``backend`` (of attention).

    ``encoder`` and ``decoder`` are pyops' own: to decode step by step call ``decoder`` with a cache, ``decoder.new_cache(...)``.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        backend: str | None = None,
    ):
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*sizes, backend=backend), num_encoder_layers, norm())
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*sizes, backend=backend), num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )  # the other arguments went into the layers


def _is_causal(layers: nn.ModuleList, x: Tensor, mask: Tensor | None, hint: bool | None) -> bool:
    """The hint; without one, whether the mask is the causal one, which torch's stacks look for as well."""
    if hint is not None or mask is None or x.is_nested or _conv_call.is_followed():
        return hint is True
    first: Any = layers[0].self_attn
    rows = x.shape[1 if x.dim() == 3 and first.batch_first else 0]
    if tuple(mask.shape) != (rows, rows):
        return False
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    expected = hidden if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(hidden, -torch.inf)
    return torch.equal(mask, expected)
