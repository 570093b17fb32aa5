"""Every op of the registry on its benchmark samples, forward and training, against its baselines."""

from __future__ import annotations

import pytest
import torch

from pyops import _backends
from pyops.testing import SPECS
from pyops.testing.samples.rnn_peers import flatten

from .conftest import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
OURS = ("cuda", "triton") if DEVICE == "cuda" else ("cpu",)
CASES = [
    pytest.param(spec, sample, dtype, backend, id=f"{spec.name}-{sample.id}-{str(dtype)[6:]}-{backend}")
    for spec in SPECS.values()
    for sample in spec.samples
    for dtype in DTYPES
    for backend in OURS
    if sample.bench
]


def with_gradients(args, kwargs, learned):
    """(positional arguments, keyword arguments) with leaves that ask for gradients, and those leaves."""
    found: list[torch.Tensor] = []

    def visit(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(value.detach().requires_grad_())
            return found[-1]
        return tuple(map(visit, value)) if isinstance(value, tuple) else value

    return visit(args), kwargs | {name: visit(kwargs[name]) for name in learned if name in kwargs}, found


def build_peers(spec, args, kwargs, wanted: str):
    """The baselines that can run this call, and why the others cannot."""
    peers, skipped = {}, {}
    for name, factory in spec.baselines.items():
        if wanted != "all" and name not in wanted.split(","):
            continue
        try:
            call = factory(args, kwargs)
            call()
            peers[name] = call
        except (ImportError, TypeError, ValueError) as reason:
            skipped[name] = str(reason)
    return peers, skipped


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("spec, sample, dtype, backend", CASES)
def bench_op(spec, sample, dtype, backend, direction, race, benchmark, request):
    args, kwargs = sample.make(dtype, DEVICE)
    rows = dict(_backends.explain(spec.public, *args, **kwargs, backend=backend).rows)
    if rows[backend].startswith("cannot"):
        pytest.skip(rows[backend])
    training = direction == "training"
    leaves: list[torch.Tensor] = []
    if training:
        args, kwargs, leaves = with_gradients(args, kwargs, spec.learned)
    wanted = request.config.getoption("--bench-peers")
    peers, skipped = build_peers(spec, args, kwargs, wanted)

    def ours():
        return spec.public(*args, **kwargs, backend=backend if DEVICE == "cuda" else None)

    def training_step(call):
        cotangent = torch.ones_like(flatten(call())[0])

        def run():
            y = flatten(call())[0]
            torch.autograd.backward(y, cotangent)
            for leaf in leaves:
                leaf.grad = None

        return run

    if training:
        peers = {name: training_step(call) for name, call in peers.items() if name.startswith("torch")}
        times = race(DEVICE)(training_step(ours), peers)
    else:
        with torch.no_grad():
            times = race(DEVICE)(ours, peers)
    flops = spec.flops(*args, **kwargs) * (3 if training else 1)
    moved = spec.bytes(*args, **kwargs) * (3 if training else 1)
    record(
        benchmark, times, flops, moved, DEVICE, dtype, op=spec.name, sample=sample.id, backend=backend, skipped=skipped,
        **{"pass": direction},
    )  # fmt: skip
