"""The random numbers of attention's dropout and of `gaussian_sample`: the same on every backend, in forward and in backward.

Philox4x32 with 7 rounds, key = the 64 bits of the seed (low word, high word); a block of four words has a counter of four.

Dropout: the score of query row i and key column j, both counted within their sequence, of query head h in sequence (or window) s is kept
where word ``j % 4`` of the block with counter ``(j // 4, i, h, s)`` is at least `threshold(p)`, and divided by ``1 - p``.

Normal numbers (Box-Muller): column j of row i is number ``j % 4`` of the block with counter ``(j // 4, i, 0, NORMALS)``. Of a block's
words a, b, c, d the numbers are ``r(a) * cos(t(b))``, ``r(a) * sin(t(b))``, ``r(c) * cos(t(d))``, ``r(c) * sin(t(d))``, where
``r(w) = sqrt(-2 * log(u))`` with ``u = (w + 1/2) / 2**32`` rounded to float32 (w first, then the sum), and ``t(w) = 2 * pi * w / 2**32``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; Box and Muller, 1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 7
NORMALS = 0xFFFFFFFF  # no sequence of attention has this number: one seed may serve both
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """What a 32-bit word must reach for its score to be kept."""
    return min(round(p * 2**32), _WORD)


def check_seed(op: str, seed, like: Tensor) -> None:
    """Raises TypeError or ValueError unless `seed` is an int, one int64 on like's device, or None."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"{op}: seed: expected one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
        if seed.device != like.device:
            raise ValueError(f"{op}: seed: expected {like.device}, got {seed.device}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"{op}: seed: expected an int, an int64 Tensor or None, got {seed!r}")


def as_seed(op: str, seed, like: Tensor) -> Tensor | None:
    """int64 [1] on like's device, or None."""
    check_seed(op, seed, like)
    if seed is None or isinstance(seed, Tensor):
        return None if seed is None else seed.view(1)
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=like.device)


def drawn(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A seed from a generator, or from PyTorch's own for like's device: int64 [1] on like's device."""
    if generator is None:
        return torch.randint(2**63 - 1, (1,), device=like.device)
    return torch.randint(2**63 - 1, (1,), device=generator.device, generator=generator).to(like.device)


def _product(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """(high, low) word of a 32-bit product held in int64, which is signed: in two halves, so that nothing overflows."""
    low = (a & 0xFFFF) * constant
    high = (a >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _words(seed: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The four words of each block, in int64; counters broadcast."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        (h0, l0), (h1, l1) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = h1 ^ b ^ low, l1, h0 ^ d ^ high, l0
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return a, b, c, d


def _counter(count: int, dim: int, dims: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device).view([-1 if d == dim else 1 for d in range(dims)])


def keep(seed: Tensor, p: float, sequences: int, heads: int, rows: int, columns: int) -> Tensor:
    """Which scores stay: bool ``[sequences, heads, rows, columns]``. seed: int64 ``[1]``."""
    sizes = ((columns + 3) // 4, rows, heads, sequences)
    counters = (_counter(count, 3 - place, 4, seed) for place, count in enumerate(sizes))
    blocks = torch.stack([t.expand(sizes[::-1]) for t in _words(seed, *counters)], -1)
    return blocks.flatten(3)[..., :columns] >= threshold(p)


def _polar(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normal numbers of two words. The angle is taken from the nearest quarter turn, so that its rounding is that of a small angle."""
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * u.to(dtype).log()).sqrt()
    quarter = (second + 2**29) >> 30
    angle = (second - (quarter << 30)).to(dtype) * (2.0 * math.pi / 2**32)
    cos, sin = angle.cos(), angle.sin()
    odd = (quarter & 1) == 1
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    x = torch.where(((quarter + 1) & 2) == 2, -x, x)  # quarters 1 and 2
    return radius * x, radius * torch.where((quarter & 2) == 2, -y, y)  # quarters 2 and 3


def normal(seed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers ``[rows, columns]``, float32 or float64. seed: int64 ``[1]``."""
    zero = seed.new_zeros(1, 1)
    a, b, c, d = _words(seed, _counter((columns + 3) // 4, 1, 2, seed), _counter(rows, 0, 2, seed), zero, zero + NORMALS)
    return torch.stack([*_polar(a, b, dtype), *_polar(c, d, dtype)], -1).flatten(1)[:, :columns]
