"""`OpSpec`: everything the tests and benches need to know about an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[tuple, dict[str, Any]]  # positional and keyword arguments of the public function


@dataclass(frozen=True)
class Sample:
    """Arguments for one call. `make(dtype, device, seed=0)` is deterministic: the same values at every call."""

    id: str
    make: Callable[..., Arguments]
    bench: bool = False  # timed by bench/
    test: bool = True  # run by tests/; large benchmark shapes are not


@dataclass(frozen=True)
class ErrorCase:
    """A call that must raise `error` with a message matching `match`, before any kernel runs."""

    id: str
    make: Callable[[], Arguments]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class OpSpec:
    """An op as its users see it. The float64 truth is `public(..., backend="eager")` on the same rounded inputs."""

    name: str
    public: Callable
    family: str  # the docs page and sample file it belongs to
    ops: tuple[str, ...]  # the torch ops behind it, under torch.ops.pyops
    samples: tuple[Sample, ...]
    errors: tuple[ErrorCase, ...]
    flops: Callable[..., int]  # of one forward call
    bytes: Callable[..., int]  # that one forward call cannot avoid moving
    # name -> factory(args, kwargs) -> a callable of no arguments that runs the peer; raises ImportError or ValueError when it cannot
    baselines: dict[str, Callable[[tuple, dict], Callable[[], Any]]] = field(default_factory=dict)
    learned: tuple[str, ...] = ()  # keyword arguments that a training step has gradients of; positional tensors all have
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    backends: tuple[str, ...] = ("cpu", "cuda", "triton")  # held to the numerics gate


SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> None:
    SPECS[spec.name] = spec
