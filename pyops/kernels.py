"""What every compiled kernel costs: the table behind `pyops kernels`, which the static budgets of the tests hold.

A row is one kernel on one architecture. `shared_bytes` is static and dynamic shared memory of the largest launch that the tests
make; `blocks_per_sm` and `occupancy` follow from it, the registers and the threads by CUDA's rules. Nothing here needs a GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("kernel_budgets.json")


@dataclass(frozen=True)
class Architecture:
    """What an SM has, and how it is dealt out (CUDA C++ Programming Guide, "Compute Capabilities")."""

    registers: int = 64 * 1024
    threads: int = 2048
    blocks: int = 32
    shared_bytes: int = 164 * 1024
    block_shared_bytes: int = 163 * 1024  # the most one block may ask for
    system_shared_bytes: int = 1024  # taken from every block


ARCHITECTURES = {
    "sm_80": Architecture(),
    "sm_90a": Architecture(shared_bytes=228 * 1024, block_shared_bytes=227 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    arch: str
    backend: str  # "cuda" or "triton"
    kernel: str
    threads: int  # per block, the most it is launched with
    registers: int  # per thread
    spill_bytes: int  # per thread, stores and loads together
    stack_bytes: int  # per thread
    shared_bytes: int  # per block

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks an SM holds at once; 0: the kernel cannot be launched."""
        arch = ARCHITECTURES[self.arch]
        if self.threads > 1024 or self.shared_bytes > arch.block_shared_bytes:
            return 0
        warps = -(-self.threads // 32)
        # A warp's registers come in pieces of 256, and its SM's four parts each hold their own warps.
        registers = -(-max(self.registers, 1) * 32 // 256) * 256
        by_registers = arch.registers // 4 // registers * 4 // warps
        by_shared = arch.shared_bytes // (-(-self.shared_bytes // 128) * 128 + arch.system_shared_bytes)
        return min(arch.blocks, arch.threads // (warps * 32), by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Resident warps, as a part of the most an SM can have."""
        return self.blocks_per_sm * -(-self.threads // 32) * 32 / ARCHITECTURES[self.arch].threads

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "blocks_per_sm": self.blocks_per_sm, "occupancy": round(self.occupancy, 4)}


def load(path: Path = TABLE) -> list[Kernel]:
    return [Kernel(**row) for row in json.loads(path.read_text())["kernels"]]


def compilers(path: Path = TABLE) -> dict[str, str]:
    """The versions the table was made with: {"ptxas": "13.0", "triton": "3.9"}."""
    return json.loads(path.read_text())["compilers"]


def write(kernels: list[Kernel], versions: dict[str, str], path: Path = TABLE) -> None:
    """One line a row, so that a change of the table reads as its diff."""
    rows = sorted(kernels, key=lambda row: (row.arch, row.backend, row.kernel))
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{\n "compilers": {json.dumps(versions)},\n "kernels": [\n{lines}\n ]\n}}\n')


def select(kernels: list[Kernel], pattern: str = "*", arch: str | None = None, backend: str | None = None) -> list[Kernel]:
    """Rows whose kernel contains `pattern`, or matches it where it has * or ?; of one architecture or backend if asked."""
    shape = pattern if any(sign in pattern for sign in "*?") else f"*{pattern}*"
    return [
        row
        for row in kernels
        if fnmatchcase(row.kernel, shape) and arch in (None, row.arch, row.arch.rstrip("a")) and backend in (None, row.backend)
    ]
