"""Which calls there are to test: every op x backend x dtype x sample of the registry that the backend says it can run."""

from __future__ import annotations

import os
import subprocess
import sys

# Threads that wait for work let other test processes run; read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from pyops import _backends
from pyops.ops import _machine
from pyops.testing import SPECS, within_gate

torch.set_num_threads(2)
_machine.MEASURES = False


def pytest_addoption(parser):
    parser.addoption("--all-kernels", action="store_true", help="compile every Triton kernel for the static budgets, not every third")


DEVICES = {"cpu": "cpu", "vendor": "cpu", "cuda": "cuda", "triton": "cuda"}
NO_GPU = {"cuda", "triton"} if not torch.cuda.is_available() else set()


def cases(backends: tuple[str, ...] | None = None, dtypes: tuple[torch.dtype, ...] | None = None, ids: tuple[str, ...] | None = None):
    """pytest parameters (spec, backend, dtype, sample). Backends that need a GPU have their own proofs where there is none."""
    found = []
    for spec in SPECS.values():
        for backend in spec.backends:
            if backend in NO_GPU or (backends is not None and backend not in backends):
                continue
            for dtype in spec.dtypes:
                if dtypes is not None and dtype not in dtypes:
                    continue
                for sample in spec.samples:
                    if sample.test and (ids is None or sample.id in ids):
                        name = f"{spec.name}-{backend}-{str(dtype)[6:]}-{sample.id}"
                        found.append(pytest.param(spec, backend, dtype, sample, id=name))
    return found


DRAWS = 24


def assert_gate(draw, dtype: torch.dtype, gradient: bool = False) -> None:
    """Holds every tensor of `draw(seed) -> (ours, float64 truths, eager's)` to the numerics gate.

    One draw settles most cases; one that misses may be unlucky, so then the error over all draws together decides.
    """

    def missed(draws):
        each = [[(f.cpu(), t, e.cpu()) for f, t, e in zip(*results, strict=True)] for results in draws]
        found = [within_gate(list(tensor), dtype, gradient) for tensor in zip(*each, strict=True)]
        return {index: reason for index, reason in enumerate(found) if reason is not None}

    first = draw(0)
    if missed([first]):
        reasons = missed([first, *(draw(seed) for seed in range(1, DRAWS))])
        assert not reasons, f"by index of the tensor: {reasons}"


def arguments(spec, backend, dtype, sample, seed=0):
    """The sample's arguments, or a skip with the backend's own reason."""
    args, kwargs = sample.make(dtype, DEVICES[backend], seed)
    rows = dict(_backends.explain(spec.public, *args, **kwargs, backend=backend).rows)
    if rows[backend].startswith("cannot"):
        pytest.skip(f"{backend} {rows[backend]}")
    return args, kwargs


def double(value):
    """Every floating tensor of nested arguments as float64 on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, (tuple, list)):
        return tuple(double(item) for item in value)
    return {key: double(item) for key, item in value.items()} if isinstance(value, dict) else value


CONSTANTS = ("running_", "keep", "alibi_")  # keyword arguments that no gradient flows into


def leaves(value) -> list[torch.Tensor]:
    """The floating tensors in a nested value, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if not key.startswith(CONSTANTS) for leaf in leaves(item)]
    return []


def with_grad(value):
    """A detached copy of nested arguments whose floating tensors ask for gradients; strides and expansion are kept."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return tuple(with_grad(item) for item in value)
    if isinstance(value, dict):
        return {key: item if key.startswith(CONSTANTS) else with_grad(item) for key, item in value.items()}
    return value


def cotangents(outputs) -> list[torch.Tensor]:
    """A fixed pseudo-random gradient for each output, the same for every dtype before rounding."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in outputs]


@pytest.fixture
def run_on():
    """Runs code with the CPU kernels of an instruction set, in a process of its own; skips the test where the machine has none such."""

    def run(isa: str, code: str, *arguments: str) -> None:
        environment = os.environ | {"PYOPS_CPU_ISA": isa}
        result = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        if f"PYOPS_CPU_ISA={isa}: this machine supports" in result.stderr:
            pytest.skip(f"no {isa} here")
        assert result.returncode == 0, result.stderr[-3000:]

    return run
