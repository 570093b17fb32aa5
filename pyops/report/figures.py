"""Which charts a run's benchmarks make."""

from __future__ import annotations

from pyops.report import page
from pyops.report.charts import Series, speedup_bars, xy
from pyops.report.results import Entry, Run, groups
from pyops.report.tables import significant

OURS = 0  # the first colour is ours everywhere


def colors(run: Run) -> dict[str, int]:
    """A baseline has one colour in all of a run's charts."""
    return {name: 1 + k % (page.COLORS - 1) for k, name in enumerate(run.baselines())}


def speedups(run: Run, entries: list[Entry]) -> list[str]:
    """One figure per pass and dtype: ours against each baseline, sample by sample."""
    palette, found = colors(run), []
    several = len({entry.backend for entry in entries}) > 1
    for (direction, dtype), group in groups(entries, "direction", "dtype").items():
        names = [name for name in palette if any(name in entry.baselines for entry in group)]
        if not names:
            continue
        rows = []
        for entry in group:
            bars = [(name, palette[name], entry.baselines[name].ratio if name in entry.baselines else None) for name in names]
            rows.append((f"{entry.sample} {entry.backend}" if several else entry.sample, bars))
        title = " ".join(filter(None, ("Speed-up,", direction, dtype)))
        legend = [(f"vs {name}", palette[name]) for name in names]
        found.append(page.figure(title, speedup_bars(rows, title), legend, "Bars to the right of 1x: pyops is faster. Logarithmic."))
    return found


def scaling(run: Run, entries: list[Entry]) -> list[str]:
    """One figure per pass, dtype and backend with three sizes or more: time over work, ours and the baselines."""
    palette, found = colors(run), []
    for (direction, dtype, backend), group in groups(entries, "direction", "dtype", "backend").items():
        sized = sorted((e for e in group if e.flops and e.median), key=lambda e: e.flops or 0)
        if len({e.flops for e in sized}) < 3:
            continue
        series = []
        for name, color in palette.items():
            points = [
                (e.flops / 1e6, e.baselines[name].median * 1e3, f"{name}, {e.sample}: {significant(e.baselines[name].median * 1e3)} ms")  # type: ignore[operator]
                for e in sized
                if name in e.baselines and e.baselines[name].median
            ]
            if points:
                series.append(Series(name, points, color))
        ours = [(e.flops / 1e6, e.median * 1e3, f"pyops, {e.sample}: {significant(e.median * 1e3)} ms") for e in sized]  # type: ignore[operator]
        series.append(Series(f"pyops ({backend})" if backend else "pyops", ours, OURS))
        title = " ".join(filter(None, ("Time over size,", direction, dtype)))
        chart = xy(series, title, "MFLOP a call", "ms", log_x=True, log_y=True)
        found.append(page.figure(title, chart, [(s.name, s.color) for s in reversed(series)], "Lower is faster. Both axes logarithmic."))
    return found


def peaks(run: Run, entries: list[Entry]) -> tuple[float | None, float | None]:
    """(GFLOP/s, GB/s) for these entries' dtype: what their percentages are of, else the machine's float32 peaks."""
    flops = [100 * e.gflops / e.percent_flops for e in entries if e.gflops and e.percent_flops]
    bandwidth = [100 * e.gbps / e.percent_bandwidth for e in entries if e.gbps and e.percent_bandwidth]
    return max(flops, default=run.machine.get("peak_gflops")), max(bandwidth, default=run.machine.get("peak_gbps"))


def rooflines(run: Run) -> list[str]:
    """One figure per dtype: what each benchmark reaches under the machine's two measured ceilings."""
    ops = list(dict.fromkeys(entry.op for entry in run.entries))
    found = []
    for (dtype,), group in groups(run.entries, "dtype").items():
        placed = [e for e in group if e.flops and e.bytes and e.gflops]
        if not placed:
            continue
        series, intensities = [], [e.flops / e.bytes for e in placed]  # type: ignore[operator]
        peak, bandwidth = peaks(run, placed)
        caption = "Dots: forward, rings: training."
        if peak and bandwidth:
            ridge = peak / bandwidth
            ends = [min(*intensities, ridge) / 1.5, ridge, max(*intensities, ridge) * 1.5]
            series.append(Series("roof", [(x, min(peak, x * bandwidth), "") for x in ends], look="roof"))
            caption = f"Dashed: the measured ceilings, {significant(bandwidth)} GB/s and {significant(peak)} GFLOP/s. " + caption
        for op in ops:
            for direction, look in (("training", "rings"), ("forward", "dots")):
                points = [
                    (e.flops / e.bytes, e.gflops, f"{op} {e.sample} {direction}: {significant(e.gflops)} GFLOP/s")  # type: ignore[operator]
                    for e in placed
                    if e.gflops and e.bytes and e.op == op and (e.direction == "training") == (direction == "training")
                ]
                if points:
                    series.append(Series(op, points, ops.index(op) % page.COLORS, look))
        title = f"Roofline, {dtype}" if dtype else "Roofline"
        chart = xy(series, title, "flops a byte that must move", "GFLOP/s", log_x=True, log_y=True)
        legend = {s.name: s.color for s in series if s.look != "roof"}
        found.append(page.figure(title, chart, legend.items(), caption))
    return found
