"""Benchmarks as tables, for Markdown, HTML and the terminal alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyops.report.results import Entry, Run, geometric_mean, groups

MISSING = "-"
EQUAL = 0.03  # within 3 % either way a ratio is neither good nor bad news


@dataclass(frozen=True)
class Cell:
    """Text, whether it is good or bad news, and what to tell someone who points at it."""

    text: str
    tone: str = ""  # "", "good" or "bad"
    tip: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows of cells under headers; all but the first `labels` columns are numbers."""

    title: str
    headers: list[str]
    rows: list[list[Cell | str]] = field(default_factory=list)
    labels: int = 1

    def markdown(self) -> str:
        def line(cells) -> str:
            return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

        align = ["---" if column < self.labels else "---:" for column in range(len(self.headers))]
        return "\n".join([line(self.headers), line(align), *(line(row) for row in self.rows)])


def significant(value: float | None, digits: int = 3) -> str:
    """Three digits that matter and no exponent: 0.0123, 1.23, 123, 12300."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def ratio(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING)
    tone = "good" if value > 1 + EQUAL else "bad" if value < 1 - EQUAL else ""
    return Cell(f"{value:.2f}x" if value < 100 else f"{value:.0f}x", tone)


def machine(run: Run) -> Table:
    """What was measured on: one line a fact, absent facts left out."""
    first = ("device", "cpu_isa", "threads", "peak_gflops", "peak_gbps")
    names = {
        "cpu_isa": "CPU instruction set",
        "peak_gflops": "measured peak, float32 GEMM (GFLOP/s)",
        "peak_gbps": "measured peak, copy (GB/s)",
        "python": "Python",
    }
    rows: list[list[Cell | str]] = []
    for key in (*first, *(key for key in run.machine if key not in first)):
        value = run.machine.get(key)
        if value is not None:
            rows.append([names.get(key, key), significant(value) if isinstance(value, float) else str(value)])
    return Table("Machine", ["", ""], rows, labels=2)


def summary(run: Run) -> Table:
    """Geometric means of the speed-ups, and how often ours was the fastest."""
    baselines = run.baselines()
    headers = ["op", "pass", "dtype", "samples", *(f"vs {name}" for name in baselines), "fastest"]
    table = Table("Speed-up, geometric mean", headers, labels=3)
    grouped = groups(run.entries, "op", "direction", "dtype")
    for key, entries in (*grouped.items(), *([(("all", "", ""), list(run.entries))] if len(grouped) > 1 else [])):
        means = [ratio(geometric_mean(e.baselines[name].ratio for e in entries if name in e.baselines)) for name in baselines]
        raced = [e for e in entries if fastest_peer(e) is not None]
        won = sum(fastest_peer(e)[1] >= 1 for e in raced)  # type: ignore[index]
        table.rows.append([*key, str(len(entries)), *means, f"{won} of {len(raced)}" if raced else MISSING])
    return table


def fastest_peer(entry: Entry) -> tuple[str, float] | None:
    """(name, its time over ours) of the hardest baseline."""
    ratios = {name: found.ratio for name, found in entry.baselines.items() if found.ratio is not None}
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def results(entries: list[Entry], title: str = "") -> Table:
    """One row a benchmark."""
    baselines = list(dict.fromkeys(name for entry in entries for name in entry.baselines))
    several = len({entry.backend for entry in entries}) > 1
    headers = ["sample", "dtype", *(["backend"] if several else []), "median ms", "GB/s", "GFLOP/s", "of peak"]
    headers += [*(f"vs {name}" for name in baselines), *(["hardest peer"] if baselines else [])]
    measured = any("ours" in entry.peak_bytes for entry in entries)
    peers = list(dict.fromkeys(name for entry in entries for name in entry.peak_bytes if name != "ours")) if measured else []
    headers += ["peak MiB", *(f"memory of {name}" for name in peers)] if measured else []
    table = Table(title, headers, labels=3 if several else 2)
    for entry in entries:
        row: list[Cell | str] = [entry.sample or MISSING, entry.dtype or MISSING, *([entry.backend or MISSING] if several else [])]
        row += [_time(entry), significant(entry.gbps), significant(entry.gflops), _of_peak(entry)]
        for name in baselines:
            found = entry.baselines.get(name)
            if found is None:
                row.append(Cell(MISSING, tip=entry.skipped.get(name, "not measured")))
            else:
                tip = f"{name}: {significant(found.median * 1e3)} ms" if found.median is not None else ""
                row.append(Cell(str(ratio(found.ratio)), ratio(found.ratio).tone, tip))
        if baselines:
            peer = fastest_peer(entry)
            row.append(f"{peer[0]}, {ratio(peer[1])}" if peer else MISSING)
        if measured:
            row += [_memory(entry, "ours"), *(_memory(entry, name) for name in peers)]
        table.rows.append(row)
    return table


def _time(entry: Entry) -> Cell:
    if entry.median is None:
        return Cell(MISSING)
    tip = ""
    if entry.low is not None and entry.high is not None:
        tip = f"{significant(entry.low * 1e3)} to {significant(entry.high * 1e3)} ms"
        tip += f" over {entry.rounds} rounds" if entry.rounds else ""
    return Cell(significant(entry.median * 1e3), tip=tip)


def _memory(entry: Entry, name: str) -> Cell:
    """The most that a call holds: ours in MiB, a baseline's as a multiple of ours."""
    ours, size = entry.peak_bytes.get("ours"), entry.peak_bytes.get(name)
    if size is None or (name != "ours" and not ours):
        return Cell(MISSING)
    mebibytes = significant(size / 2**20)
    return (
        Cell(mebibytes)
        if name == "ours" or not ours
        else Cell(str(ratio(size / ours)), ratio(size / ours).tone, f"{name}: {mebibytes} MiB")
    )


def _of_peak(entry: Entry) -> str:
    """Of whichever ceiling is nearer."""
    shares = [(share, name) for share, name in ((entry.percent_flops, "flops"), (entry.percent_bandwidth, "bytes")) if share is not None]
    return "{:.0f} % {}".format(*max(shares)) if shares else MISSING


def fused(run: Run) -> list[Table]:
    """Of networks after `pyops.fuse` (bench_fuse.py): one for each pass, sample and dtype, with geometric means."""
    entries = [entry for entry in run.entries if entry.first_call]
    return [_fused(f"Fused networks: {', '.join(key)}", found) for key, found in groups(entries, "direction", "sample", "dtype").items()]


def _fused(title: str, entries: list[Entry]) -> Table:
    others = [name for name in dict.fromkeys(name for entry in entries for name in entry.baselines) if not _is_eager(name)]
    starts = ["ours", *(name for name in others if any(name in entry.first_call for entry in entries))]
    measured = any(entry.peak_bytes for entry in entries)
    headers = ["network", "eager ms", "fused ms", "over eager", *(f"over {name}" for name in others)]
    headers += [*(["memory, of eager's"] if measured else []), f"first call, s: {' / '.join(['fused', *starts[1:]])}"]
    table, ratios, shares = Table(title, headers), [], []
    for entry in entries:
        layout = _eager(entry)
        found = [entry.baselines.get(name) for name in (layout, *others)]
        ratios.append([None if peer is None else peer.ratio for peer in found])
        shares.append(_share_of_memory(entry, layout))
        median = found[0].median if found[0] else None
        row: list[Cell | str] = [entry.op, significant(None if median is None else median * 1e3), _time(entry), *map(ratio, ratios[-1])]
        row += [_hundredths(shares[-1])] if measured else []
        table.rows.append([*row, " / ".join(significant(entry.first_call.get(name), 2) for name in starts)])
    means = [ratio(geometric_mean(column)) for column in zip(*ratios, strict=True)]
    table.rows.append(["geometric mean", "", "", *means, *([_hundredths(geometric_mean(shares))] if measured else []), ""])
    return table


def _is_eager(name: str) -> bool:
    return name.split()[0] == "torch.nn"


def _eager(entry: Entry) -> str:
    """The name of eager PyTorch in the better of its layouts; "" where it was not timed."""
    ratios = {name: found.ratio for name, found in entry.baselines.items() if _is_eager(name) and found.ratio is not None}
    return min(ratios, key=ratios.__getitem__) if ratios else ""


def _share_of_memory(entry: Entry, baseline: str) -> float | None:
    ours, theirs = entry.peak_bytes.get("ours"), entry.peak_bytes.get(baseline)
    return ours / theirs if ours is not None and theirs else None


def _hundredths(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def skipped(run: Run) -> dict[str, str]:
    """Baselines that did not run, with each one's first reason."""
    found: dict[str, str] = {}
    for entry in run.entries:
        for name, reason in entry.skipped.items():
            found.setdefault(name, reason)
    return found
