"""What a step and an inference take: time, and memory at its peak."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from pyops.demo.training import now


def times(calls: list[Callable[[], object]], where: Tensor, rounds: int = 30) -> list[float]:
    """The median seconds of each call; the calls take turns, so that the machine's noise hits all."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, found, strict=True):
            start = now(where)
            call()
            seconds.append(now(where) - start)
    return [statistics.median(seconds) for seconds in found]


def peak_bytes(call: Callable[[], object], where: Tensor) -> int:
    """The most memory that tensors made during `call` held at once, on the device of `where`; what was there before does not count.

    On a GPU the caching allocator keeps count. On a CPU torch's profiler reports each allocation and release of the CPU allocator, so also
    what an operator allocates inside (a workspace, a reordered copy) and what autograd keeps for the backward pass; a dispatch mode would
    see only the tensors that operators return. A release of older memory is reported nowhere, hence `call` should make none.
    """
    if where.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library greets on stderr
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        call()
    results = profile.kineto_results  # the one place where the reports stand one by one: the public lists have them summed by operator
    assert results is not None
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate(size for _, size in events), default=0)
