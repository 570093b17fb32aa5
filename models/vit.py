"""The vision transformer: an image's patches as the tokens of a transformer encoder."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import MultiheadAttention, Sequential
from pyops.nn._mlp import HasMlp

from ._registry import images, register

PAPER = "Dosovitskiy et al., 2021"

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class EncoderBlock(HasMlp, nn.Module):
    """``x = x + attention(norm(x))``, then ``x + mlp(norm(x))``: ``[N, L, hidden_dim] -> [N, L, hidden_dim]``."""

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.ln_1 = LayerNorm(hidden_dim)
        self.self_attention = MultiheadAttention(hidden_dim, num_heads, dropout=attention_dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = LayerNorm(hidden_dim)
        widen, narrow = nn.Linear(hidden_dim, mlp_dim), nn.Linear(mlp_dim, hidden_dim)
        for layer in (widen, narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        self.mlp = Sequential(widen, nn.GELU(), nn.Dropout(dropout), narrow, nn.Dropout(dropout))
        self.backend = None

    def forward(self, input: Tensor) -> Tensor:
        x = self.ln_1(input)
        x = input + self.dropout(self.self_attention(x, x, x, need_weights=False)[0])
        output = self.infer_mlp(x, self.ln_2, x)
        return x + self.mlp(self.ln_2(x)) if output is None else output


class Encoder(nn.Module):
    """Adds the embedding of positions, then blocks and a norm: ``[N, seq_length, hidden_dim] -> [N, seq_length, hidden_dim]``."""

    def __init__(
        self, seq_length: int, num_layers: int, num_heads: int, hidden_dim: int, mlp_dim: int, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, seq_length, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential()
        for i in range(num_layers):
            self.layers.add_module(f"encoder_layer_{i}", EncoderBlock(num_heads, hidden_dim, mlp_dim, dropout, attention_dropout))
        self.ln = LayerNorm(hidden_dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(input + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """``[N, 3, image_size, image_size] -> [N, num_classes]``, of the class token.

    Args:
        image_size, patch_size: in pixels; patches fill the image.
        dropout: after the embedding, after attention and in the MLPs.
        attention_dropout: of the attention's weights.
        representation_size: of a layer with tanh before the last one, as in pre-training; None: there is none.

    Raises ValueError for a patch size that does not divide the image's, or images of another size. Source: Dosovitskiy et al., 2021.
    """

    def __init__(
        self,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        image_size: int = 224,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        num_classes: int = 1000,
        representation_size: int | None = None,
    ):
        super().__init__()
        if image_size < 1 or image_size % patch_size:
            raise ValueError(f"VisionTransformer: image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        self.image_size = image_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, stride=patch_size)
        tokens = (image_size // patch_size) ** 2 + 1
        self.encoder = Encoder(tokens, num_layers, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout)
        self.heads = Sequential()
        if representation_size is not None:
            hidden = nn.Linear(hidden_dim, representation_size)
            nn.init.trunc_normal_(hidden.weight, std=math.sqrt(1 / hidden_dim))
            nn.init.zeros_(hidden.bias)
            self.heads.add_module("pre_logits", hidden)
            self.heads.add_module("act", nn.Tanh())
        head = nn.Linear(representation_size or hidden_dim, num_classes)
        self.heads.add_module("head", head)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (3 * patch_size**2)))
        zeros: tuple[Any, ...] = (self.conv_proj.bias, head.weight, head.bias)
        for tensor in zeros:
            nn.init.zeros_(tensor)

    def forward(self, input: Tensor) -> Tensor:
        if tuple(input.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(f"VisionTransformer: input: expected [N, 3, {self.image_size}, {self.image_size}], got {tuple(input.shape)}")
        patches = self.conv_proj(input.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(input), -1, -1), patches], 1)
        return self.heads(self.encoder(x)[:, 0])


@register(images(224), PAPER)
def vit_b_16(**options: Any) -> VisionTransformer:
    """ViT-Base, patches of 16 x 16: 12 layers, 12 heads, 86,567,656 parameters. Options are those of `VisionTransformer`."""
    return VisionTransformer(16, 12, 12, 768, 3072, **options)


@register(images(224), PAPER)
def vit_b_32(**options: Any) -> VisionTransformer:
    """ViT-Base, patches of 32 x 32: 12 layers, 12 heads, 88,224,232 parameters. Options are those of `VisionTransformer`."""
    return VisionTransformer(32, 12, 12, 768, 3072, **options)


@register(images(224), PAPER)
def vit_l_16(**options: Any) -> VisionTransformer:
    """ViT-Large, patches of 16 x 16: 24 layers, 16 heads, 304,326,632 parameters. Options are those of `VisionTransformer`."""
    return VisionTransformer(16, 24, 16, 1024, 4096, **options)
