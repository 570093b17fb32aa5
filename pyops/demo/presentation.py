"""The demo's result, in the terminal and as one self-contained HTML page."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from pyops.demo.training import DRIFT_FACTOR, Result
from pyops.report import page
from pyops.report.charts import Series, speedup_bars, xy
from pyops.report.tables import Cell, Table, ratio

BLOCKS = "▁▂▃▄▅▆▇█"


def agreed(result: Result) -> str:
    return f"The two agree, and {result.torch.recipe.goal.reached}."


def sparkline(values: list[float]) -> str:
    """One block a value, logarithmic: a loss falls over decades."""
    logs = [math.log(max(value, 1e-12)) for value in values]
    low, high = min(logs), max(logs)
    return "".join(BLOCKS[round((value - low) / (high - low or 1) * (len(BLOCKS) - 1))] for value in logs)


def losses(result: Result, rows: int = 7) -> Table:
    """The two loss curves at a few epochs, the first and the last among them."""
    count = len(result.torch.losses)
    shown = sorted({round(1 + k * (count - 1) / (rows - 1)) for k in range(rows)})
    table = Table("Training loss", ["epoch", result.torch.name, result.pyops.name])
    for epoch in shown:
        table.rows.append([str(epoch), f"{result.torch.losses[epoch - 1]:.5f}", f"{result.pyops.losses[epoch - 1]:.5f}"])
    return table


def comparison(result: Result) -> Table:
    table = Table("Side by side", ["", result.torch.name, result.pyops.name])
    both = (result.torch, result.pyops)
    times = [f"{statistics.median(training.seconds) * 1e3:.1f} ms" for training in both]
    goal = result.torch.recipe.goal
    table.rows.append([goal.name, *(goal.text(training.score) for training in both)])
    table.rows.append([f"{goal.name}, required {'at most' if goal.lower else 'at least'}", goal.text(goal.required), ""])
    table.rows.append(["time of an epoch (median)", *times])
    table.rows.append(["speed-up (median over epochs)", "", ratio(result.ratio)])
    table.rows.append(["speed-up, the middle half of the epochs", "", " to ".join(str(ratio(value)) for value in result.ratio_range)])
    for cost in result.costs:
        table.rows.append([f"{cost.what} ({cost.how})", *(f"{value:.2f} {cost.unit}" for value in (cost.torch, cost.pyops))])
        table.rows.append([f"{cost.what}, torch.nn's over pyops'", "", ratio(cost.ratio)])
    return table


def differences(result: Result) -> Table:
    same_weights: list[list[Cell | str]] = [[what, f"{value:.2e}"] for what, value in result.differences]
    table = Table("Differences after training", ["", "value"], same_weights)
    if not result.torch.recipe.alike:  # each drew random numbers of its own
        return table
    after: list[list[Cell | str]] = [
        ["largest in the scores of the test images", f"{result.output_difference:.2e}"],
        ["largest in the parameters", f"{result.parameter_difference:.2e}"],
        ["parameters, relative L2", f"{result.drift:.2e}"],
        [f"allowed: {DRIFT_FACTOR:.0f} times what rounding alone makes ({result.yardstick:.2e})", f"{DRIFT_FACTOR * result.yardstick:.2e}"],
    ]
    table.rows.extend(after)
    return table


def gate(result: Result) -> Table:
    table = Table(
        "Error against float64 on the same trained weights, in IEEE float32",
        ["relative L2 error of", result.torch.name, result.pyops.name, ""],
    )
    for name, theirs, ours, wrong in result.checks:
        table.rows.append([name, f"{theirs:.2e}", f"{ours:.2e}", Cell("too large", "bad", wrong) if wrong else Cell("ok", "good")])
    return table


def show(result: Result, console: Console) -> None:
    """Prints everything: curves, accuracies, differences, errors, and the verdict."""
    console.print(f"{result.pyops.name}, {result.device} tensors: backend [bold]{result.runs_on}[/]")
    for training in (result.torch, result.pyops):
        console.print(f"loss  {sparkline(training.losses)}  {training.losses[-1]:.5f}  {training.name}", highlight=False)
    for table in (losses(result), comparison(result), differences(result), gate(result)):
        print_table(table, console)
    if result.examples is not None:
        print_table(result.examples, console)
    for failure in result.failures:
        console.print(f"[bold red]failed:[/] {failure}", highlight=False)
    if not result.failures:
        console.print(f"[bold green]{agreed(result)}[/]")


def print_table(table: Table, console: Console) -> None:
    """A report's table in the terminal."""
    styles = {"good": "green", "bad": "red"}
    rich = RichTable(title=table.title or None, title_justify="left")
    for column, header in enumerate(table.headers):
        rich.add_column(header, justify="left" if column < table.labels else "right", overflow="fold")
    for row in table.rows:
        tones = [styles.get(cell.tone) if isinstance(cell, Cell) else None for cell in row]
        rich.add_row(*(f"[{tone}]{cell}[/]" if tone else str(cell) for cell, tone in zip(row, tones, strict=True)))
    console.print(rich)


def write(results: list[Result], path: str | Path) -> Path:
    """Writes the page of a task's results, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(results), encoding="utf-8")
    return path


def html(results: list[Result]) -> str:
    lead = " ".join(result.lead for result in results)
    return page.page("pyops demo", lead, [part for result in results for part in body_of(result)])


def body_of(result: Result) -> list[str]:
    both = ((result.pyops, 0), (result.torch, 1))
    legend = [(training.name, color) for training, color in both]
    # rings around the line's points show where the curves coincide
    curves = [
        Series(t.name, [(k + 1.0, loss, f"{t.name}, epoch {k + 1}: {loss:.5f}") for k, loss in enumerate(t.losses)], color, look)
        for (t, color), look in zip(both, ("line", "rings"), strict=True)
    ]
    times = [
        Series(t.name, [(k + 1.0, s * 1e3, f"{t.name}, epoch {k + 1}: {s * 1e3:.1f} ms") for k, s in enumerate(t.seconds)], color)
        for t, color in both
    ]
    loss_chart = xy(curves, "Training loss", "epoch", result.torch.recipe.loss_name, log_y=True)
    time_chart = xy(times, "Time of an epoch", "epoch", "ms", from_zero=True)
    verdict = [(failure, "bad") for failure in result.failures] or [(agreed(result), "good")]
    figures = [
        page.figure("Training loss", loss_chart, legend, "Same start, same batches."),
        page.figure("Time of an epoch", time_chart, legend, "The two models' epochs alternate."),
    ]
    if result.costs:
        bars: list[tuple[str, list[tuple[str, int, float | None]]]] = [
            (cost.what, [(result.torch.name, 0, cost.ratio)]) for cost in result.costs
        ]
        title = f"{result.torch.name} over {result.pyops.name}"
        figures.append(page.figure(title, speedup_bars(bars, title), caption="To the right pyops takes less."))
    goal = result.torch.recipe.goal
    body = [
        page.tiles(
            [
                *((goal.text(training.score), f"{goal.name}, {training.name}", "") for training, _ in both),
                (str(ratio(result.ratio)), "speed-up of an epoch", ratio(result.ratio).tone),
                (f"{result.parameter_difference:.1e}", "largest difference in a parameter", ""),
            ]
        ),
        *(page.paragraph(text, tone) for text, tone in verdict),
        page.grid(figures),
    ]
    if result.images is not None and result.labels is not None and result.predictions is not None:
        body += [page.heading(f"Test images and what {result.pyops.name} reads"), digits(result.images, result.labels, result.predictions)]
    for table in (*filter(None, [result.examples]), comparison(result), losses(result), differences(result), gate(result)):
        body += [page.heading(table.title), page.table(table)]
    return body


def digits(images: Tensor, labels: Tensor, predictions: Tensor, count: int = 16) -> str:
    """A few test images, the misread ones first, each with what the model reads."""
    wrong = (predictions != labels).nonzero().flatten().tolist()
    shown = (wrong + [k for k in range(len(labels)) if k not in set(wrong)])[:count]
    pixel = 32 / images.shape[-1]
    parts = []
    for place, k in enumerate(shown):
        left = place * 36
        for y, row in enumerate(images[k].tolist()):
            for x, ink in enumerate(row):
                if ink:
                    corner = f'x="{left + pixel * x:.4g}" y="{pixel * y:.4g}"'
                    parts.append(f'<rect {corner} width="{pixel:.4g}" height="{pixel:.4g}" class="mark s0" fill-opacity="{ink:.2f}"/>')
        read, label = int(predictions[k]), int(labels[k])
        answer = "" if read == label else f" ({label})"
        parts.append(f'<text x="{left + 16}" y="42" text-anchor="middle" class="digit">{read}{answer}</text>')
    svg = f'<svg class="chart" viewBox="0 0 {36 * count - 4} 46" role="img" aria-label="test images">{"".join(parts)}</svg>'
    title = f"{len(wrong)} of {len(labels)} are misread"
    return page.figure(title, svg, caption="In brackets: the right answer, where the model is wrong.")
