"""No kernel escapes: each is registered, runs in host execution, and touches the machine through csrc/common alone."""

import ctypes
import re

import pytest

from pyops import kernels as budgets

from ..budgets import differences
from . import (
    attention,
    attention_backward,
    capsule,
    channel,
    channel_norms,
    cross_entropy,
    dense,
    depthwise,
    expand_depthwise,
    gaussian,
    mlp,
    pointwise,
    pool,
    rnn,
)
from .harness import ROOT, kernel_sources, kernel_table


def every_attention(library):
    for operation in (attention, attention_backward):
        operation.every_kernel(library)


def every_convolution(library):
    for operation in (channel, dense, depthwise, expand_depthwise, pointwise, pool):
        operation.every_kernel(library)


def every_linear(library):
    for operation in (cross_entropy, mlp):
        operation.every_kernel(library)


# by family, the folder in csrc/: launches each instance of each of its kernels
EVERY_KERNEL = {
    "attention": every_attention,
    "capsule": capsule.every_kernel,
    "conv": every_convolution,
    "linear": every_linear,
    "norm": channel_norms.every_kernel,
    "rnn": rnn.every_kernel,
    "sampling": gaussian.every_kernel,
}


@pytest.fixture(scope="module")
def table(library):
    library.host_forget_launches()  # those of other tests
    for launch_all in EVERY_KERNEL.values():
        launch_all(library)
    return kernel_table(library)


def device_sources():
    return sorted([*(ROOT / "csrc").glob("**/*.cu"), *(ROOT / "csrc").glob("**/*.cuh")])


def declared(text):
    """The names of the kernels that a source defines."""
    return set(re.findall(r"\bPYOPS_KERNEL\([^)]*\)\s*(\w+)\(", text))


def unproven(table):
    """A line for each registered kernel that nothing runs here: not itself and, Hopper-only, not its portable kernel."""
    lines = []
    for name, row in table.items():
        if row["portable"] is None and not row["launches"]:
            lines.append(f"{name}: no host-execution test launches it")
        elif row["portable"] is not None and not table.get(row["portable"], {}).get("launches"):
            lines.append(f"{name}: Hopper-only, and no host-execution test launches its portable kernel {row['portable']!r}")
    return lines


def test_every_kernel_runs_in_host_execution(table):
    assert not unproven(table), "\n".join(unproven(table))


def test_every_family_is_covered():
    assert {source.parent.name for source in kernel_sources()} == set(EVERY_KERNEL)


def test_every_kernel_is_registered(table, library):
    """A kernel in the sources, or an instance that a launcher picks, is in the registry that tells of registers and proofs."""
    sources = {name for source in device_sources() for name in declared(source.read_text())}
    assert sources == {name.split("<")[0] for name in table}
    text = ctypes.create_string_buffer(1 << 16)
    library.host_unregistered_launches(text, len(text))
    assert not [name for name in text.value.decode().split() if not name.startswith("primitive_")]


def test_launches_keep_their_budgets(table):
    """Threads and shared memory per block, of the launches above. `python -m tests.test_kernel_budgets` writes a new table."""
    changed = []
    for was in budgets.load():
        if was.backend == "cuda" and (row := table.get(was.kernel)) is not None and row["portable"] is None:
            changed += differences(was, {"threads": row["threads"], "shared_bytes": row["shared_bytes"]}, {})
    assert not changed, "\n".join(changed)


def test_the_rule_bites():
    ran, idle = {"portable": None, "launches": 1}, {"portable": None, "launches": 0}
    hopper = {"portable": "a<bf16>", "launches": 0}
    assert not unproven({"a<bf16>": ran, "a_wgmma<bf16>": hopper})
    assert unproven({"a<bf16>": idle}) == ["a<bf16>: no host-execution test launches it"]
    for row in ({}, {"a<bf16>": idle}, {"a<f16>": ran}):
        assert (
            "Hopper-only, and no host-execution test launches its portable kernel 'a<bf16>'"
            in unproven({"a_wgmma<bf16>": hopper, **row})[0]
        )
    assert declared("PYOPS_KERNEL(kWarps* kWarpSize)\na_wgmma(Params p) {}") == {"a_wgmma"}


@pytest.mark.parametrize("source", device_sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kernels_reach_the_machine_through_common_alone(source):
    text = re.sub(r"//.*", "", source.read_text())
    if source.parent.name != "common":
        for own in ("__global__", "__shared__", "<<<", "asm(", "asm volatile", "__device__"):
            assert own not in text, f"{own}: host execution cannot see it; csrc/common has the wrapper"
    elif source.name != "ptx.cuh":
        assert "asm" not in re.findall(r"\w+", text), "inline PTX belongs in ptx.cuh, beside its host twin"
