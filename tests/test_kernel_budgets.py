"""What the compiled CUDA kernels cost, without a GPU: registers, spills, shared memory and tensor-core instructions.

Each csrc/rnn/*.cu is compiled for sm_80 and sm_90a; ptxas's report is held against tests/kernel_budgets.json. After a deliberate
change, write a new table with `python -m tests.test_kernel_budgets` and read its diff.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).resolve().parent / "kernel_budgets.json"
SOURCES = sorted((ROOT / "csrc/rnn").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90a"]
REGISTERS_PER_SM = 64 * 1024
SLACK = 8  # registers: what another minor version of ptxas may do

# Weights stay on chip for the whole sequence: a spill would put them, or what displaces them, into local memory.
RESIDENT = ("one_cta_forward", "one_cta_backward", "grid_forward", "grid_backward")
KINDS = ["lstm", "gru", "gru_before", "rnn"]


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin/nvcc")) if home else shutil.which("nvcc")


def cuobjdump():
    spec = find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(shipped) if shipped and shipped.exists() else shutil.which("cuobjdump")


def plain_name(mangled):
    """_ZN..one_cta_forwardILNS0_4KindE0ENS_4bf16ELi8EEE.. -> one_cta_forward<lstm, bf16, 8>"""
    found = re.search(r"\d([a-z_]+)I(?:LNS\d?_\d*_?4KindE(\d)E)?(f|t|j|NS_\d(?:bf16|f16)E)(?:L[ib](\d+)E)?E", mangled)
    if not found:
        return mangled
    kernel, kind, dtype, last = found.groups()
    dtype = {"f": "f32", "t": "uint16", "j": "uint32"}.get(dtype, dtype[4:-1])
    parts = [KINDS[int(kind)]] if kind else []
    return f"{kernel}<{', '.join([*parts, dtype, *([last] if last else [])])}>"


def compile_kernels(source, architecture, folder):
    """{kernel: {registers, spill_bytes, stack_bytes, shared_bytes, threads-independent facts}} and the cubin's path."""
    cubin = Path(folder) / f"{source.stem}.{architecture}.cubin"
    command = [nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    report = re.compile(
        r"entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    kernels = {}
    for text in done.stderr.split("Compiling ")[1:]:
        if found := report.search(text):
            name, stack, stores, loads, registers, shared = found.groups()
            kernels[plain_name(name)] = {
                "registers": int(registers), "spill_bytes": int(stores) + int(loads),
                "stack_bytes": int(stack), "static_shared_bytes": int(shared or 0),
            }  # fmt: skip
    return kernels, cubin


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or put nvcc on PATH")
    return compile_all(tmp_path_factory.mktemp("cubins"))


def compile_all(folder):
    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_kernels(*job, folder), jobs)
    return {(source.stem, architecture): result for (source, architecture), result in zip(jobs, results, strict=True)}


def table(compiled):
    kernels = {architecture: {} for architecture in ARCHITECTURES}
    for (_, architecture), (found, _) in compiled.items():
        kernels[architecture] |= found
    return {architecture: dict(sorted(found.items())) for architecture, found in kernels.items()}


def threads_of(kernel):
    name, arguments = kernel.rstrip(">").split("<")
    return int(arguments.split(", ")[-1]) * 32 if name.startswith("one_cta") else 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_their_budgets(compiled, architecture):
    found, budgets = table(compiled)[architecture], json.loads(BUDGETS.read_text())[architecture]
    assert set(found) == set(budgets), "kernels came or went: write a new table"
    for kernel, cost in found.items():
        assert cost["registers"] <= budgets[kernel]["registers"] + SLACK, f"{kernel}: {cost}, budget {budgets[kernel]}"
        assert cost["static_shared_bytes"] <= budgets[kernel]["static_shared_bytes"], kernel
        assert cost["registers"] * threads_of(kernel) <= REGISTERS_PER_SM, f"{kernel} cannot be launched"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resident_kernels_do_not_spill(compiled, architecture):
    for kernel, cost in table(compiled)[architecture].items():
        if kernel.startswith(RESIDENT):
            assert cost["spill_bytes"] == 0 and cost["stack_bytes"] == 0, f"{kernel}: {cost}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_16_bit_products_run_on_tensor_cores(compiled, architecture):
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: install triton, which ships it, or the CUDA toolkit")
    seen = set()
    for (_, arch), (_, cubin) in compiled.items():
        if arch != architecture:
            continue
        listing = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for text in listing.split("Function : ")[1:]:
            kernel = plain_name(text.split("\n", 1)[0].strip())
            if not kernel.startswith((*RESIDENT, "step_")):
                continue
            seen.add(kernel)
            is_16bit = "16" in kernel.split("<")[1].split(", ")[1]
            assert ("HMMA.16816.F32" in text) == is_16bit, f"{kernel}: tensor cores are for 16-bit products only"
            assert is_16bit or "FFMA" in text, kernel
            assert not kernel.startswith("step_") or "LDGSTS.E.BYPASS.128" in text, f"{kernel}: no 16-byte asynchronous copies"
            assert not kernel.startswith("grid_") or "LDG.E.128.STRONG.GPU" in text, f"{kernel}: no 16-byte loads past L1"
    assert len(seen) == sum(k.startswith((*RESIDENT, "step_")) for k in table(compiled)[architecture])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        BUDGETS.write_text(json.dumps(table(compile_all(scratch)), indent=1) + "\n")
    sys.stdout.write(f"wrote {BUDGETS}\n")
