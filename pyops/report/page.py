"""The parts of a self-contained HTML page: one string, no scripts, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from pyops.report.tables import Cell, Table

COLORS = 8
LIGHT = ("#0b62c4", "#c2570c", "#157a5c", "#9a3fa5", "#8a6d00", "#b3264a", "#0e7490", "#55606e")
DARK = ("#6cb0ff", "#ff9f5a", "#4fd0a5", "#d78ee2", "#e3c14a", "#ff8095", "#5fd3e6", "#a8b3c2")


def _variables(background: str, panel: str, ink: str, muted: str, edge: str, good: str, bad: str, series: tuple[str, ...]) -> str:
    names = dict(background=background, panel=panel, ink=ink, muted=muted, edge=edge, good=good, bad=bad)
    return ";".join([*(f"--{name}:{value}" for name, value in names.items()), *(f"--s{k}:{value}" for k, value in enumerate(series))])


IN_LIGHT = _variables("#ffffff", "#f5f7f9", "#1b2027", "#5b6672", "#d9dfe5", "#0c7048", "#b0213f", LIGHT)
IN_DARK = _variables("#14181d", "#1c2229", "#e8ecf0", "#9aa6b2", "#343d47", "#5fd6a4", "#ff8c9b", DARK)
CSS = f"""
:root{{color-scheme:light dark;{IN_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{IN_DARK}}}}}
{"".join(f".s{k}{{--c:var(--s{k})}}" for k in range(COLORS))}"""

CSS += """
*{box-sizing:border-box}
body{margin:0;background:var(--background);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}h2{font-size:20px;margin:40px 0 8px;padding-top:16px;border-top:1px solid var(--edge)}
h3{font-size:16px;margin:24px 0 6px}p{max-width:80ch;margin:6px 0}.lead,.note,figcaption{color:var(--muted)}.note{font-size:13px}
.scroll{overflow-x:auto;margin:8px 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:4px 12px;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th.l,td.l{text-align:left}th{color:var(--muted);font-weight:600}tbody tr:hover{background:var(--panel)}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px;margin:12px 0}
figure{margin:0;padding:14px 16px;background:var(--panel);border:1px solid var(--edge);border-radius:8px;min-width:0}
figure h4{margin:0 0 4px;font-size:14px}figcaption{font-size:13px;margin-top:4px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:13px;color:var(--muted)}
.legend i{display:inline-block;width:10px;height:10px;margin-right:6px;border-radius:50%;background:var(--c)}
.chart{display:block;width:100%;height:auto}.chart text{fill:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.chart .tick{fill:var(--muted)}.chart .value{font-size:11px;fill:var(--muted)}.chart .digit{font-size:7px}
.chart .grid{stroke:var(--edge)}.chart .axis{stroke:var(--muted)}.chart .mark{fill:var(--c)}
.chart .ring{fill:var(--panel);stroke:var(--c);stroke-width:2}.chart .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.chart .roof{fill:none;stroke:var(--muted);stroke-width:1.5;stroke-dasharray:5 4}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.tile{padding:10px 16px;background:var(--panel);border:1px solid var(--edge);border-radius:8px}
.tile b{display:block;font-size:22px;line-height:1.2}.tile span{color:var(--muted);font-size:13px}
"""


def page(title: str, lead: str, body: Iterable[str]) -> str:
    """The whole document; `body` is ready HTML, the rest is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(content: Table) -> str:
    def cell(tag: str, column: int, value: Cell | str) -> str:
        found = value if isinstance(value, Cell) else Cell(value)
        kinds = " ".join(filter(None, ("l" if column < content.labels else "", found.tone)))
        tip = f' title="{escape(found.tip)}"' if found.tip else ""
        return f"<{tag}{f' class={kinds!r}' if kinds else ''}{tip}>{escape(found.text)}</{tag}>"

    def row(tag: str, values: Iterable[Cell | str]) -> str:
        return "<tr>" + "".join(cell(tag, column, value) for column, value in enumerate(values)) + "</tr>"

    head = f"<thead>{row('th', content.headers)}</thead>" if any(content.headers) else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(row("td", values) for values in content.rows)}</tbody></table></div>'


def figure(title: str, svg: str, legend: Iterable[tuple[str, int]] = (), caption: str = "") -> str:
    """A chart with its title, its colours' names and a line of explanation."""
    keys = "".join(f'<li><i class="s{color}"></i>{escape(name)}</li>' for name, color in legend)
    return (
        f"<figure><h4>{escape(title)}</h4>{f'<ul class=legend>{keys}</ul>' if keys else ''}{svg}"
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
    )


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers to see first: (value, what it is, tone)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b class="{tone}">{escape(value)}</b><span>{escape(what)}</span></div>' for value, what, tone in facts
        )
        + "</div>"
    )
