"""What the compiled CUDA kernels cost, without a GPU: registers, spills, stack, occupancy, and the instructions the design wants.

What cuobjdump reads from each csrc/**/*.cu, compiled for sm_80 and sm_90a, is held against pyops/kernel_budgets.json. After a
deliberate change, write a new table with `python -m tests.test_kernel_budgets` and read its diff.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from pyops import kernels as budgets

from .budgets import REGISTER_SLACK, compare, cuobjdump, local_memory_traffic, sass
from .host_execution.harness import ROOT, kernel_sources, nvcc, plain_name

ARCHITECTURES = list(budgets.ARCHITECTURES)


@cache
def enumerators() -> dict[str, list[str]]:
    """{"Kind": ["lstm", "gru", ...]}, from the headers: ptxas and the demangler give numbers."""
    found = {}
    for header in [*(ROOT / "csrc").glob("**/*.h"), *(ROOT / "csrc").glob("**/*.cuh")]:
        for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", header.read_text()):
            found[name] = re.findall(r"(\w+)\s*(?:=\s*\d+\s*)?(?:,|$)", re.sub(r"//.*", "", body).strip())
    return found


def demangled(names: list[str]) -> list[str]:
    """_ZN..one_cta_forwardILNS0_4KindE0ENS_4bf16ELi8EEE.. -> one_cta_forward<lstm, bf16, 8>, as the registry has it."""
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt: install binutils")
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        line = re.sub(r"\((?:\w+::)+(\w+)\)(\d+)", lambda enum: enumerators()[enum[1]][int(enum[2])], line)
        line = re.sub(r"\((?:bool|int)\)", "", line).replace("(anonymous namespace)::", "").removeprefix("void ")
        kernel = line[: line.index(">(") + 1] if ">(" in line else line.split("(")[0]
        found.append(plain_name(re.sub(r"\bfalse\b", "false", kernel)))
    return found


def compile_kernels(source: Path, architecture: str, folder: Path) -> Path:
    """The cubin's path."""
    cubin = folder / f"{source.parent.name}.{source.stem}.{architecture}.cubin"
    command = [nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return cubin


def built_kernels(source: Path, architecture: str, folder: Path) -> Path | None:
    """The cubin within the object that building the extension left behind, where it is newer than all sources: saves compiling again."""
    built = (ROOT / "build/cuda" / source.relative_to(ROOT / "csrc")).with_suffix(".cu.o")
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    if not built.exists() or built.stat().st_mtime < newest:
        return None
    out = folder / f"{source.parent.name}.{source.stem}.{architecture}"
    out.mkdir()
    subprocess.run([cuobjdump(), "--extract-elf", architecture, str(built)], cwd=out, capture_output=True, check=True)
    return next(out.glob("*.cubin"), None)


def costs(cubin: Path) -> dict[str, dict[str, int]]:
    """{kernel: its costs}. Spilled registers lie on the stack, where no kernel has anything else."""
    report = subprocess.run([cuobjdump(), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", report)
    names = demangled([name for name, _, _ in found])
    return {
        name: {"registers": int(registers), "spill_bytes": int(stack), "stack_bytes": int(stack)}
        for name, (_, registers, stack) in zip(names, found, strict=True)
    }


def compile_all(folder: Path) -> dict[tuple[Path, str], Path]:
    """{(source, architecture): cubin}"""
    jobs = [(source, architecture) for source in kernel_sources() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda job: built_kernels(*job, folder) or compile_kernels(*job, folder), jobs)
        return dict(zip(jobs, cubins, strict=True))


def measured(compiled) -> dict[tuple[str, str], dict]:
    return {(arch, kernel): found for (_, arch), cubin in compiled.items() for kernel, found in costs(cubin).items()}


def release(text: str) -> str:
    """ "13.0" of "Cuda compilation tools, release 13.0, V13.0.88": what may change registers."""
    return re.search(r"release (\d+\.\d+)", text)[1]


def ptxas() -> str:
    return release(subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or put nvcc on PATH")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: install triton, which ships it, or the CUDA toolkit")
    return compile_all(tmp_path_factory.mktemp("cubins"))


def slack() -> dict[str, int]:
    """The table is exact for the compiler that made it. Under another one, registers may differ further; spills may not."""
    return {"registers": REGISTER_SLACK if ptxas() == budgets.compilers()["ptxas"] else 4 * REGISTER_SLACK}


def test_kernels_keep_their_budgets(compiled):
    changed = compare(budgets.load(), measured(compiled), "cuda", slack())
    assert not changed, "python -m tests.test_kernel_budgets writes a new table, where this is meant:\n" + "\n".join(changed)


def test_no_kernel_spills_and_every_one_can_be_launched():
    """Weights stay on chip for a whole sequence: a spill would put them, or what displaces them, into local memory."""
    for row in budgets.load():
        assert row.blocks_per_sm >= 1, f"{row.arch} {row.kernel} cannot be launched"
        if row.backend == "cuda":
            assert row.spill_bytes == 0 and row.stack_bytes == 0, row


def test_a_planted_spill_is_named(compiled, tmp_path):
    """A copy of the sources that asks for four resident blocks: the failure says which kernel spills, what it was and what it is."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header, bounds = tmp_path / "csrc/common/device.cuh", "__launch_bounds__(max_threads, 1)"
    text = header.read_text()
    assert bounds in text
    header.write_text(text.replace(bounds, "__launch_bounds__(max_threads, 4)"))
    starved = costs(compile_kernels(tmp_path / "csrc/rnn/step_forward.cu", "sm_80", tmp_path))
    found = measured(compiled) | {("sm_80", kernel): cost for kernel, cost in starved.items()}
    spilled = {kernel: cost["spill_bytes"] for kernel, cost in starved.items() if cost["spill_bytes"]}
    assert spilled
    changed = compare(budgets.load(), found, "cuda", slack())
    for kernel, spill in spilled.items():
        assert f"sm_80 cuda {kernel}: spill_bytes was 0, is {spill}" in changed


# ------------------------------------------------------------------------------------------------------------ the instructions


def is_16bit(kernel: str) -> bool:
    return any(dtype in kernel for dtype in ("bf16", "f16"))


def multiplies(kernel: str, text: str) -> list[str]:
    if is_16bit(kernel):
        return [] if "HMMA.16816.F32" in text else ["16-bit products must run on tensor cores"]
    return [] if "FFMA" in text and "HMMA" not in text else ["float32 products must not be rounded to what tensor cores take"]


def reads_exchange_past_l1(kernel: str, text: str) -> list[str]:
    return [] if "LDG.E.128.STRONG.GPU" in text else ["no 128-bit global loads past L1"]


def copies_asynchronously(kernel: str, text: str) -> list[str]:
    return [] if "LDGSTS.E.BYPASS.128" in text else ["no 128-bit asynchronous copies from global memory"]


def reads_shared_128(kernel: str, text: str) -> list[str]:
    return [] if "LDS.128" in text else ["no 128-bit loads from shared memory"]


def computes_in_float32(kernel: str, text: str) -> list[str]:
    return [] if "FFMA" in text and "HMMA" not in text else ["products and sums must be float32's own"]


def reads_vectors(kernel: str, text: str) -> list[str]:
    """Images in vectors of the V channels that the instance is made for: 16 bytes where it has as many."""
    dtype, V = kernel.split("<")[1].split(", ")[:2]
    bits = 8 * int(V.rstrip(">")) * (4 if dtype == "f32" else 2)
    return [] if bits <= 32 or f"LDG.E.{bits}" in text else [f"no {bits}-bit loads from global memory"]


def writes_vectors(kernel: str, text: str) -> list[str]:
    return reads_vectors(kernel, text.replace("LDG", "").replace("STG", "LDG"))


def multiplies_as_named(kernel: str, text: str) -> list[str]:
    """pointwise_tile<dtype, product, positions>"""
    product = kernel.split(", ")[1]
    if product == "fma":
        return computes_in_float32(kernel, text)
    wanted = {"mma": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}[product]
    return [] if wanted in text else [f"{product} products must run on tensor cores"]


def multiplies_and_convolves(kernel: str, text: str) -> list[str]:
    """expand_depthwise<dtype, product, kernel size, stride>: a product on tensor cores, then a float32 convolution."""
    faults = multiplies_as_named(kernel, text)
    return faults if "FFMA" in text else [*faults, "the depthwise part must be float32's own"]


def multiplies_in_registers(kernel: str, text: str) -> list[str]:
    """mlp_rows<dtype, width, groups>: both products on tensor cores, the hidden rows between them in registers."""
    faults = [] if ("HMMA.16816.F32" if is_16bit(kernel) else "HMMA.1688.F32.TF32") in text else ["products must run on tensor cores"]
    return faults + (["hidden rows must not pass through shared memory"] if re.search(r"\bSTS\b", text) else [])


def reads_rows_128(kernel: str, text: str) -> list[str]:
    return [] if "LDG.E.128" in text else ["no 128-bit loads from global memory"]


def writes_rows_128(kernel: str, text: str) -> list[str]:
    return [] if "STG.E.128" in text else ["no 128-bit stores to global memory"]


def multiplies_from_shared_blocks(kernel: str, text: str) -> list[str]:
    """Attention: keys as they are and values transposed, four 8x8 matrices at once, to tensor cores."""
    faults = multiplies(kernel, text)
    return faults + [f"no {name} of four matrices" for name in ("LDSM.16.M88.4", "LDSM.16.MT88.4") if name not in text]


def uses_exp2(kernel: str, text: str) -> list[str]:
    return [] if "MUFU.EX2" in text else ["exponentials must be the special function unit's own"]


def copies_whole_pieces(kernel: str, text: str) -> list[str]:
    """dense_wgrad_tile<dtype, product, whether channels come in whole pieces of 16 bytes>"""
    return copies_asynchronously(kernel, text) if kernel.endswith("true>") else []


def reads_pieces(kernel: str, text: str) -> list[str]:
    """lrn_five<dtype, whether rows>: rows in vectors of 16 bytes"""
    return reads_rows_128(kernel, text) if kernel.endswith("true>") else []


def reads_fours(kernel: str, text: str) -> list[str]:
    """gaussian_sample<dtype, whether rows go in pieces of four>"""
    bits = 64 if is_16bit(kernel) else 128
    return [] if kernel.endswith("false>") or f"LDG.E.{bits}" in text else [f"no {bits}-bit loads from global memory"]


# What a family's design says of each of its kernels. Weights and gates_x of any hidden size are read element by element (rows of
# odd sizes are not 16-byte aligned): 128-bit global loads are for what the kernels lay out themselves.
DESIGN: dict[str, list[Callable[[str, str], list[str]]]] = {
    "one_cta_forward": [multiplies, reads_shared_128],
    "one_cta_backward": [multiplies, reads_shared_128],
    "grid_forward": [multiplies, reads_shared_128, reads_exchange_past_l1],
    "grid_backward": [multiplies, reads_shared_128, reads_exchange_past_l1],
    "step_forward": [multiplies, reads_shared_128, copies_asynchronously],
    "step_backward": [multiplies, reads_shared_128, copies_asynchronously],
    "pack_weights": [],
    "channel_moments_runs": [computes_in_float32, reads_vectors],
    "channel_apply_runs": [computes_in_float32, reads_vectors, writes_vectors],
    "channel_totals_runs": [computes_in_float32, reads_vectors],
    "channel_reduce_runs": [computes_in_float32, reads_vectors],
    "channel_gradient_runs": [computes_in_float32, reads_vectors, writes_vectors],
    "channel_moments_merge": [],
    "channel_sums_merge": [],
    "pool_windows": [computes_in_float32, reads_vectors, writes_vectors],
    "pool_reduce_runs": [computes_in_float32, reads_vectors],
    "pool_gradient_runs": [computes_in_float32, reads_vectors, writes_vectors],
    "lrn_five": [computes_in_float32, reads_pieces],
    "lrn_five_gradient": [computes_in_float32, reads_pieces],
    "lrn_any": [computes_in_float32],
    "lrn_any_shares": [computes_in_float32],
    "lrn_any_gradient": [computes_in_float32],
    "layer_norm_rows": [computes_in_float32, reads_vectors, writes_vectors],
    "layer_norm_rows_gradient": [computes_in_float32, reads_vectors, writes_vectors],
    "layer_norm_rows_sums": [computes_in_float32, reads_vectors],
    "layer_norm_planes": [computes_in_float32],
    "layer_norm_planes_gradient": [computes_in_float32],
    "layer_norm_planes_sums": [computes_in_float32],
    "gaussian_sample": [computes_in_float32, reads_fours],
    "gaussian_sample_gradient": [computes_in_float32, reads_fours],
    "gaussian_merge": [],
    "attention_forward": [multiplies_from_shared_blocks, copies_asynchronously, reads_rows_128, uses_exp2],
    "attention_backward": [multiplies_from_shared_blocks, copies_asynchronously, uses_exp2],
    "attention_blanks": [],
    "attention_fold_bias": [],
    "attention_fold_table": [],
    "attention_merge_shares": [],
    "cross_entropy_rows": [computes_in_float32, reads_vectors, writes_vectors],
    "routing_pass": [computes_in_float32, reads_rows_128],
    "routing_gradient_pass": [computes_in_float32, reads_rows_128],
    "routing_write": [computes_in_float32, reads_rows_128, writes_rows_128],
    "routing_finish": [],
    "mlp_rows": [multiplies_in_registers, reads_shared_128, copies_asynchronously, reads_rows_128],
    "mlp_pack_pieces": [],
    "pointwise_tile": [multiplies_as_named, reads_rows_128, reads_shared_128, copies_asynchronously],
    "pointwise_pack": [],
    "expand_depthwise": [multiplies_and_convolves, reads_shared_128, copies_asynchronously],
    "dense_tile": [multiplies_as_named, reads_shared_128, copies_asynchronously],
    "dense_halo": [multiplies_as_named, reads_shared_128, copies_asynchronously],
    "dense_pack": [],
    "dense_wgrad_tile": [multiplies_as_named, copies_whole_pieces],
    "dense_wgrad_sum": [],
    "depthwise_conv_forward": [computes_in_float32, reads_vectors, writes_vectors],
    "depthwise_conv_gradient": [computes_in_float32, reads_vectors, writes_vectors],
    "depthwise_backward_fused": [computes_in_float32, reads_vectors, writes_vectors],
    "depthwise_grad_input": [computes_in_float32, reads_vectors, writes_vectors],
    "depthwise_grad_weight": [computes_in_float32, reads_vectors],
    "depthwise_means": [],
    "depthwise_reduce": [],
}


def design_faults(kernel: str, text: str) -> list[str]:
    """What in a kernel's machine code is not as its design says."""
    faults = [f"{kernel}: local-memory traffic, {word}" for word in local_memory_traffic(text)[:1]]
    return faults + [f"{kernel}: {fault}" for rule in DESIGN[kernel.split("<")[0]] for fault in rule(kernel, text)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_is_as_designed(compiled, architecture):
    faults, seen = [], set()
    for (_, arch), cubin in compiled.items():
        if arch == architecture:
            listing = sass(cubin)
            for kernel, text in zip(demangled(list(listing)), listing.values(), strict=True):
                seen.add(kernel)
                faults += design_faults(kernel, text)
    assert not faults, "\n".join(faults)
    assert seen == {kernel for arch, kernel in measured(compiled) if arch == architecture}


def test_the_instruction_rules_bite():
    good = "HMMA.16816.F32.BF16 R0 LDS.128 R4 LDGSTS.E.BYPASS.128 [R1]"
    assert not design_faults("step_forward<lstm, bf16, 0>", good)
    for removed, fault in (("HMMA.16816", "tensor cores"), ("LDS.128", "shared memory"), ("LDGSTS", "asynchronous copies")):
        assert fault in design_faults("step_forward<lstm, bf16, 0>", good.replace(removed, "NOP"))[0]
    assert "local-memory traffic, STL.64" in design_faults("step_forward<lstm, bf16, 0>", good + " STL.64 [R1]")[0]
    assert "float32 products" in design_faults("one_cta_forward<lstm, f32, 12>", good)[0]
    assert "mma products" in design_faults("pointwise_tile<bf16, mma, 32>", good.replace("HMMA", "FFMA"))[0]
    assert "tf32 products" in design_faults("pointwise_tile<f32, tf32, 32>", good)[0]


def write_table() -> None:
    """A new table from this machine's compilers: nvcc, Triton, and for threads and shared memory the launches on the host."""
    import triton

    from . import test_triton_compile
    from .host_execution.harness import DRIVER, PLAIN_FLAGS, Builder, kernel_table, load
    from .host_execution.test_coverage import EVERY_KERNEL

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        library = load(Builder(folder).link(folder / "kernels.so", [*kernel_sources(), DRIVER / "driver.cpp"], PLAIN_FLAGS, ["-shared"]))
        for launch_all in EVERY_KERNEL.values():
            launch_all(library)
        launches = kernel_table(library)
        rows = []
        for (arch, kernel), found in measured(compile_all(folder)).items():
            launch = launches[kernel]
            rows.append(budgets.Kernel(arch, "cuda", kernel, launch["threads"], **found, shared_bytes=launch["shared_bytes"]))
    triton_costs = test_triton_compile.measured(test_triton_compile.compile_all())
    rows += [budgets.Kernel(arch, "triton", kernel, **found) for (arch, kernel), found in triton_costs.items()]
    budgets.write(rows, {"ptxas": ptxas(), "triton": ".".join(triton.__version__.split(".")[:2])})


if __name__ == "__main__":
    write_table()
    sys.stdout.write(f"wrote {budgets.TABLE}\n")
