"""pytest-benchmark's JSON as pyops' benches write it, read into plain records. Whatever is missing is None."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Baseline:
    """A peer timed in the same rounds: `ratio` is its time over ours, so above 1 ours is faster."""

    median: float | None
    ratio: float | None


@dataclass(frozen=True)
class Entry:
    """One benchmark: times are in seconds for one call."""

    op: str
    sample: str
    direction: str
    dtype: str
    backend: str
    median: float | None
    low: float | None
    high: float | None
    rounds: int | None
    bytes: float | None
    flops: float | None
    gbps: float | None
    gflops: float | None
    percent_flops: float | None
    percent_bandwidth: float | None
    peak_bytes: dict[str, float] = field(default_factory=dict)  # "ours" and baselines: the most memory that a call holds
    first_call: dict[str, float] = field(default_factory=dict)  # of fused networks, "ours" and baselines: seconds to a first result
    baselines: dict[str, Baseline] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One JSON file: the machine and its benchmarks."""

    name: str
    machine: dict[str, Any]
    entries: tuple[Entry, ...]

    def baselines(self) -> list[str]:
        """Every baseline's name, in order of first appearance."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.baselines))


def load(path: str | Path) -> Run:
    """Reads one file. Raises ValueError, with the file's name, where it is no pytest-benchmark JSON; FileNotFoundError as usual."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
        benchmarks = data["benchmarks"]
        entries = tuple(_entry(benchmark) for benchmark in benchmarks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a pytest-benchmark JSON file ({type(error).__name__}: {error})") from error
    return Run(path.stem, _machine(data), entries)


def _machine(data: dict[str, Any]) -> dict[str, Any]:
    found = data.get("machine_info") or {}
    ours = dict(found.get("pyops") or {})
    ours.setdefault("device", (found.get("cpu") or {}).get("brand_raw"))
    ours.setdefault("python", found.get("python_version"))
    ours.setdefault("date", (data.get("datetime") or "")[:10] or None)
    return ours


def _entry(benchmark: dict[str, Any]) -> Entry:
    extra, stats = benchmark.get("extra_info") or {}, benchmark.get("stats") or {}
    calls = number(extra.get("calls_per_round")) or 1  # a short call is timed many at a time, and the statistics are of the whole round

    def seconds(name: str) -> float | None:
        value = number(stats.get(name))
        return None if value is None else value / calls

    rounds, median = number(stats.get("rounds")), seconds("median")
    return Entry(
        op=extra.get("op") or benchmark["name"],
        sample=extra.get("sample") or "",
        direction=extra.get("pass") or "",
        dtype=extra.get("dtype") or "",
        backend=extra.get("backend") or "",
        median=number(extra.get("median")) if median is None else median,  # results that are kept have not all of the statistics
        low=seconds("min"),
        high=seconds("max"),
        rounds=None if rounds is None else int(rounds),
        bytes=number(extra.get("bytes")),
        flops=number(extra.get("flops")),
        gbps=number(extra.get("gbps")),
        gflops=number(extra.get("gflops")),
        percent_flops=number(extra.get("percent_of_peak_flops")),
        percent_bandwidth=number(extra.get("percent_of_peak_bandwidth")),
        peak_bytes=_numbers(extra.get("peak_bytes")),
        first_call=_numbers(extra.get("first_call")),
        baselines={
            name: Baseline(number(found.get("median")), number(found.get("ratio")))
            for name, found in (extra.get("baselines") or {}).items()
        },
        skipped=dict(extra.get("skipped") or {}),
    )


def _numbers(values: dict[str, Any] | None) -> dict[str, float]:
    return {name: value for name, found in (values or {}).items() if (value := number(found)) is not None}


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the positive values; None where there is none."""
    logs = [math.log(value) for value in values if value is not None and value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def groups(entries: Iterable[Entry], *keys: str) -> dict[tuple[str, ...], list[Entry]]:
    """Entries by the values of some fields, in order of first appearance."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(tuple(getattr(entry, key) for key in keys), []).append(entry)
    return found
