"""scripts/gpu_check.sh without a GPU: what it says of itself, and how it runs and records stages, with a Python that pretends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .host_execution.harness import nvcc

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/gpu_check.sh"
STAGES = ["build", "tests", "ops", "memcheck", "racecheck", "microbench", "bench", "compile", "fuse", "autotune", "report"]

# A stand-in for python3: claims a GPU, builds at once, fails a test, writes one benchmark file and hangs in another; the script's own
# helper and the report are the real ones.
PRETEND = """#!/usr/bin/env bash
case "$*" in
  *"gpu_report.py facts"*) echo '{"gpus": [{"name": "Pretend", "capability": "9.0"}], "versions": {"torch": "2.11", "triton": null}}' ;;
  *"-m pip"*) echo "for $TORCH_CUDA_ARCH_LIST" ;;
  *"-m pyops env"*) echo environment ;;
  *"-m pytest -q tests/gpu"*) echo "1 failed"; exit 1 ;;
  *"-m pytest -q tests/test_ops.py"*) sleep 60 ;;
  *"-m pytest -q bench"*) cp "$RESULTS" "$(sed 's/.*--benchmark-json \\([^ ]*\\).*/\\1/' <<<"$*")" ;;
  *) exec "$REAL" "$@" ;;
esac
"""


def run(*arguments, **environment):
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable} | environment)


def test_help_and_dry_run_name_every_stage():
    assert all(stage in run("--help").stdout for stage in STAGES)
    lines = run("--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES
    assert all(int(line.split()[1]) < 600 for line in lines), "a stage ends within ten minutes"
    quick = run("--dry-run", "--quick", "--stages", "ops,report").stdout.splitlines()
    assert [line.split()[:2] for line in quick] == [["ops", "20"], ["report", "15"]]


@pytest.mark.parametrize(
    "arguments, message",
    [(["--stages", "built"], "--stages: expected build tests"), (["--fast"], "unknown option --fast"), (["--out"], "--out needs a folder")],
)
def test_wrong_usage(arguments, message):
    done = run(*arguments)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "out")
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "sees no CUDA GPU" in done.stderr


def test_a_failing_stage_loses_nothing_of_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETEND)
    python.chmod(0o755)
    benchmarks = min((ROOT / "bench/results").glob("cpu-*.json"))
    out, environment = tmp_path / "out", {"PYTHON": str(python), "REAL": sys.executable, "RESULTS": str(benchmarks)}
    done = run("--quick", "--out", out, "--stages", "build,tests,ops,bench,compile,report", **environment)
    assert done.returncode == 1, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert {row["stage"]: row["status"] for row in results["stages"]} == {
        "build": "passed", "tests": "failed", "ops": "out of time", "bench": "passed", "compile": "left out of a quick run",
        "report": "passed",
    }  # fmt: skip
    assert "for 9.0a" in (out / "logs/build.log").read_text()
    assert (out / "report/report.html").exists()
    first = json.loads(benchmarks.read_text())["benchmarks"][0]["extra_info"]
    assert results["benches"]["quick"][0]["op"] == first["op"]
    text = (out / "summary.md").read_text()
    assert "| tests | failed |" in text and "Pretend (compute capability 9.0); torch 2.11" in text and "vs torch.nn" in text


def test_each_network_has_a_file_of_its_own(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETEND)
    python.chmod(0o755)
    benchmarks = min((ROOT / "bench/results").glob("cpu-*.json"))
    out, environment = tmp_path / "out", {"PYTHON": str(python), "REAL": sys.executable, "RESULTS": str(benchmarks)}
    done = run("--out", out, "--stages", "fuse,autotune", "--networks", "resnet18,vgg16", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (out / "bench").iterdir()}
    assert names == {f"{network}.{stage}.json" for network in ("resnet18", "vgg16") for stage in ("fuse", "autotune")}
    names = subprocess.run([sys.executable, "-c", "from bench.bench_fuse import NETWORKS; print(*NETWORKS)"], capture_output=True, cwd=ROOT)
    assert len(names.stdout.split()) == 8, names.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_microbenchmarks_compile(architecture, tmp_path):
    if nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or put nvcc on PATH")
    command = [nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", str(ROOT / "scripts/gpu_microbench.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "gpu_microbench")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = subprocess.run([str(tmp_path / "gpu_microbench"), "--slow"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage" in usage.stderr


def test_the_memory_check_compiles_for_a_gpu(tmp_path):
    """What compute-sanitizer runs: the driver alone, the kernels are the build's."""
    if nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or put nvcc on PATH")
    source = ROOT / "tests/host_execution/memory_check.cu"
    command = [nvcc(), "-std=c++17", "-arch=sm_90a", "-Werror", "all-warnings", "-c", str(source), "-o", str(tmp_path / "memory_check.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
