"""The demo's task `vit`: a small vision transformer and a small Swin Transformer read the image in patches.

Their twins are the same networks in plain torch.nn: attention by `F.scaled_dot_product_attention`, windows by rolls and copies as
torchvision makes them.

Source: Dosovitskiy et al., 2021 (ViT); Liu et al., 2021 (Swin).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.demo import contest
from pyops.demo.training import Recipe, Result, load_digits, read
from pyops.nn import Attention, PatchMerging, SwinTransformerBlock

EPOCHS = 15  # with which ViT and Swin reach 95.8 % to 98.0 % on the test images, with seeds 0 to 2
# Keys' biases have no gradient but rounding, which Adam with its own eps of 1e-8 would blow up.
RECIPE = Recipe(batch=32, learning_rate=3e-3, optimizer=partial(torch.optim.Adam, eps=1e-6, fused=True))
DIM, HEADS, DEPTH, PATCH = 48, 4, 2, 2  # of the ViT: 4 x 4 patches that overlap by half, and the class token
SWIN_DIM, SWIN_HEADS, WINDOW = 24, (2, 4), 4  # of Swin: 8 x 8 patches, two stages of two blocks


class Mlp(nn.Sequential):
    """torchvision's, with its numbers of layers."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * dim, dim), nn.Dropout(0.0))


class Block(nn.Module):
    """An encoder block around any attention, the norms in front."""

    def __init__(self, dim: int, attention: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.attn(self.norm1(input))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """[N, 8, 8] -> [N, 10]"""

    def __init__(self, attention: Callable[[], nn.Module]):
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, 2 * PATCH, PATCH, PATCH // 2)
        self.token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.places = nn.Parameter(torch.randn(1, (8 // PATCH) ** 2 + 1, DIM) * 0.02)
        self.blocks = nn.Sequential(*(Block(DIM, attention()) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images[:, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


class Swin(nn.Module):
    """[N, 8, 8] -> [N, 10]"""

    def __init__(self, block: Callable[[int, int, int], nn.Module], merging: Callable[[int], nn.Module]):
        super().__init__()
        self.patches = nn.Conv2d(1, SWIN_DIM, 3, padding=1)
        wide = 2 * SWIN_DIM
        stages = [[block(dim, heads, shift) for shift in (0, WINDOW // 2)] for dim, heads in zip((SWIN_DIM, wide), SWIN_HEADS, strict=True)]
        self.features = nn.Sequential(*stages[0], merging(SWIN_DIM), *stages[1])
        self.norm = nn.LayerNorm(wide)
        self.head = nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(self.patches(images[:, None]).permute(0, 2, 3, 1))).mean((1, 2)))


class TwinAttention(nn.Module):
    """Attention of all tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwinWindowAttention(nn.Module):
    """Attention in shifted windows, of a map that they divide."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, shift: int):
        super().__init__()
        self.heads, self.shift = heads, shift
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
        apart = at[:, None] - at + WINDOW - 1
        self.register_buffer("relative_position_index", (apart[:, :, 0] * (2 * WINDOW - 1) + apart[:, :, 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        shift = self.shift if WINDOW < H else 0
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        q, k, v = self.qkv(windows(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].view(WINDOW**2, WINDOW**2, -1).permute(2, 0, 1)
        if shift:  # what the roll brought around is apart from what was there
            around = (torch.arange(H, device=x.device) >= H - shift).long()
            ids = windows((around[:, None] * 2 + around).view(1, H, W, 1))[:, :, 0]
            masks = (ids[:, :, None] != ids[:, None]).to(x.dtype) * -100.0
            bias = (bias + masks[:, None]).repeat(B, 1, 1, 1)
        rows = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = self.proj(rows).view(B, H // WINDOW, W // WINDOW, WINDOW, WINDOW, C).transpose(2, 3).reshape(B, H, W, C)
        return x.roll((shift, shift), (1, 2)) if shift else x


class TwinMerging(nn.Module):
    """2 x 2 tokens to one of twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        squares = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(squares, 3)))


def windows(t: Tensor) -> Tensor:
    """[B, H, W, C] -> [B * windows, WINDOW ** 2, C]"""
    B, H, W, C = t.shape
    return t.view(B, H // WINDOW, WINDOW, W // WINDOW, WINDOW, C).transpose(2, 3).reshape(-1, WINDOW**2, C)


def vit(backend: str | None = None) -> Vit:
    return Vit(lambda: Attention(DIM, HEADS, qkv_bias=True, backend=backend))


def vit_twin() -> Vit:
    return Vit(TwinAttention)


def swin(backend: str | None = None) -> Swin:
    return Swin(lambda dim, heads, shift: SwinTransformerBlock(dim, heads, WINDOW, shift, backend=backend), PatchMerging)


def swin_twin() -> Swin:
    return Swin(lambda dim, heads, shift: Block(dim, TwinWindowAttention(dim, heads, shift)), TwinMerging)


def run(
    device: str = "cpu",
    epochs: int = EPOCHS,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[Result]:
    """The whole demo, a result of each network. `progress` is called after each epoch of each of the four models.

    Raises ValueError for no epochs, or a backend that cannot run it here.
    """
    digits = load_digits(seed, device)
    N = RECIPE.batch
    packed = torch.empty(N, (8 // PATCH) ** 2 + 1, 3, HEADS, DIM // HEADS, device=device)
    qkv = torch.empty(N, 8, 8, 3 * SWIN_DIM, device=device)
    networks: list[tuple[str, Any, Any, Any]] = [
        ("ViT", vit, vit_twin, pyops.explain("flash_attention", packed, backend=backend)),
        ("Swin", swin, swin_twin, pyops.explain("window_attention", qkv, SWIN_HEADS[0], WINDOW, WINDOW // 2, backend=backend)),
    ]
    results = []
    for name, ours, theirs, explanation in networks:
        torch.manual_seed(seed)
        candidate, reference = ours(backend).to(device), theirs().to(device)
        chosen = str(explanation.chosen)
        lead = (
            f"A small {name} reads handwritten digits in patches. It is trained twice on {device}: with torch.nn, and with pyops, whose "
            f"attention runs on its {chosen!r} backend."
        )
        models: dict[str, nn.Module] = {f"torch.nn, {name}": reference, f"pyops.nn, {name}": candidate}
        result = contest.run(models, RECIPE, digits, epochs, seed, progress, lead, chosen, kind, name)
        read(result, digits.test_x, digits)
        results.append(result)
    return results


KINDS = {"norm": "layer norms", "table": "position biases", "attn": "attention layers", "mlp": "MLPs", "reduction": "merging"}


def kind(_: nn.Module, name: str) -> str:
    return next((text for key, text in KINDS.items() if key in name), "patches, places and classifier")
