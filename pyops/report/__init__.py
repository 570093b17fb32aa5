"""Benchmark results as `report.md` and one self-contained `report.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyops.report import figures, page, tables
from pyops.report.results import Run, groups, load

__all__ = ["html", "load", "markdown", "write"]

LEAD = (
    "Times are medians of one call; every baseline is timed in the same rounds as pyops, and a ratio is the median over rounds of its time "
    "over pyops': above 1x pyops is faster. Peaks are measured on the machine: a large GEMM of the dtype and a large copy. "
    "Peak memory is the most that a call's tensors hold at once; a baseline's is a multiple of pyops'."
)


def write(files: Sequence[str | Path], out_dir: str | Path) -> list[Path]:
    """Reads pytest-benchmark JSON files and writes report.md and report.html into `out_dir`, which is created; returns their paths.

    Raises ValueError for no files or a file that is no benchmark JSON.
    """
    if not files:
        raise ValueError("report: expected at least one pytest-benchmark JSON file")
    runs = [load(file) for file in files]
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.md", out / "report.html"]
    for path, text in zip(paths, (markdown(runs), html(runs)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def markdown(runs: Sequence[Run]) -> str:
    """The tables alone."""
    parts = ["# pyops benchmarks", LEAD]
    for run in runs:
        parts += [f"## {name_of(run, runs)}", tables.machine(run).markdown().replace("|  |  |", "| fact | value |", 1)]
        if not run.entries:
            parts.append("No benchmarks in this file.")
            continue
        summary = tables.summary(run)
        for table in (summary, *tables.fused(run)):
            parts += [f"### {table.title}", table.markdown()]
        for (op, direction), entries in groups(run.entries, "op", "direction").items():
            parts += [f"### {' '.join(filter(None, (op, direction)))}", tables.results(entries).markdown()]
        parts += not_run(run)
    return "\n\n".join(parts) + "\n"


def html(runs: Sequence[Run]) -> str:
    """The whole page: tables and charts."""
    body: list[str] = []
    for run in runs:
        body += [page.heading(name_of(run, runs)), page.table(tables.machine(run))]
        if not run.entries:
            body.append(page.paragraph("No benchmarks in this file."))
            continue
        for table in (tables.summary(run), *tables.fused(run)):
            body += [page.heading(table.title, 3), page.table(table)]
        roofs = figures.rooflines(run)
        body += [page.grid(roofs)] if roofs else []
        for (op,), of_op in groups(run.entries, "op").items():
            body.append(page.heading(op))
            for (direction,), entries in groups(of_op, "direction").items():
                body += [page.heading(direction or "all", 3), page.table(tables.results(entries))]
            charts = figures.speedups(run, of_op) + figures.scaling(run, of_op)
            body += [page.grid(charts)] if charts else []
        body += [page.paragraph(line, "note") for line in not_run(run)]
    return page.page("pyops benchmarks", LEAD, body)


def name_of(run: Run, runs: Sequence[Run]) -> str:
    device = run.machine.get("device")
    return f"{device} ({run.name})" if device and len(runs) > 1 else str(device or run.name)


def not_run(run: Run) -> list[str]:
    return [f"Not run: {name}: {reason}" for name, reason in tables.skipped(run).items()]
