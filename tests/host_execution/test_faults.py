"""Planted faults: each kind of mistake that host execution is there to find, made in a copy of a real kernel, is found."""

import os
import shutil
import subprocess

import pytest
import torch

from .harness import DRIVER, PLAIN_FLAGS, ROOT, SANITIZE, SANITIZED_FLAGS, kernel_sources, load
from .rnn import CELLS, DTYPES, PATHS, Problem


def planted(tmp_path, name, old, new):
    """A copy of the checkout's csrc in which one piece of one file of csrc/rnn is replaced."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/rnn" / name
    text = source.read_text()
    assert text.count(old) == 1, f"{name} contains {old!r} {text.count(old)} times"
    source.write_text(text.replace(old, new))
    return source


def faulty_library(builder, tmp_path, *fault):
    source = planted(tmp_path, *fault)
    everything = source.suffix == ".cuh"  # a header: every file of the copy; else that file and the checkout's others
    sources = kernel_sources(tmp_path) if everything else [source, *(s for s in kernel_sources() if s.name != source.name)]
    return load(builder.link(tmp_path / "faulty.so", [*sources, DRIVER / "driver.cpp"], PLAIN_FLAGS, ["-shared"]))


LAST_BARRIER = "    }\n    __syncthreads();\n  }\n"  # ends a step of one_cta_forward: h of this step is written


def test_a_missing_barrier_shows_as_a_difference_between_seeds(library, builder, tmp_path):
    faulty = faulty_library(builder, tmp_path, "one_cta_forward.cu", LAST_BARRIER, "    }\n  }\n")
    problem = Problem("lstm", torch.float32, T=4, B=8, H=64)

    def outputs(library):
        found = []
        for seed in range(4):
            library.host_machine(seed, 1, 163 * 1024)
            found.append(problem.forward(library, PATHS["one_cta"])["output"])
        return found

    right = outputs(library)
    assert all(torch.equal(right[0], other) for other in right)
    assert any(not torch.equal(right[0], other) for other in outputs(faulty)), "no schedule showed the missing barrier"


def test_a_missing_wait_for_asynchronous_copies_is_caught(library, builder, tmp_path):
    """step_product waits for the chunk it is about to multiply: without that it multiplies what has not landed."""
    faulty = faulty_library(builder, tmp_path, "step.cuh", "    ptx::cp_async_wait<kStages - 2>();\n", "")
    problem = Problem("gru", torch.bfloat16, T=2, B=3, H=64)
    for each in (library, faulty):
        each.host_machine(1, 4, 163 * 1024)
    assert torch.isfinite(problem.forward(library, PATHS["step"])["output"]).all()
    assert torch.isnan(problem.forward(faulty, PATHS["step"])["output"]).any()


def test_a_barrier_not_reached_by_all_is_a_deadlock(builder, tmp_path):
    half = LAST_BARRIER.replace("__syncthreads()", "if (threadIdx.x < 32) __syncthreads()")
    faulty = faulty_library(builder, tmp_path, "one_cta_forward.cu", LAST_BARRIER, half)
    faulty.host_machine(1, 1, 163 * 1024)
    with pytest.raises(RuntimeError, match=r"deadlock: .*32 of 64 threads reached __syncthreads"):
        Problem("lstm", torch.bfloat16, T=3, B=8, H=32).forward(faulty, PATHS["one_cta"])


def test_a_grid_barrier_with_too_few_blocks_is_a_deadlock(builder, tmp_path):
    """Launched plainly, blocks need not be resident together: one that waits for another's flag may wait for ever."""
    cooperative = "kGridThreads, shared_bytes, true};"
    faulty = faulty_library(builder, tmp_path, "grid.cuh", cooperative, cooperative.replace("true", "false"))
    faulty.host_machine(1, 108, 163 * 1024)
    with pytest.raises(RuntimeError, match=r"deadlock: .*threads wait for a flag"):
        Problem("lstm", torch.bfloat16, T=3, B=8, H=64).forward(faulty, PATHS["grid"])


def test_a_cooperative_launch_larger_than_the_machine_is_refused(builder, tmp_path):
    guard = "if (ceil_div(H, kTileUnits) > sm_count) return"
    faulty = faulty_library(builder, tmp_path, "scan.cu", guard, guard.replace("> sm_count", "> 1000 * sm_count"))
    faulty.host_machine(1, 2, 163 * 1024)
    with pytest.raises(RuntimeError, match="cooperative launch too large"):
        Problem("lstm", torch.bfloat16, T=1, B=1, H=64).forward(faulty, PATHS["grid"])


# ------------------------------------------------------------------------------------- AddressSanitizer and UBSan


def run_sanitized(program, *arguments):
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*kernel_sources(), DRIVER / "memory_check.cu"]
    program = builder.link(tmp_path / "memory_check", sources, SANITIZED_FLAGS, SANITIZE)
    done = run_sanitized(program)
    assert done.returncode == 0 and "72 cases clean" in done.stdout, done.stdout + done.stderr[:4000]


def test_an_overrun_of_global_memory_is_caught_with_file_and_line(sanitizers, builder, tmp_path):
    source = planted(tmp_path, "one_cta_forward.cu", "if (b < p.B) hidden[", "if (b <= p.B) hidden[")
    rest = [s for s in kernel_sources() if s.name != source.name]
    program = builder.link(tmp_path / "memory_check", [source, *rest, DRIVER / "memory_check.cu"], SANITIZED_FLAGS, SANITIZE)
    done = run_sanitized(program, PATHS["one_cta"], CELLS["rnn_tanh"], DTYPES[torch.float32])
    line = 1 + source.read_text().split("if (b <= p.B) hidden[")[0].count("\n")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"one_cta_forward.cu:{line}" in done.stderr, done.stderr[:4000]


FAULTS = {
    "shared": (1, "heap-buffer-overflow"),
    "local": (2, "index 4 out of bounds"),
    "misaligned": (3, "misaligned address"),
    "global": (4, "heap-buffer-overflow"),
    "undefined": (5, "shift exponent"),
}
DEADLOCK = 6


@pytest.mark.parametrize("kind, message", FAULTS.values(), ids=FAULTS)
def test_a_sanitizer_names_file_and_line(sanitizers, builder, tmp_path, kind, message):
    program = builder.link(tmp_path / "faults", [DRIVER / "faults.cu"], SANITIZED_FLAGS, SANITIZE)
    clean = run_sanitized(program, 0)
    assert clean.returncode == 0 and clean.stdout == "clean: 10\n", clean.stderr[:4000]
    done = run_sanitized(program, kind)
    (line,) = [number for number, text in enumerate((DRIVER / "faults.cu").read_text().splitlines(), 1) if f"fault {kind}:" in text]
    assert done.returncode != 0
    assert message in done.stderr and f"faults.cu:{line}" in done.stderr, done.stderr[:4000]


def test_a_deadlock_ends_a_program_with_its_reason(sanitizers, builder, tmp_path):
    program = builder.link(tmp_path / "faults", [DRIVER / "faults.cu"], SANITIZED_FLAGS, SANITIZE)
    done = run_sanitized(program, DEADLOCK)
    assert done.returncode != 0 and "deadlock: no thread can go on; block 0: 40 of 64 threads reached __syncthreads" in done.stderr
