"""The commands that look at one network, of the zoo or the user's own: `pyops summary | draw`."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pyops.cli import app, fail, out

if TYPE_CHECKING:
    from torch import nn

Network = Annotated[str, typer.Argument(help="A name of pyops.models.list(), or module:factory, importable from the current directory.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Sizes, 1,3,224,224; 1,16:1000 are numbers below 1000. Once for each input.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="The first size of every input.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="key=value for the factory, as often as needed: num_classes=10.")]
Depth = Annotated[int | None, typer.Option(min=1, help="Do not look into modules this many levels down.")]


@app.command()
def summary(
    network: Network,
    sizes: Inputs = None,
    batch: Batch = None,
    options: Options = None,
    depth: Depth = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A network's layers: sizes, parameters, FLOPs, and which of them run together as one call in inference."""
    from pyops import _summary

    model, inputs = load(network, sizes, batch, options)
    found = run(network, inputs, lambda: _summary.summarize(model, inputs, depth))
    if as_json:
        print(json.dumps(found._asdict() | {"rows": [row._asdict() for row in found.rows]}, indent=1))
        return
    from rich.box import SIMPLE_HEAD
    from rich.measure import Measurement
    from rich.table import Table

    title = f"{network}, input {', '.join(size_of(value) for value in inputs)}; images as height x width x channels"
    table = Table("layer", "type", box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("input", "output", "kernel", "stride", "parameters", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("runs as", no_wrap=True)
    for row in found.rows:
        numbers = (f"{row.parameters:,}" if row.parameters else "-", short(row.flops))
        names = (escape("  " * row.depth + row.name), escape(row.kind))
        table.add_row(*names, row.input, row.output, row.kernel, row.stride, *numbers, row.runs)
    console = out()
    natural = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, natural)  # a row that is cut short would mislead; a narrow terminal folds the lines
    console.print(table)
    frozen = "" if found.trainable == found.parameters else f", {found.trainable:,} of them trainable"
    console.print(f"{found.parameters:,} parameters{frozen}, {found.bytes / 2**20:.1f} MiB; {short(found.flops)} FLOPs (a product and its")
    console.print(f"addition are two, nothing else counts); {found.layers} layers called, {found.calls} calls when they run together")
    if found.unused:
        more = f" and {len(found.unused) - 5} more" if len(found.unused) > 5 else ""
        console.print(f"layers that nobody calls, for what is around them to use or not: {', '.join(found.unused[:5])}{more}", markup=False)


@app.command()
def draw(
    network: Network,
    path: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .svg, .png, .pdf or .dot.")],
    sizes: Inputs = None,
    batch: Batch = None,
    options: Options = None,
    depth: Depth = None,
) -> None:
    """Draws a network: layers and what passes between them, skip connections dashed, a box around layers that run as one call."""
    from pyops import _drawing

    if path.suffix[1:] not in _drawing.FORMATS:
        fail(f"--out: expected a file ending in .{', .'.join(_drawing.FORMATS)}, got {str(path)!r}")
    model, inputs = load(network, sizes, batch, options)
    text = run(network, inputs, lambda: _drawing.source(model, inputs, depth))
    try:
        _drawing.write(text, path)
    except (RuntimeError, OSError) as error:
        fail(str(error), 1)
    out().print(str(path), markup=False, soft_wrap=True)


def load(network: str, sizes: list[str] | None, batch: int | None, options: list[str] | None) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network with random weights, and inputs for it."""
    from torch import nn

    from pyops import models

    chosen = dict(parse_option(option) for option in options or ())
    if ":" in network:
        build, known = imported(network), None
    else:
        try:
            known = models.entry(network)
        except ValueError as error:
            fail(f"{str(error).removeprefix('models: name: ')}; your own: module:factory")
        build = known.build
    if isinstance(build, nn.Module):
        if chosen:
            fail(f"--option: {network} is a module already, not a function that takes options")
        model: Any = build
    else:
        try:
            model = build(**chosen)
        except (TypeError, ValueError) as error:
            fail(f"{network}: {error}")
    if not isinstance(model, nn.Module):
        fail(f"{network}: expected a torch.nn.Module or a function that returns one, got {type(model).__name__}")
    if sizes:
        return model, tuple(made(text, batch) for text in sizes)
    if known is None:
        fail("--input: expected for a network of your own, for example --input 1,3,224,224")
    return model, known.inputs(batch or 1)


def imported(target: str) -> Any:
    """What module:name stands for, with the current directory on the path as in `python -m`."""
    module, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        fail(f"{target}: {error}; expected module:factory, importable from {os.getcwd()}")
    return found


def parse_option(text: str) -> tuple[str, Any]:
    """key=value; what is no Python literal is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        fail(f"--option: expected key=value, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def made(text: str, batch: int | None) -> Any:
    """Normal noise of the sizes, or whole numbers below what follows a colon."""
    import torch

    sizes, colon, limit = text.partition(":")
    try:
        shape, below = [int(size) for size in sizes.split(",")], int(limit) if colon else 1
    except ValueError:
        shape, below = [], 0
    if min([*shape, below], default=0) < 1 or not shape:
        fail(f"--input: expected sizes such as 1,3,224,224, or 1,16:1000 for numbers below 1000; got {text!r}")
    shape[0] = batch or shape[0]
    return torch.randint(below, shape) if colon else torch.randn(shape)


def run(network: str, inputs: tuple[Any, ...], call: Any) -> Any:
    """What `call` makes of the network; its forward may be anyone's and raise anything."""
    try:
        return call()
    except ImportError as error:
        fail(str(error))
    except Exception as error:
        cause = error.__cause__ or error
        fail(f"{network} on {', '.join(size_of(value) for value in inputs)}: {type(cause).__name__}: {cause}", 1)


def size_of(value: Any) -> str:
    return " x ".join(map(str, value.shape))


def short(count: int) -> str:
    """1234567 -> 1.23 M."""
    if not count:
        return "-"
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{letter}" if count < 1000 * limit else f"{count / limit:.0f}{letter}"
    return str(count)
