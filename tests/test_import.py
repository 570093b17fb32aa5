"""A lean import, arrows that point down, and a registry with nothing missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyops
from pyops import _backends, _library
from pyops.testing import SPECS

ROOT = Path(__file__).parent.parent

LEAN = """
import sys, os
import torch
before = set(sys.modules)
import subprocess, threading
subprocess.Popen = None
threads = threading.active_count()
import pyops
import torch
assert not torch.cuda.is_initialized(), "CUDA was initialised"
new = set(sys.modules) - before
heavy = ("triton", "matplotlib", "typer", "rich", "onnxruntime", "sklearn", "torchvision", "timm", "transformers", "torch._dynamo")
for name in (*heavy, "torch._inductor", "pyops.cli", "pyops.testing", "pyops.report", "pyops.models"):
    assert name not in new, f"{name} was imported"
assert threading.active_count() == threads
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT.parent
    )


def test_lean_import():
    result = run(LEAN)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


def test_kernels_load_with_the_package():
    """Where the build says there are kernels, they load; the error is kept for the first op that needs them."""
    if _library.extension is None:
        assert isinstance(_library.load_error, ImportError)
        assert str(_library.load_error) in _library.not_loaded_reason()
    else:
        info = _library.extension.build_info()
        assert info["mode"] in ("cpu", "cuda") and info["cpu_isa"] in info["cpu_isas"]


def test_load_error_is_raised_at_first_use():
    code = """
import sys
sys.modules["pyops._C"] = None      # as if it could not be loaded
import torch, pyops
args = torch.randn(2, 3, 4), None, torch.randn(20, 4), torch.randn(20, 5)
pyops.fused_lstm(*args)             # auto still works
try:
    pyops.fused_lstm(*args, backend="cpu")
except ValueError as error:
    assert "compiled kernels are not loaded" in str(error) and "pip install" in str(error), error
else:
    raise SystemExit("no error")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The same kernels compiled for other instruction sets give the same answers on this machine, where it has them."""
    if _library.extension is None:
        pytest.skip(str(_library.not_loaded_reason()))
    levels = _library.extension.build_info()["cpu_isas"]
    if isa not in levels or levels.index(isa) > levels.index(_library.extension.build_info()["cpu_isa"]):
        pytest.skip(f"{isa} is not built or not on this CPU")
    code = f"""
import sys, torch, pyops
sys.path.insert(0, {str(ROOT)!r})
from pyops import _library
from pyops.testing import SPECS, within_gate
assert _library.extension.build_info()["cpu_isa"] == {isa!r}
from tests.conftest import double, leaves, with_grad
for spec in SPECS.values():
    for dtype in spec.dtypes:
        for sample in spec.samples:
            if sample.id not in ("odd", "lengths_reverse", "many_rows", "reset_before_odd", "sigmoid_odd"):
                continue
            def draw(seed):
                args, kwargs = sample.make(dtype, "cpu", seed)
                results = []
                for call, backend in (((args, kwargs), "cpu"), (double((args, kwargs)), "eager"), ((args, kwargs), "eager")):
                    call = with_grad(call)
                    y = leaves(spec.public(*call[0], **call[1], backend=backend))
                    results.append(y + list(torch.autograd.grad([v.sum() for v in y], leaves(call))))
                return results, len(y)
            draws, counts = zip(*(draw(seed) for seed in range(6)))
            for k, tensors in enumerate(zip(*(zip(*results) for results in draws))):
                missed = within_gate(list(tensors), dtype, gradient=k >= counts[0])
                assert missed is None, (spec.name, dtype, sample.id, k, missed)
"""
    result = run(code, PYOPS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr[-3000:]


# which rooms a room may use; DESIGN.md's arrows
ALLOWED = {
    "pyops/_library.py": {"pyops._C"},
    "pyops/_backends.py": set(),
    "triton_kernels": {"pyops.triton_kernels"},
    "pyops/ops": {"pyops", "pyops._backends", "pyops._library", "pyops.ops", "pyops.triton_kernels"},
    "pyops/nn": {"pyops", "pyops._backends", "pyops.ops", "pyops.nn"},
    "pyops/_trace.py": {"pyops.nn"},
    "pyops/_fusion": {"pyops", "pyops._fusion", "pyops._trace", "pyops._backends", "pyops.nn", "pyops.ops"},
    "pyops/fuse.py": {"pyops", "pyops._backends", "pyops._fusion"},
    "models": {"pyops", "pyops.nn", "pyops.models"},
    "pyops/testing": {"pyops", "pyops.ops", "pyops.testing", "pyops.nn"},
    "pyops/report": {"pyops", "pyops.report"},
    "pyops/demo": {"pyops", "pyops.models", "pyops.nn", "pyops.report", "pyops.testing", "pyops.demo"},
}


def imported(path: Path, package: str) -> set[str]:
    """Modules of pyops that a file imports, relative imports resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            found.add(".".join(filter(None, (base, node.module))))
    return {name for name in found if name == "pyops" or name.startswith("pyops.")}


@pytest.mark.parametrize("room", list(ALLOWED))
def test_arrows_point_down(room):
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        relative = path.relative_to(ROOT).with_suffix("")
        parts = relative.parts if relative.parts[0] == "pyops" else ("pyops", *relative.parts)
        package = ".".join(parts[:-1])
        for name in imported(path, package):
            allowed = any(name == room_ or (room_ != "pyops" and name.startswith(room_ + ".")) for room_ in ALLOWED[room])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}; {room} may use {sorted(ALLOWED[room])}"


def test_bare_folder_names_are_refused():
    for folder in ("models", "triton_kernels"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
        result = run(code)
        assert result.returncode != 0 and f"pyops.{folder}" in result.stderr


def test_registry_is_complete():
    """An op without samples, errors, benchmark shapes, baselines, a docs page or a public name fails here."""
    public = {name for name in pyops.__all__ if callable(getattr(pyops, name)) and name not in ("backend", "explain", "fuse", "unfuse")}
    assert public == set(SPECS) == set(_backends.EXPLAINERS)
    for name, spec in SPECS.items():
        assert spec.public is getattr(pyops, name)
        assert sum(sample.test for sample in spec.samples) >= 5, name
        assert sum(sample.bench for sample in spec.samples) >= 2, name
        assert len(spec.errors) >= 10 and spec.baselines, name
        page = ROOT / "docs" / f"{spec.family}.md"
        assert page.exists() and f"`{name}`" in page.read_text(), f"{name} is not on its docs page"
        assert spec.public.__doc__, name


def test_every_torch_op_belongs_to_a_spec():
    parts = {
        "rnn_scan_fwd",
        "rnn_scan_bwd",
        "small_conv",
        "mbconv_pack",
        "mbconv_infer",
        "expand_depthwise",
        "mlp_pack",
        "mlp_infer",
        "mlp_run",
    }
    known = {op for spec in SPECS.values() for op in spec.ops} | parts
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyops::")}
    assert registered <= known
