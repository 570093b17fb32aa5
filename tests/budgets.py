"""What the static budgets of CUDA and Triton share: how measured costs are held against pyops/kernel_budgets.json."""

import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from pyops.kernels import Kernel

REGISTER_SLACK = 8  # what another minor version of a compiler may do


def differences(was: Kernel, found: dict, slack: dict) -> list[str]:
    """A line for each cost that grew: which kernel, was, is. `slack`: column -> how much more is let pass."""
    lines = []
    for column, value in found.items():
        before = getattr(was, column)
        if value > before + slack.get(column, 0):
            lines.append(f"{was.arch} {was.backend} {was.kernel}: {column} was {before}, is {value}")
    now = Kernel(**{**{name: getattr(was, name) for name in Kernel.__dataclass_fields__}, **found})
    if now.blocks_per_sm < was.blocks_per_sm:
        lines.append(f"{was.arch} {was.backend} {was.kernel}: blocks per SM were {was.blocks_per_sm}, are {now.blocks_per_sm}")
    return lines


def compare(table: list[Kernel], measured: dict[tuple[str, str], dict], backend: str, slack: dict) -> list[str]:
    """Every difference between a backend's rows of the table and what was just compiled: {(arch, kernel): costs}."""
    rows = {(row.arch, row.kernel): row for row in table if row.backend == backend}
    lines = [f"{arch} {backend} {kernel}: not in the table" for arch, kernel in measured.keys() - rows.keys()]
    lines += [f"{arch} {backend} {kernel}: in the table, and no longer compiled" for arch, kernel in rows.keys() - measured.keys()]
    for key in sorted(measured.keys() & rows.keys()):
        lines += differences(rows[key], measured[key], slack)
    return lines


@cache
def cuobjdump() -> str | None:
    spec = find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(shipped) if shipped and shipped.exists() else which("cuobjdump")


def sass(cubin: Path) -> dict[str, str]:
    """{mangled kernel name: its instructions}"""
    listing = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {name.strip(): text for name, _, text in (part.partition("\n") for part in listing.split("Function : ")[1:])}


def local_memory_traffic(instructions: str) -> list[str]:
    """The instructions that touch local memory: spilled registers, or arrays that the compiler could not keep in them."""
    return [word for word in instructions.split() if word.startswith(("LDL", "STL"))]
