"""Swin Transformer's parts, v1 and v2: torchvision's constructors, parameter names and results, pyops' kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.nn import _mlp
from pyops.nn._derived import Keeps, has_hooks, is_plain, kind_of
from pyops.nn.conv import DropPath, can_fold
from pyops.nn.linear import BlockLinear
from pyops.ops import _window_attention_ops
from pyops.ops.window_attention import window_attention


class ShiftedWindowAttention(nn.Module):
    """Attention within the (shifted) windows of a map, with a bias learned by relative position: torchvision's class, names and results.

    ``[B, H, W, dim] -> [B, H, W, dim]``. The qkv layer runs on the map as it lies and `pyops.window_attention` finds the windows, so
    that nothing is padded, rolled or partitioned; tokens that would fill up the last windows count as in torchvision. ``window_size``
    and ``shift_size`` are (height, width) or one int for both. ``attention_dropout`` drops scores by pyops' own random numbers,
    ``dropout`` outputs by PyTorch's, both in training only.

    Source: Liu et al., 2021 (Swin Transformer). Raises TypeError or ValueError for sizes or shares that make no layer.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        op = type(self).__name__
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"{op}: dim, num_heads: expected a multiple of the heads, got {dim} and {num_heads}")
        self.window_size, self.shift_size = _pair(op, "window_size", window_size), _pair(op, "shift_size", shift_size)
        if min(self.window_size) < 1 or not all(0 <= by < side for by, side in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"{op}: window_size, shift_size: expected 0 <= shift < window, got {window_size} and {shift_size}")
        if not 0.0 <= attention_dropout < 1.0:
            raise ValueError(f"{op}: attention_dropout: expected 0 to less than 1, got {attention_dropout}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{op}: dropout: expected 0 to 1, got {dropout}")
        self.num_heads, self.attention_dropout, self.dropout, self.backend = num_heads, attention_dropout, dropout, backend
        self.qkv = BlockLinear(dim, 3 * dim, qkv_bias, backend)
        self.proj = BlockLinear(dim, dim, proj_bias, backend)
        self.define_relative_position_bias_table()
        self.define_relative_position_index()

    def define_relative_position_bias_table(self) -> None:
        height, width = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def define_relative_position_index(self) -> None:
        """torchvision's buffer, which the state_dict has; kernels count by themselves."""
        index = _window_attention_ops.relative_index(self.window_size, torch.get_default_device())
        self.register_buffer("relative_position_index", index.flatten())

    def _table(self) -> Tensor:
        """The bias by relative position: [(2 * height - 1) * (2 * width - 1), num_heads]."""
        return self.relative_position_bias_table

    def get_relative_position_bias(self) -> Tensor:
        """The bias of each pair of a window's tokens: [1, num_heads, tokens, tokens]."""
        tokens = self.window_size[0] * self.window_size[1]
        return self._table()[self.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(self, input: Tensor) -> Tensor:
        return self._attend(self.qkv(input), self.qkv.bias, self._table())

    def _attend(self, qkv: Tensor, bias: Tensor | None, table: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = dict(logit_scale=logit_scale, backend=self.backend)
        options["dropout_p"] = self.attention_dropout if self.training else 0.0
        output = window_attention(qkv, self.num_heads, self.window_size, self.shift_size, table, bias, **options)
        return F.dropout(self.proj(output), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


WindowAttention = ShiftedWindowAttention  # the name by which the op is known


class ShiftedWindowAttentionV2(Keeps, ShiftedWindowAttention):
    """Swin v2's attention: cosines times a learned scale, and a bias that a small MLP makes of relative positions, so that weights serve
    other windows. torchvision's class, names and results; otherwise as `ShiftedWindowAttention`.

    k has no bias: its part of ``qkv.bias`` is read as zeros and gets no gradient. Without gradients the bias by position is kept until a
    parameter changes.

    Source: Liu et al., 2022 (Swin Transformer V2). Raises ValueError for windows of one token along a side as well, which have no
    relative positions to scale.
    """

    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__(dim, window_size, shift_size, num_heads, qkv_bias, proj_bias, attention_dropout, dropout, backend)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((num_heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias[dim : 2 * dim])

    def define_relative_position_bias_table(self) -> None:
        if min(self.window_size) < 2:
            raise ValueError(f"{type(self).__name__}: window_size: expected 2 or more, got {self.window_size}")
        sides = [torch.arange(1 - side, side, dtype=torch.float32) / (side - 1) * 8 for side in self.window_size]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)[None]
        self.register_buffer("relative_coords_table", places.sign() * torch.log2(places.abs() + 1.0) / 3.0)

    def _table(self) -> Tensor:
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))

    def forward(self, input: Tensor) -> Tensor:
        table, bias = self._terms(input)
        layer: Any = self.qkv
        qkv = layer(input, bias=bias) if isinstance(layer, BlockLinear) else F.linear(input, layer.weight, bias)
        return self._attend(qkv, bias, table, self.logit_scale)

    def _terms(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The table and qkv's bias without k's."""
        plain = is_plain(self.cpb_mlp, (nn.Sequential, nn.Linear, nn.ReLU)) and not has_hooks(self.cpb_mlp)
        if not plain or not can_fold(self.qkv.weight, input) or torch.compiler.is_compiling():
            return self._compute_terms()
        return self._kept.get(self, self._compute_terms)

    def _compute_terms(self) -> tuple[Tensor, Tensor | None]:
        if self.qkv.bias is None:
            return self._table(), None
        q, k, v = self.qkv.bias.chunk(3)
        return self._table(), torch.cat([q, torch.zeros_like(k), v])


class SwinTransformerBlock(_mlp.HasMlp, nn.Module):
    """``x = x + drop(attn(norm1(x)))``, then ``x + drop(mlp(norm2(x)))``: torchvision's class, parameter names and results.

    ``[B, H, W, dim] -> [B, H, W, dim]``. The MLP widens to ``mlp_ratio * dim`` with GELU between. Without gradients on a CPU norm2, MLP
    and residual are one kernel, on weights made ready once and again when a parameter changes; so it is with ``backend="cuda"`` or
    ``"triton"`` up to their widths.

    Source: Liu et al., 2021 (Swin Transformer); Huang et al., 2016 (stochastic depth).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_layer: Callable[..., nn.Module] = ShiftedWindowAttention,
        backend: str | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = dict(attention_dropout=attention_dropout, dropout=dropout)
        options |= {} if backend is None else {"backend": backend}  # not every attn_layer takes one
        self.norm1 = norm_layer(dim)
        self.attn = attn_layer(dim, window_size, shift_size, num_heads, **options)
        self.stochastic_depth = DropPath(stochastic_depth_prob)
        self.norm2 = norm_layer(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))
        layers: list[Any] = [self.mlp[0], self.mlp[3]]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.stochastic_depth(self.attn(self.norm1(input)))
        output = self.infer_mlp(x, self.norm2, x) if _is_still(self.stochastic_depth) else None
        return x + self.stochastic_depth(self.mlp(self.norm2(x))) if output is None else output


class SwinTransformerBlockV2(SwinTransformerBlock):
    """``x = x + drop(norm1(attn(x)))``, then ``x + drop(norm2(mlp(x)))``: torchvision's class, with the norms at the branches' ends.

    Source: Liu et al., 2022 (Swin Transformer V2). Otherwise as `SwinTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_layer: Callable[..., nn.Module] = ShiftedWindowAttentionV2,
        backend: str | None = None,
    ):
        rates = (dropout, attention_dropout, stochastic_depth_prob)
        super().__init__(dim, num_heads, window_size, shift_size, mlp_ratio, *rates, norm_layer, attn_layer, backend)

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.stochastic_depth(self.norm1(self.attn(input)))
        output = self.infer_mlp(x)
        return x + self.stochastic_depth(self.norm2(self.mlp(x) if output is None else output))


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens side by side, normalised and reduced to twice the channels: torchvision's class, names and results.

    ``[..., H, W, dim] -> [..., ceil(H / 2), ceil(W / 2), 2 * dim]``; beyond the map there are zeros.
    """

    def __init__(self, dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm):
        super().__init__()
        self.dim = dim
        self.reduction = BlockLinear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.reduction(self.norm(_merge(input)))


class PatchMergingV2(nn.Module):
    """As `PatchMerging`, with the norm after the reduction."""

    def __init__(self, dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm):
        super().__init__()
        self.dim = dim
        self.reduction = BlockLinear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(2 * dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.reduction(_merge(input)))


def _merge(x: Tensor) -> Tensor:
    """[..., H, W, C] -> [..., H / 2, W / 2, 4 * C], a square's tokens in the order of columns."""
    H, W = x.shape[-3:-1]
    if H % 2 or W % 2:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    return torch.cat([x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)], -1)


def _is_still(drop: Any) -> bool:
    """Whether it is a DropPath that changes nothing."""
    return kind_of(drop) is DropPath and not (drop.training and drop.p > 0) and not has_hooks(drop)


def _pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) for s in sides):
        raise TypeError(f"{op}: {name}: expected an int or two, got {value!r}")
    return sides[0], sides[1]
