"""Charts as inline SVG. Colours come from the page's CSS (`page.CSS`), so a chart follows the reader's light or dark mode.

Written by hand and not with matplotlib: its SVG carries fixed colours, so each plot would be embedded twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH = 560
LINE_HEIGHT = 240


@dataclass(frozen=True)
class Series:
    """Named points (x, y, what a tooltip says). `look`: "line" joins them, "plain" without dots, "roof" dashed; "dots", "rings" do not."""

    name: str
    points: list[tuple[float, float, str]]
    color: int = 0
    look: str = "line"


@dataclass(frozen=True)
class Axis:
    """From a data range to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return self.start + ((math.log(value) if self.log else value) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        found: list[float] = []
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in ((1,), (1, 3), (1, 2, 5)):
                if len(found) < 4:
                    found = [k * 10.0**d for d in decades for k in multiples if self.low <= k * 10.0**d <= self.high]
        if len(found) >= 2:
            return found[:: math.ceil(len(found) / 8)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 5))  # also for a logarithmic axis too short for its own ticks
        step = next(step * k for k in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * k) <= 6)
        return [float(f"{k * step:.12g}") for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def axis(values: list[float], start: float, end: float, log: bool, from_zero: bool = False) -> Axis:
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.05, 1.15)
        return Axis(low / margin, high * margin, start, end, True)
    low = min(low, 0.0) if from_zero else low
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero else low - margin, high + margin, start, end, False)


def label(value: float) -> str:
    """A tick's text: 1000 -> 1k, 0.001 -> 0.001."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" {more}>{escape(content)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def speedup_bars(rows: list[tuple[str, list[tuple[str, int, float | None]]]], title: str) -> str:
    """Horizontal bars from 1x: to the right ours is faster. `rows`: (label, [(baseline, colour, ratio or None), ...]).

    The axis is logarithmic, so that twice as fast and twice as slow are equally long.
    """
    found = [value for _, bars in rows for _, _, value in bars if value]
    gutter, bar, gap, foot = 150.0, 13.0, 9.0, 24.0
    across = Axis(min([0.5, *found]) / 1.1, max([2.0, *found]), gutter, WIDTH - 52.0, True)  # room for the numbers
    height = sum(len(bars) * bar + gap for _, bars in rows) + gap
    parts = []
    first, last = math.ceil(math.log2(across.low)), math.floor(math.log2(across.high))
    for power in range(first, last + 1, math.ceil((last - first + 1) / 8)):
        x, number = across(2.0**power), f"{2**power}x" if power >= 0 else f"1/{2**-power}x"
        parts += [rule(x, 0, x, height, "grid"), text(x, height + 15, number, kind="tick")]
    y = gap
    for name, bars in rows:
        parts.append(text(gutter - 10, y + len(bars) * bar / 2 + 4, name, "end", "name"))
        for baseline, color, value in bars:
            if value:
                x, one = across(value), across(1.0)
                tip = f"<title>{escape(name)}: {value:.2f}x as fast as {escape(baseline)}</title>"
                size = f'x="{min(x, one):.1f}" y="{y + 1:.1f}" width="{max(abs(x - one), 1):.1f}" height="{bar - 2:.1f}"'
                parts.append(f'<rect {size} rx="2" class="mark s{color}">{tip}</rect>')
                parts.append(text(max(x, one) + 5, y + bar - 3, f"{value:.2f}x", "start", "value"))
            else:
                parts.append(text(across(1.0) + 5, y + bar - 3, "not measured", "start", "value"))
            y += bar
        y += gap
    parts.append(rule(across(1.0), 0, across(1.0), height, "axis"))
    return svg(WIDTH, height + foot, title, parts)


def xy(series: list[Series], title: str, x_label: str, y_label: str, *, log_x=False, log_y=False, from_zero=False) -> str:
    """Lines and points over two axes; logarithmic axes drop what is not positive."""
    kept = [Series(s.name, [p for p in s.points if (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)], s.color, s.look) for s in series]
    points = [point for s in kept for point in s.points]
    if not points:
        return svg(WIDTH, 40, title, [text(WIDTH / 2, 25, "nothing to plot", kind="name")])
    left, right, top, bottom = 62.0, WIDTH - 14.0, 10.0, LINE_HEIGHT
    across = axis([x for x, _, _ in points], left, right, log_x)
    up = axis([y for _, y, _ in points], bottom, top, log_y, from_zero)
    parts = []
    for tick in across.ticks():
        parts += [rule(across(tick), top, across(tick), bottom, "grid"), text(across(tick), bottom + 16, label(tick), kind="tick")]
    for tick in up.ticks():
        parts += [rule(left, up(tick), right, up(tick), "grid"), text(left - 7, up(tick) + 4, label(tick), "end", "tick")]
    parts += [rule(left, bottom, right, bottom, "axis"), text((left + right) / 2, bottom + 36, x_label, kind="tick")]
    middle = (top + bottom) / 2
    parts.append(text(14, middle, y_label, kind="tick", more=f'transform="rotate(-90 14 {middle:.1f})"'))
    for s in kept:
        placed = [(across(x), up(y), tip) for x, y, tip in s.points]
        if s.look in ("line", "plain", "roof"):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
            parts.append(f'<polyline points="{path}" class="{"roof" if s.look == "roof" else f"line s{s.color}"}"/>')
        if s.look in ("line", "dots", "rings"):
            kind = "ring" if s.look == "rings" else "mark"
            for x, y, tip in placed:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind} s{s.color}"><title>{escape(tip)}</title></circle>')
    return svg(WIDTH, bottom + 44, title, parts)
