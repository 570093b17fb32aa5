"""Process groups by name, for ops whose schemas carry strings: batch statistics shared by several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_groups: dict[str, Any] = {}


def name_of(group: Any) -> str:
    """The name under which ops find a `torch.distributed.ProcessGroup`; "" for None or a group of one process."""
    if group is None:
        return ""
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if group.size() == 1:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def summed(values: Tensor, name: str) -> Tensor:
    """The sum over the group's processes, in double on the way."""
    total = values.double()
    torch.distributed.all_reduce(total, group=_groups[name])
    return total.to(values.dtype)


def merged_moments(moments: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
    """(moments, count) of all processes' values, of each process's own; one all-reduce of ``[2, C]`` and a number.

    Sums and sums of squares about zero, which lose 2 log2(mean/std) bits, are safe in double.
    """
    mean, squares = moments.double()
    sums = torch.cat([mean * count, squares + count * mean.square(), mean.new_full((1,), count)])
    torch.distributed.all_reduce(sums, group=_groups[name])
    total = sums[-1]
    first, second = sums[:-1].chunk(2)
    merged = torch.stack([first / total, (second - first.square() / total).clamp_min(0.0)])
    return merged.to(moments.dtype), total
