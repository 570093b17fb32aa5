"""Swin: transformers whose attention stays within windows, which shift from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import PatchMerging, PatchMergingV2, Sequential, SwinTransformerBlock, SwinTransformerBlockV2
from pyops.nn.convnext import Permute

from ._registry import images, register

PAPER, PAPER_V2 = "Liu et al., 2021", "Liu et al., 2022"

PARTS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (SwinTransformerBlock, PatchMerging),
    2: (SwinTransformerBlockV2, PatchMergingV2),
}


class SwinTransformer(nn.Module):
    """``[N, 3, H, W] -> [N, num_classes]``: 4 x 4 patches, then stages of blocks, each with half the side and twice the width of the last.

    Args:
        embed_dim: the first stage's width.
        depths, num_heads: blocks, and their heads, of each stage.
        window: tokens along a window's side; every other block shifts by half of it.
        version: 1, or 2: norms at the branches' ends, attention by cosines.
        mlp_ratio: how much wider the MLPs are inside.
        dropout, attention_dropout: of the layers' outputs and of the attention's weights.
        stochastic_depth_prob: the share of samples that a branch drops, rising from 0 at the first block to this at the last.

    Raises ValueError for depths and heads of different numbers of stages, fewer than two blocks, or another version.
    Source: Liu et al., 2021 (Swin Transformer), and 2022 (Swin Transformer V2).
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window: int,
        version: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth_prob: float = 0.1,
        num_classes: int = 1000,
    ):
        super().__init__()
        if len(depths) != len(num_heads) or sum(depths) < 2:
            raise ValueError(
                f"SwinTransformer: depths, num_heads: expected one of each for every stage, and two blocks, got {depths} and {num_heads}"
            )
        if version not in PARTS:
            raise ValueError(f"SwinTransformer: version: expected 1 or 2, got {version!r}")
        block, merging = PARTS[version]
        dim, done, last = embed_dim, 0, sum(depths) - 1
        layers: list[nn.Module] = [Sequential(nn.Conv2d(3, dim, 4, stride=4), Permute((0, 2, 3, 1)), nn.LayerNorm(dim))]
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if i:
                layers.append(merging(dim))
                dim *= 2
            stage: list[nn.Module] = []
            for place in range(depth):
                shift = window // 2 if place % 2 else 0
                drops: dict[str, float] = dict(dropout=dropout, attention_dropout=attention_dropout)
                drops["stochastic_depth_prob"] = stochastic_depth_prob * (done + place) / last
                stage.append(block(dim, heads, window, shift, mlp_ratio, **drops))
            layers.append(nn.Sequential(*stage))
            done += depth
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.norm(self.features(input.contiguous(memory_format=torch.channels_last))).mean((1, 2)))


@register(images(224), PAPER)
def swin_t(stochastic_depth_prob: float = 0.2, **options: Any) -> SwinTransformer:
    """Tiny: 2, 2, 6 and 2 blocks, windows of 7 x 7: 28,288,354 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, stochastic_depth_prob=stochastic_depth_prob, **options)


@register(images(224), PAPER)
def swin_s(stochastic_depth_prob: float = 0.3, **options: Any) -> SwinTransformer:
    """Small: 2, 2, 18 and 2 blocks, windows of 7 x 7: 49,606,258 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, stochastic_depth_prob=stochastic_depth_prob, **options)


@register(images(224), PAPER)
def swin_b(stochastic_depth_prob: float = 0.5, **options: Any) -> SwinTransformer:
    """Base: as small, 128 wide at first: 87,768,224 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(128, (2, 2, 18, 2), (4, 8, 16, 32), 7, stochastic_depth_prob=stochastic_depth_prob, **options)


@register(images(256), PAPER_V2)
def swin_v2_t(stochastic_depth_prob: float = 0.2, **options: Any) -> SwinTransformer:
    """Version 2, tiny: 2, 2, 6 and 2 blocks, windows of 8 x 8: 28,351,570 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(96, (2, 2, 6, 2), (3, 6, 12, 24), 8, 2, stochastic_depth_prob=stochastic_depth_prob, **options)


@register(images(256), PAPER_V2)
def swin_v2_s(stochastic_depth_prob: float = 0.3, **options: Any) -> SwinTransformer:
    """Version 2, small: 2, 2, 18 and 2 blocks, windows of 8 x 8: 49,737,442 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(96, (2, 2, 18, 2), (3, 6, 12, 24), 8, 2, stochastic_depth_prob=stochastic_depth_prob, **options)


@register(images(256), PAPER_V2)
def swin_v2_b(stochastic_depth_prob: float = 0.5, **options: Any) -> SwinTransformer:
    """Version 2, base: as small, 128 wide at first: 87,930,848 parameters. Options are those of `SwinTransformer`."""
    return SwinTransformer(128, (2, 2, 18, 2), (4, 8, 16, 32), 8, 2, stochastic_depth_prob=stochastic_depth_prob, **options)
