"""The CUDA kernels of csrc/rnn, executed on the host (csrc/common/cuda_host.h) and compared with a float64 loop.

The very same .cu files are compiled with the host's C++ compiler; threads are fibers in an order drawn from a seed. Nothing here
needs a GPU or a CUDA toolkit. What it cannot see: weak memory ordering, races inside what the model runs atomically, speed.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from .host_execution.harness import (
    CELLS,
    CXX,
    DRIVER,
    DTYPES,
    PATHS,
    PLAIN_FLAGS,
    ROOT,
    SANITIZE,
    SANITIZED_FLAGS,
    Builder,
    Problem,
    assert_as_good_as_eager,
    checked,
    kernel_sources,
    load,
)  # fmt: skip

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this host: set CXX or install g++")


@pytest.fixture(scope="session")
def builder(request, tmp_path_factory):
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return Builder(Path(cache.mkdir("host_execution")) if cache else tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="session")
def library(builder, tmp_path_factory):
    sources = [*kernel_sources(), DRIVER / "driver.cpp", DRIVER / "primitives.cu"]
    return load(builder.link(tmp_path_factory.mktemp("host") / "kernels.so", sources, PLAIN_FLAGS, ["-shared"]))


# ------------------------------------------------------------------------------------------------------------- the tests

SHAPES = {
    # H crosses 16-unit slices, rows fill more than one slice of 8, one row never takes part, one is cut by the clamp
    "ragged": dict(T=6, B=11, H=37, lengths=[6, 0, 3, 1, 6, 2, 5, 4, 6, 1, 2], batch_first=True),
    "reverse": dict(T=5, B=9, H=33, lengths=[5, 2, 0, 4, 1, 5, 3, 2, 5], reverse=True),
    "bare": dict(T=4, B=3, H=48, optional=False, batch_first=True, reverse=True),
    "tiny": dict(T=1, B=1, H=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, path, cell, dtype, shape):
    problem = Problem(cell, dtype, **SHAPES[shape], seed=3)
    runs = []
    for seed, sm_count in ((1, 6), (2, 3)):  # grid: two batch slices, then one of two tiles
        library.host_machine(seed, sm_count, 163 * 1024)
        forward = problem.forward(library, PATHS[path])
        runs.append(forward | problem.backward(library, forward, PATHS[path]))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), f"{name} depends on the order of threads"
    assert_as_good_as_eager(runs[0], problem)


LARGER = [
    ("one_cta", "lstm", torch.bfloat16, 133, 2, 3),  # weights in registers and shared memory
    ("one_cta", "gru", torch.float16, 181, 2, 3),
    ("one_cta", "rnn_tanh", torch.bfloat16, 250, 2, 3),
    ("one_cta", "lstm", torch.float32, 85, 2, 3),
    ("grid", "lstm", torch.bfloat16, 1050, 2, 3),  # more blocks of K per warp than registers hold
    ("grid", "gru", torch.float32, 100, 2, 20),
    ("step", "lstm", torch.float16, 64, 2, 70),  # W_hh read in place; two row blocks
    ("step", "gru_reset_before", torch.float32, 64, 2, 70),
]


@pytest.mark.parametrize("path, cell, dtype, H, T, B", LARGER, ids=lambda v: str(v).replace("torch.", ""))
def test_larger(library, path, cell, dtype, H, T, B):
    library.host_machine(5, 132, 227 * 1024)
    problem = Problem(cell, dtype, T, B, H, lengths=[i % (T + 1) for i in range(B)])
    forward = problem.forward(library, PATHS[path])
    assert_as_good_as_eager(forward | problem.backward(library, forward, PATHS[path]), problem)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_inference_keeps_nothing_and_changes_nothing(library, path, cell):
    library.host_machine(1, 8, 163 * 1024)
    problem = Problem(cell, torch.bfloat16, T=4, B=5, H=35, lengths=[4, 9, 0, -3, 2])  # out of 0..T: clamped
    with_reserve, without = problem.forward(library, PATHS[path]), problem.forward(library, PATHS[path], reserve=False)
    assert all(torch.equal(value, with_reserve[name]) for name, value in without.items())
    problem.lengths = problem.lengths.clamp(0, 4)
    assert all(torch.equal(value, with_reserve[name]) for name, value in problem.forward(library, PATHS[path]).items())


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_the_batch(library, path):
    library.host_machine(1, 8, 163 * 1024)
    problem = Problem("lstm", torch.bfloat16, T=3, B=21, H=40, seed=9)
    whole = problem.forward(library, PATHS[path])["output"]
    problem.gates_x, problem.h0, problem.c0 = problem.gates_x[:, 13:14].contiguous(), problem.h0[13:14], problem.c0[13:14]
    problem.B = 1
    assert torch.equal(problem.forward(library, PATHS[path])["output"][:, 0], whole[:, 13])


def test_choice_of_path(library):
    def choice(cell, dtype, B, H, backward=False, sms=132, shared=227 * 1024):
        number = library.host_choose_path(CELLS[cell], DTYPES[dtype], B, H, int(backward), sms, shared)
        return list(PATHS)[number]

    bf16, f32 = torch.bfloat16, torch.float32
    assert choice("lstm", bf16, 64, 128) == choice("lstm", bf16, 64, 160) == choice("rnn_tanh", bf16, 4, 256) == "one_cta"
    assert choice("lstm", bf16, 16, 768) == choice("lstm", bf16, 32, 2048) == choice("gru", f32, 16, 512) == "grid"
    assert choice("lstm", bf16, 32, 2560) == choice("lstm", bf16, 4096, 1024) == choice("lstm", f32, 8, 2048) == "step"
    assert choice("lstm", bf16, 16, 2048, sms=108, shared=163 * 1024) == "step"
    library.host_machine(1, 2, 163 * 1024)
    with pytest.raises(RuntimeError, match="fewer SMs"):
        Problem("lstm", bf16, 1, 1, 64).forward(library, PATHS["grid"])
    with pytest.raises(RuntimeError, match="too few threads"):
        Problem("lstm", bf16, 1, 1, 300).forward(library, PATHS["one_cta"])


def test_every_kernel_is_registered(library):
    names = ctypes.create_string_buffer(1 << 16)
    count = library.host_kernel_names(names, len(names))
    names = names.value.decode().split("\n")[:-1]
    assert count == len(names) == len(set(names))
    for kernel in ("one_cta", "grid", "step"):
        for direction in ("forward", "backward"):
            for kind in ("lstm", "gru", "gru_before", "rnn"):
                for dtype in ("float", "bf16", "f16"):
                    assert any(n.startswith(f"{kernel}_{direction}<Kind::{kind}, {dtype}") for n in names)


# ------------------------------------------------------------------------------- the model of the machine shows real faults


def array(values, dtype):
    values = np.ascontiguousarray(values, dtype=dtype)
    return values, values.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("by_ldmatrix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix_layouts(library, dtype, by_ldmatrix):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.full((16, 8), float("nan"))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    checked(library.primitive_matmul, *pointers, int(dtype == torch.bfloat16), by_ldmatrix)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_conversions_round_like_torch(library):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    halves = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = ((halves[:-1] + halves[1:]) / 2).numpy().view(np.uint32)  # halfway between neighbouring float16
    values, values_pointer = array(np.concatenate([bits, ties, between]).view(np.float32), np.float32)
    bf16, bf16_pointer = array(np.zeros(len(values)), np.uint16)
    f16, f16_pointer = array(np.zeros(len(values)), np.uint16)
    library.primitive_round(values_pointer, bf16_pointer, f16_pointer, ctypes.c_int64(len(values)))
    finite = ~np.isnan(values)
    for mine, dtype in ((bf16, torch.bfloat16), (f16, torch.float16)):
        theirs = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (mine == theirs)[finite].all()
    every, every_pointer = array(np.arange(2**16), np.uint16)
    wide = [array(np.zeros(2**16), np.float32) for _ in range(2)]
    library.primitive_widen(every_pointer, wide[0][1], wide[1][1], ctypes.c_int64(2**16))
    for (mine, _), dtype in zip(wide, (torch.bfloat16, torch.float16), strict=True):
        theirs = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(mine, theirs)


def test_shuffles_and_asynchronous_copies(library):
    values, values_pointer = array(np.arange(256) + 1.0, np.float32)
    out, out_pointer = array(np.zeros(256), np.float32)
    library.host_machine(1, 1, 163 * 1024)
    checked(library.primitive_warp_sum, values_pointer, out_pointer)
    assert out[0] == values[:32].sum() and out[1] == values[5]
    checked(library.primitive_reverse, values_pointer, out_pointer, 1)
    np.testing.assert_array_equal(out, values[::-1])
    checked(library.primitive_reverse, values_pointer, out_pointer, 0)
    assert np.isnan(out).all()  # read before the wait: the copies have not landed


@pytest.mark.parametrize(
    "kind, message",
    [(0, "40 of 64 threads reached __syncthreads"), (1, "1 of 32 threads reached __syncwarp"),
     (2, "threads that must go together"), (3, "64 threads wait for a flag")],
)  # fmt: skip
def test_divergence_and_deadlock_are_errors(library, kind, message):
    library.host_machine(1, 1, 163 * 1024)
    with pytest.raises(RuntimeError, match=message):
        checked(library.primitive_diverged, kind)


def planted(tmp_path, name, old, new, occurrence=0):
    """A copy of the sources in which one piece of one kernel file is replaced."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/rnn" / name
    parts = source.read_text().split(old)
    assert len(parts) > occurrence + 1, f"{name} no longer contains {old!r}"
    source.write_text(old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :]))
    return source


LAST_BARRIER = "    }\n    __syncthreads();\n  }\n"  # ends a step of one_cta_forward: h of this step is written


def with_planted(builder, source, extra, target, flags, link_flags):
    rest = [s for s in kernel_sources() if s.name != source.name]
    return builder.link(target, [source, *rest, *extra], flags, link_flags)


def test_a_missing_barrier_is_caught(library, builder, tmp_path):
    source = planted(tmp_path, "one_cta_forward.cu", LAST_BARRIER, "    }\n  }\n")
    driver = [DRIVER / "driver.cpp"]
    faulty = load(with_planted(builder, source, driver, tmp_path / "faulty.so", PLAIN_FLAGS, ["-shared"]))
    problem = Problem("lstm", torch.float32, T=4, B=8, H=64)
    library.host_machine(1, 1, 163 * 1024)
    right = problem.forward(library, PATHS["one_cta"])["output"]
    caught = 0
    for seed in range(4):
        faulty.host_machine(seed, 1, 163 * 1024)
        caught += not torch.equal(problem.forward(faulty, PATHS["one_cta"])["output"], right)
    assert caught, "no schedule showed the missing barrier"


def test_a_barrier_not_reached_by_all_is_a_deadlock(builder, tmp_path):
    half = LAST_BARRIER.replace("__syncthreads()", "if (threadIdx.x < 32) __syncthreads()")
    source = planted(tmp_path, "one_cta_forward.cu", LAST_BARRIER, half)
    driver = [DRIVER / "driver.cpp"]
    faulty = load(with_planted(builder, source, driver, tmp_path / "faulty.so", PLAIN_FLAGS, ["-shared"]))
    faulty.host_machine(1, 1, 163 * 1024)
    with pytest.raises(RuntimeError, match=r"deadlock: .*32 of 64 threads reached __syncthreads"):
        Problem("lstm", torch.bfloat16, T=3, B=8, H=32).forward(faulty, PATHS["one_cta"])


@pytest.fixture(scope="session")
def sanitizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}")
    command = [CXX, *SANITIZE, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    works = subprocess.run(command, capture_output=True).returncode == 0
    if not works or subprocess.run([str(folder / "empty")], capture_output=True).returncode != 0:
        pytest.skip("the host compiler has no AddressSanitizer")


def run_memory_check(program, *arguments):
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*kernel_sources(), DRIVER / "memory_check.cpp"]
    program = builder.link(tmp_path / "memory_check", sources, SANITIZED_FLAGS, SANITIZE)
    done = run_memory_check(program)
    assert done.returncode == 0 and "72 cases clean" in done.stdout, done.stdout + done.stderr[:4000]


def test_an_overrun_is_caught_with_file_and_line(sanitizers, builder, tmp_path):
    source = planted(tmp_path, "one_cta_forward.cu", "if (b < p.B) hidden[", "if (b <= p.B) hidden[")
    checker = [DRIVER / "memory_check.cpp"]
    program = with_planted(builder, source, checker, tmp_path / "memory_check", SANITIZED_FLAGS, SANITIZE)
    done = run_memory_check(program, PATHS["one_cta"], CELLS["rnn_tanh"], DTYPES[torch.float32])
    line = 1 + source.read_text().split("if (b <= p.B) hidden[")[0].count("\n")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"one_cta_forward.cu:{line}" in done.stderr, done.stderr[:4000]
