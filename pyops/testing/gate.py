"""The numerics gate: our error against float64 is measured in units of eager PyTorch's own error in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = {torch.float32: 1.25, torch.float64: 1.25, torch.bfloat16: 2.0, torch.float16: 2.0}
GRADIENT = 3.0


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Relative L2 distance to the float64 truth, infinite where `found` holds a NaN the truth does not."""
    found, truth = found.detach().double(), truth.detach().double()
    if found.shape != truth.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}")
    if not torch.equal(found.isfinite(), truth.isfinite()):
        return float("inf")
    norm = truth.norm().item()
    distance = (found - truth).norm().item()
    return distance / norm if norm else distance


def within_gate(found: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype, gradient: bool = False) -> str | None:
    """None when `found` passes the gate, else what it missed by.

    The floor is one unit in the last place: below it eager's error is luck (few values, short sums), not a standard.
    """
    ours, theirs = relative_error(found, truth), relative_error(eager, truth)
    allowed = max((GRADIENT if gradient else FORWARD[dtype]) * theirs, torch.finfo(dtype).eps)
    return None if ours <= allowed else f"relative error {ours:.3g}, eager's is {theirs:.3g}, allowed {allowed:.3g}"


def poison(*sizes: int) -> None:
    """Leaves NaN in the allocator's free blocks of these byte sizes, so that an element a kernel forgets to write shows up."""
    blocks = [torch.full((max(1, size // 4),), float("nan")) for size in sizes for _ in range(4)]
    del blocks
