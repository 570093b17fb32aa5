"""The random numbers of attention's dropout: the same on every backend, in forward and in backward.

Philox4x32 with 7 rounds, key = the 64 bits of the seed (low word, high word). The score of query row i and key column j, both counted
within their sequence, of query head h in sequence (or window) s is kept where word ``j % 4`` of the block with counter
``(j // 4, i, h, s)`` is at least `threshold(p)`, and divided by ``1 - p``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """What a 32-bit word must reach for its score to be kept."""
    return min(round(p * 2**32), _WORD)


def _product(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """(high, low) word of a 32-bit product held in int64, which is signed: in two halves, so that nothing overflows."""
    low = (a & 0xFFFF) * constant
    high = (a >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def keep(seed: Tensor, p: float, sequences: int, heads: int, rows: int, columns: int) -> Tensor:
    """Which scores stay: bool ``[sequences, heads, rows, columns]``. seed: int64 ``[1]``."""
    words = lambda count, dim: torch.arange(count, device=seed.device).view([-1 if d == dim else 1 for d in range(4)])  # noqa: E731
    a, b, c, d = words((columns + 3) // 4, 3), words(rows, 2), words(heads, 1), words(sequences, 0)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        (h0, l0), (h1, l1) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = h1 ^ b ^ low, l1, h0 ^ d ^ high, l0
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    shape = (sequences, heads, rows, (columns + 3) // 4)
    blocks = torch.stack([t.expand(shape) for t in (a, b, c, d)], -1)
    return blocks.flatten(3)[..., :columns] >= threshold(p)
