"""The numerics gate: our error against float64 is measured in units of eager PyTorch's own error in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FORWARD = {torch.float64: 1.25, torch.float32: 1.25, torch.bfloat16: 2.0, torch.float16: 2.0}
GRADIENT = 3.0


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Relative L2 distance of results to their float64 truths, all pairs as one long vector; infinite where what is not finite differs."""
    distance = norm = 0.0
    for found, truth in pairs:
        found, truth = found.detach().double(), truth.detach().double()
        if found.shape != truth.shape:
            raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}")
        finite = truth.isfinite()
        if not torch.equal(found.isfinite(), finite) or not torch.allclose(found[~finite], truth[~finite], equal_nan=True):
            return math.inf
        found, truth = found[finite], truth[finite]
        distance += (found - truth).square().sum().item()
        norm += truth.square().sum().item()
    return math.sqrt(distance / norm) if norm else math.sqrt(distance)


def within_gate(draws: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, gradient: bool = False) -> str | None:
    """None when our results pass the gate, else what they missed by. `draws`: (ours, float64 truth, eager's) for each set of inputs.

    More draws make one longer vector: for a short one the ratio of two rounding errors is luck.
    The floor is one unit in the last place, the best a result in that dtype can be asked for. In float64 the truth is eager's own
    result and carries rounding of its own, so there the floor is 32 units.
    """
    ours = relative_error((found, truth) for found, truth, _ in draws)
    theirs = relative_error((eager, truth) for _, truth, eager in draws)
    floor = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
    allowed = max((GRADIENT if gradient else FORWARD[dtype]) * theirs, floor)
    return None if ours <= allowed else f"relative error {ours:.3g} over {len(draws)} draws, eager's is {theirs:.3g}, allowed {allowed:.3g}"


def poison(*sizes: int) -> None:
    """Leaves NaN in the allocator's free blocks of these byte sizes, so that an element a kernel forgets to write shows up."""
    blocks = [torch.full((max(1, size // 4),), float("nan")) for size in sizes for _ in range(4)]
    del blocks
