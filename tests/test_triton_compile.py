"""Static budgets of the Triton kernels: the configurations the dispatcher can pick, compiled ahead of time for each architecture and
held against pyops/kernel_budgets.json. A program holds W_hh on chip for the whole sequence, so a spill or a shared memory overrun is
what limits `supports`. After a deliberate change, write a new table with `python -m tests.test_kernel_budgets`.

All of them are eight hundred kernels, a second each: the tests compile every third, which takes each configuration's kernels by turns
through architectures and directions. `--all-kernels` compiles all.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from pyops.triton_kernels.recurrent_limits import (  # noqa: E402
    GATES,
    MAX_HIDDEN_16BIT,
    MAX_HIDDEN_32BIT,
    SHARED_MEMORY_SM80,
    launch_config,
    shared_memory,
    supports,
)

from pyops import kernels as budgets  # noqa: E402

from . import triton_configurations as configurations  # noqa: E402
from .budgets import REGISTER_SLACK, compare, cuobjdump  # noqa: E402

ARCHITECTURES = list(configurations.ARCHITECTURES)
# Rows of a multiple of 16 units are read 16 bytes at a time and never spill. Others need an address per element and may give up a few
# registers: bytes a thread, 16 by Triton 3.9, up to 128 by 3.6.
SPILLS_UNALIGNED = 128
# The 1x1 convolution with every option at once: none by the table's compiler, up to 176 by Triton 3.6.
SPILLS_FUSED = 192
SPILLS_WINDOW = 16  # of window attention's gradient on sm_80, which keeps two tiles of scores from window to window: 8, whatever its warps
EVERY = 3  # of how many kernels one is compiled
SHARED_SLACK = 2048  # sums exchanged between warps, bytes: up to 1536 more by Triton 3.6


def compile_all(every: int = 1) -> list[dict]:
    """One of `every` kernels, by as many child processes as there are cores."""
    workers = max(1, min(os.cpu_count() or 1, 16))
    command = [sys.executable, configurations.__file__]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    shares = [[*command, str(every * index), str(every * workers), str(cuobjdump())] for index in range(workers)]
    children = [subprocess.Popen(share, **pipes) for share in shares]
    results = [child.communicate() for child in children]
    for child, (_, stderr) in zip(children, results, strict=True):
        assert child.returncode == 0, stderr[-4000:]
    return [json.loads(line) for output, _ in results for line in output.splitlines()]


def measured(rows: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["arch"], row["kernel"]): row["costs"] for row in rows}


def is_the_tables_compiler() -> bool:
    return ".".join(triton.__version__.split(".")[:2]) == budgets.compilers()["triton"]


pytestmark = pytest.mark.timeout(2400)  # the fixture does the work of all tests; a busy machine takes long


@pytest.fixture(scope="module")
def rows(pytestconfig):
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: this Triton ships none, and there is no CUDA toolkit")
    every = 1 if pytestconfig.getoption("all_kernels") else EVERY
    found = compile_all(every)
    assert sorted((row["arch"], row["kernel"]) for row in found) == sorted(job[:2] for job in configurations.jobs()[::every])
    return found


def test_the_table_has_every_kernel():
    assert {job[:2] for job in configurations.jobs()} == {(row.arch, row.kernel) for row in budgets.load() if row.backend == "triton"}


def test_kernels_keep_their_budgets(rows):
    found, slack = measured(rows), {"registers": REGISTER_SLACK}
    table = [row for row in budgets.load() if (row.arch, row.kernel) in found]
    if not is_the_tables_compiler():  # another one deals registers out differently (the next tests bound its spills), and exchanges sums so
        slack["shared_bytes"] = SHARED_SLACK
        found = {key: costs | {"registers": 0, "spill_bytes": 0, "stack_bytes": 0} for key, costs in found.items()}
    changed = compare(table, found, "triton", slack)
    assert not changed, "python -m tests.test_kernel_budgets writes a new table, where this is meant:\n" + "\n".join(changed)


def test_what_the_design_promises(rows):
    for row in (row for row in rows if "cell" in row):
        cell, dtype, H, costs = row["cell"], row["dtype"], row["hidden_size"], row["costs"]
        aligned = H % 16 == 0
        assert costs["spill_bytes"] <= (0 if aligned else SPILLS_UNALIGNED), row
        assert costs["shared_bytes"] <= shared_memory(cell, getattr(torch, configurations.TORCH[dtype]), H) <= SHARED_MEMORY_SM80, row
        assert row["tensor_cores"] == (dtype != "f32"), row
        # the smallest 16-bit tile has less than 16 bytes a thread
        assert row["loads_128"] or not aligned or (dtype != "f32" and H == 16), row
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **costs).blocks_per_sm >= 1, row


def test_what_the_depthwise_design_promises(rows):
    found = [row for row in rows if "channels" in row]
    assert found
    for row in found:
        aligned = row["channels"] % 16 == 0
        assert row["costs"]["spill_bytes"] <= (0 if aligned else SPILLS_UNALIGNED) and not row["tensor_cores"], row
        assert row["loads_128"] or not aligned, row
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **row["costs"]).blocks_per_sm >= 2, row


def test_what_the_channelwise_design_promises(rows):
    found = [row for row in rows if "channelwise" in row]
    assert found
    for row in found:
        assert row["costs"]["spill_bytes"] <= (0 if row["aligned"] else SPILLS_UNALIGNED) and not row["tensor_cores"], row
        assert row["loads_128"] or not row["aligned"] or row["channelwise"] == "merge", row  # of moments a slot's rows are short
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **row["costs"]).blocks_per_sm >= 4, row


def test_what_the_pointwise_design_promises(rows):
    found = [row for row in rows if "pointwise" in row]
    assert found
    for row in found:
        assert row["costs"]["spill_bytes"] <= (0 if row["aligned"] and is_the_tables_compiler() else SPILLS_FUSED), row
        assert row["tensor_cores"] == (row["dtype"] != "f32") and (row["loads_128"] or not row["aligned"]), row
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **row["costs"]).blocks_per_sm >= 1, row


def test_what_the_dense_design_promises(rows):
    found = [row for row in rows if "dense" in row]
    assert found
    for row in found:
        assert row["costs"]["spill_bytes"] <= (0 if row["aligned"] and is_the_tables_compiler() else SPILLS_FUSED), row
        # Hopper's tf32 products want positions innermost: a filter's gradient gathers them one by one
        one_by_one = not row["aligned"] or (row["dense"] == "wgrad" and row["dtype"] == "tf32")
        assert row["tensor_cores"] == (row["dtype"] != "f32") and (row["copies_128"] or one_by_one), row
        assert row["costs"]["threads"] == 128, row
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **row["costs"]).blocks_per_sm >= 2, row


@pytest.mark.parametrize("family", configurations.OTHERS, ids=lambda family: family.FAMILY)
def test_what_the_other_designs_promise(rows, family):
    """Pooling, the norms over channels, sampling, cross entropy, capsules, the fused MLP, attention."""
    found, multiplies = [row for row in rows if family.FAMILY in row], family.FAMILY in ("mlp", "attention")
    assert found
    for row in found:
        spills = SPILLS_WINDOW if row.get("attention") == "rows" and row["arch"] == "sm_80" else 0
        assert row["costs"]["spill_bytes"] <= (spills if is_the_tables_compiler() else SPILLS_FUSED), row
        wide = row["loads_128"] or (multiplies and row["copies_128"])  # a loop's tiles are copied to shared memory
        assert row["tensor_cores"] == (multiplies and row["dtype"] != "f32") and (wide or not row["aligned"]), row
        # eight warps of the MLP keep 256 sums a row, those of attention its tiles
        assert budgets.Kernel(row["arch"], "triton", row["kernel"], **row["costs"]).blocks_per_sm >= (1 if multiplies else 2), row


def test_every_launch_is_a_compiled_configuration():
    """Whatever supported call the dispatcher gets, what it launches is one of those compiled above, for that size or its like."""
    compiled = set()
    for cell, dtype, H in configurations.configurations():
        torch_dtype = getattr(torch, configurations.TORCH[dtype])
        compiled.add((cell, dtype, launch_config(cell, torch_dtype, 1, H)[1]["BLOCK_H"], H % 16 == 0))
    for cell in GATES:
        for dtype, torch_name in configurations.TORCH.items():
            torch_dtype = getattr(torch, torch_name)
            for H in range(1, 2049):
                if supports(cell, torch_dtype, H) is None:
                    _, config = launch_config(cell, torch_dtype, 17, H)
                    assert (*configurations.stand_in(cell, dtype), config["BLOCK_H"], H % 16 == 0) in compiled


@pytest.mark.parametrize("cell", list(GATES))
def test_every_supported_size_has_a_configuration(cell):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = (MAX_HIDDEN_32BIT if dtype == torch.float32 else MAX_HIDDEN_16BIT)[GATES[cell]]
        for hidden_size in range(1, largest + 1):
            assert supports(cell, dtype, hidden_size) is None
            (programs,), config = launch_config(cell, dtype, 17, hidden_size)
            assert programs * config["BLOCK_B"] >= 17 and config["BLOCK_H"] >= hidden_size
        assert f"up to {largest}" in supports(cell, dtype, largest + 1)


def test_refusals_say_why():
    assert "no such cell" in supports("mgu", torch.float32, 8)
    assert "torch.float64" in supports("lstm", torch.float64, 8)
    assert "hidden size 0" in supports("lstm", torch.float32, 0)
    assert "bytes of shared memory, the device has 101376" in supports("lstm", torch.bfloat16, 128, shared_limit=99 * 1024)
