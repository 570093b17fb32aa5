"""The command line: every command, its mistakes, and that nothing missing on a machine makes `pyops env` fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import pyops
from pyops import _backends, _environment, _library, cli, cli_bench
from pyops.ops import _rnn
from pyops.testing import SPECS


def invoke(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "250"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_module_and_help():
    """`python -m pyops --help` names every command and imports none of what they need."""
    code = (
        "import sys, runpy, atexit\n"
        "heavy = ('rich.progress', 'sklearn', 'matplotlib', 'pytest', 'torchinfo', 'graphviz')\n"
        "heavy += ('pyops.testing', 'pyops.demo', 'pyops.report', 'triton')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv = ['pyops', '--help']\n"
        "runpy.run_module('pyops', run_name='__main__')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for command in ("env", "ops", "explain", "kernels", "demo", "bench", "report", "summary", "draw"):
        assert command in found.stdout
    assert "HEAVY []" in found.stdout


# ------------------------------------------------------------------------------------------------------------------------- env


def test_env():
    text = invoke("env")
    for expected in (pyops.__version__, torch.__version__, "Backends", "CUDA architectures", *_backends.NAMES):
        assert expected in text


def test_env_json():
    facts = json.loads(invoke("env", "--json"))
    assert facts["torch"] == torch.__version__ and facts["pyops"] == pyops.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert set(facts["backends"]) == set(_backends.NAMES)
    assert "cpu" in facts["backends"]["eager"]["devices"]
    assert facts["build"]["loaded"] == (_library.extension is not None)
    assert facts["cuda"]["available"] == torch.cuda.is_available()


def test_env_with_nothing_there(monkeypatch, tmp_path):
    """No kernels, no build file, no triton, no /proc, and a backend that breaks when it is asked."""

    def broken(facts, name):
        raise RuntimeError("triton is [broken]")

    def unreadable(*args, **kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "load_error", ImportError("libfoo.so: not found"))
    monkeypatch.setattr(_environment, "installed", lambda name: None)
    monkeypatch.setattr(_environment.Path, "read_text", unreadable)
    monkeypatch.setattr(_rnn, "unsupported", broken)
    text = invoke("env")
    assert "not installed" in text and "libfoo.so: not found" in text and "RuntimeError: triton is [broken]" in text
    assert json.loads(invoke("env", "--json"))["build"]["mode"] == "unknown"


def test_env_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "load_error", ImportError("libfoo.so: not found"))
    facts = json.loads(invoke("env", "--json"))
    for name in ("cpu", "cuda"):
        assert facts["backends"][name]["devices"] == [] and "libfoo.so: not found" in facts["backends"][name]["reason"]
    assert "vendor" in facts["backends"] and facts["backends"]["vendor"]["reason"] is None


GPU = {"name": "NVIDIA Old", "capability": [7, 5], "memory_gib": 15.0}


def test_env_warns_of_a_gpu_the_build_cannot_serve(monkeypatch):
    cuda = {"available": True, "runtime": "13.0", "driver": "580.1", "gpus": [GPU, GPU]}
    build = {"loaded": True, "mode": "cuda", "why": "C++ and CUDA kernels", "archs": ["8.0+PTX", "9.0a"]}
    monkeypatch.setattr(_environment, "cuda_facts", lambda: cuda)
    monkeypatch.setattr(_environment, "build_facts", lambda: build)
    text = invoke("env")
    assert text.count("warning:") == 1
    assert "8.0+PTX, 9.0a" in text and "NVIDIA Old (compute capability 7.5)" in text and 'TORCH_CUDA_ARCH_LIST="7.5"' in text
    build["archs"] = ["7.5"]
    assert "warning:" not in invoke("env")
    build.update(mode="cpu", archs=[], why="no CUDA toolkit found")
    assert "warning: there is a GPU, but pyops was built without CUDA kernels: no CUDA toolkit found" in invoke("env")


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 6), True),  # machine code runs on later minors of its major
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["8.0+PTX"], (12, 0), True),
        (["8.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["9.0a+PTX"], (10, 0), False),  # architecture-specific PTX stays on its architecture
        (["10.0f"], (10, 3), True),
        (["10.0f+PTX"], (12, 0), False),
        (["8.0", "9.0a"], (9, 0), True),
        (["nonsense"], (9, 0), False),
    ],
)
def test_which_gpus_a_build_serves(archs, capability, runs):
    assert _environment.serves(archs, capability) is runs


def test_driver_version(monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version:  gcc 12.2.0\n"
    monkeypatch.setattr(_environment.Path, "read_text", lambda self: text)
    assert _environment.driver_version() == "580.65.06"


# ----------------------------------------------------------------------------------------------------------------- ops, explain


def test_ops():
    text = invoke("ops")
    for spec in SPECS.values():
        for backend in spec.backends:
            assert any(spec.name in line and f" {backend} " in line for line in text.splitlines())
    lstm = next(line for line in text.splitlines() if "fused_lstm" in line and " cpu " in line)
    assert lstm.count("yes") == (4 if _library.extension else 0)
    if not torch.cuda.is_available():
        assert re.search(r"triton( \([^)]*\))?: PyTorch sees no CUDA GPU", " ".join(text.split()))


@pytest.mark.parametrize("op", SPECS)
def test_explain_a_sample(op):
    text = invoke("explain", op, "--sample", "plain", "--dtype", "bfloat16")
    assert f"{op}(" in text and "cpu, bfloat16, " in text and all(f" {name} " in text for name in _backends.NAMES)


@pytest.mark.parametrize("op", [name for name, spec in SPECS.items() if spec.family == "rnn"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain(op, device):
    text = invoke("explain", op, "--device", device, "--dtype", "bfloat16", "--batch", 5, "--input", 6, "--hidden", 7, "--seq", 8)
    sizes = (1 if op.endswith("_cell") else 8, 5, 6, 7)
    assert f"{device}, bfloat16, T={sizes[0]}, B={sizes[1]}, I={sizes[2]}, H={sizes[3]}), backend=auto:" in text
    assert all(f" {name} " in text for name in _backends.NAMES)


def test_explain_options():
    assert "T=64, B=16, I=256, H=256" in invoke("explain", "fused_lstm")
    assert "T=70, B=2, I=3, H=9" in invoke("explain", "fused_lstm", "--sample", "long")
    assert "backend=eager: eager" in invoke("explain", "fused_gru", "--backend", "eager")
    for arguments, message in (
        (("softmax",), f"OP: expected one of {', '.join(SPECS)}"),
        (("fused_lstm", "--dtype", "int8"), "--dtype: expected one of float32"),
        (("fused_lstm", "--device", "tpu"), "--device: expected one of cpu, cuda"),
        (("fused_lstm", "--sample", "nope"), "--sample: fused_lstm has plain"),
        (("fused_lstm", "--sample", "plain", "--seq", "3"), "without --sample"),
        (("fused_lstm", "--hidden", "0"), "--hidden 1 or more"),
        (("fused_lstm", "--backend", "gpu"), "expected one of auto, cpu"),
    ):
        assert message in invoke("explain", *arguments, code=2)


# --------------------------------------------------------------------------------------------------------------------- kernels


def test_kernels():
    text = invoke("kernels", "grid_forward<lstm, bf16")
    assert text.count("grid_forward<lstm, bf16>") == 2 and "sm_80, cuda" in text and "sm_90a, cuda" in text
    assert "compiled by ptxas" in text and "f16, H=" not in text
    (row,) = json.loads(invoke("kernels", "grid_forward<lstm, bf16>", "--arch", "sm_80", "--json"))
    assert f" {row['registers']} " in text and f"{row['occupancy']:.0%}" in text
    rows = json.loads(invoke("kernels", "lstm_forward<f32*", "--arch", "sm_90", "--backend", "triton", "--json"))
    assert {row["arch"] for row in rows} == {"sm_90a"} and all("_forward<f32, H=" in row["kernel"] for row in rows)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["nothing_like_it"], 1, "no kernel matches 'nothing_like_it'"),
        (["--arch", "sm_75"], 2, "--arch: expected one of sm_80, sm_90a, sm_90, got 'sm_75'"),
        (["--backend", "cpu"], 2, "--backend: expected one of cuda, triton, got 'cpu'"),
    ],
    ids=["pattern", "arch", "backend"],
)
def test_kernels_mistakes(arguments, code, message):
    assert message in invoke("kernels", *arguments, code=code)


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        ("sm_80", 256, 32, 0, 8),  # 2048 threads
        ("sm_80", 32, 16, 0, 32),  # 32 blocks
        ("sm_80", 256, 255, 0, 1),  # 64 K registers
        ("sm_80", 256, 33, 0, 6),  # 40 registers a thread, as they are dealt out
        ("sm_80", 128, 32, 100 * 1024, 1),
        ("sm_80", 128, 32, 81 * 1024, 2),  # 164 KB, less 1 KB a block
        ("sm_90a", 128, 32, 75 * 1024, 3),  # 228 KB
        ("sm_80", 128, 32, 164 * 1024, 0),  # more than one block may ask for
        ("sm_80", 1024, 65, 0, 0),  # more registers than there are
    ],
)
def test_blocks_per_sm_follow_cudas_rules(arch, threads, registers, shared, blocks):
    from pyops.kernels import ARCHITECTURES, Kernel

    row = Kernel(arch, "cuda", "k", threads, registers, 0, 0, shared)
    assert row.blocks_per_sm == blocks
    assert row.occupancy == blocks * threads / ARCHITECTURES[arch].threads


# ---------------------------------------------------------------------------------------------------------------- bench, report

BENCH = """
import pytest, sys

def pytest_addoption(parser):
    parser.addoption("--bench-rounds", type=int, default=11)
    parser.addoption("--bench-models", default="")
"""
BENCH_OPS = """
import pytest

@pytest.mark.parametrize("op", ["fused_lstm-a", "fused_gru-a"])
def test_op(benchmark, op, request):
    benchmark.pedantic(lambda: FAILING or 1, rounds=request.config.getoption("--bench-rounds"))
    benchmark.extra_info.update(op=op[:-2], sample="a", dtype="float32", backend="cpu")
    benchmark.extra_info.update({"pass": "forward", "baselines": {"torch.nn": {"median": 1.0, "ratio": 2.0}}})
"""
BENCH_MODELS = """
def test_models(benchmark, request):
    benchmark.pedantic(lambda: 1, rounds=1)
    benchmark.extra_info.update(op=request.config.getoption("--bench-models"), peak_bytes={"ours": 2**20, "torch.nn": 2**21})
    benchmark.extra_info.update(baselines={"torch.nn": {"median": 1.0, "ratio": 4.0}})
"""
BENCH_FUSE = """
def test_fused(benchmark, request):
    benchmark.pedantic(lambda: 1, rounds=1)
    benchmark.extra_info.update(op=request.config.getoption("--bench-models") or "own choice", first_call={"ours": 0.5})
    benchmark.extra_info.update(baselines={"torch.nn": {"median": 1.0, "ratio": 3.0}, "torch.nn NCHW": {"median": 2.0, "ratio": 6.0}})
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A made-up source checkout, whose benchmarks take no time, as the current directory."""
    pytest.importorskip("pytest_benchmark")
    folder = tmp_path / "checkout" / "bench"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text(BENCH)
    (folder / "bench_ops.py").write_text(BENCH_OPS.replace("FAILING or ", ""))
    (folder / "bench_models.py").write_text(BENCH_MODELS)
    (folder / "bench_fuse.py").write_text(BENCH_FUSE)
    settings = "[pytest]\npython_files = bench_*.py\naddopts = --import-mode=importlib -p no:cacheprovider\n"
    (folder.parent / "pytest.ini").write_text(settings)
    monkeypatch.setattr(pyops, "__file__", str(tmp_path / "elsewhere" / "pyops" / "__init__.py"))
    monkeypatch.chdir(folder.parent)
    return folder


def run_bench(*arguments, code: int = 0) -> str:
    """In its own process: pytest within pytest would share plugins and warnings; pytest-benchmark measures nothing in a worker of xdist."""
    program = f"import pyops; pyops.__file__ = {pyops.__file__!r}; from pyops.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_bench_and_report(checkout):
    text = run_bench("--quick", "--op", "fused_gru", "--out", "out/results.json")
    assert "fused_gru" in text and "2.00x" in text and "pyops report out/results.json" in text.replace("\n", "")
    benchmarks = json.loads((checkout.parent / "out" / "results.json").read_text())["benchmarks"]
    assert [b["extra_info"]["op"] for b in benchmarks] == ["fused_gru"] and benchmarks[0]["stats"]["rounds"] == 5
    assert "report.html" in invoke("report", "out/results.json", "--out", "page")
    assert "fused_gru" in (checkout.parent / "page" / "report.html").read_text()


def test_bench_of_models(checkout):
    """Networks alone where some are named, and none where not."""
    text = run_bench("--models", "lenet, lenet5", "--out", "models.json")
    assert "lenet,lenet5" in text and "4.00x" in text and "fused" not in text
    invoke("report", "models.json", "--out", "page")
    assert "2.00x" in (checkout.parent / "page" / "report.html").read_text()  # the twin's memory over ours
    text = run_bench("--out", "ops.json")
    assert "4.00x" not in text and "3.00x" not in text


def test_bench_of_fused_networks(checkout):
    pytest.importorskip("torchvision")
    run_bench("--fuse", "resnet18, vgg16", "--out", "fuse.json")
    (found,) = json.loads((checkout.parent / "fuse.json").read_text())["benchmarks"]
    assert found["extra_info"]["op"] == "resnet18,vgg16"
    invoke("report", "fuse.json", "--out", "page")
    assert "| geometric mean |  |  | 3.00x |  |" in (checkout.parent / "page" / "report.md").read_text()
    assert "own" in run_bench("--fuse", "all", "--out", "all.json")


def test_bench_that_fails(checkout):
    (checkout / "bench_ops.py").write_text(BENCH_OPS.replace("FAILING or 1", "1 / 0"))
    text = run_bench("--out", "results.json", code=1)
    assert "ZeroDivisionError" in text and "did not finish" in text


def test_bench_mistakes(checkout):
    assert "--op: expected one of" in invoke("bench", "--op", "softmax", code=2)
    assert "--models: there is no network 'lenet6'; did you mean lenet" in invoke("bench", "--models", "lenet,lenet6", code=2)
    for others in (("--op", "fused_gru"), ("--fuse", "resnet18")):
        assert "--op, --models, --fuse: expected one of them" in invoke("bench", "--models", "lenet", *others, code=2)
    assert "--fuse: torchvision has no network 'resnet81'; did you mean resnet18" in invoke("bench", "--fuse", "resnet81", code=2)
    (checkout / "bench_ops.py").unlink()
    assert "source checkout" in invoke("bench", code=2)


def test_report_mistakes(tmp_path):
    assert "No such file" in invoke("report", tmp_path / "absent.json", code=2)
    (tmp_path / "bad.json").write_text("[1]")
    assert "not a pytest-benchmark JSON file" in invoke("report", tmp_path / "bad.json", code=2)


def test_progress_counts_benchmarks():
    from io import StringIO
    from types import SimpleNamespace

    from rich.console import Console

    with cli_bench.Counter(Console(file=StringIO())) as counter:
        counter.pytest_collection_finish(SimpleNamespace(items=[1, 2, 3]))
        counter.pytest_runtest_logstart("bench/bench_ops.py::bench_op[lstm-float32]")
        counter.pytest_runtest_logfinish()
        (task,) = counter.progress.tasks
        assert (task.total, task.completed, task.description) == (3, 1, "lstm-float32")
