"""The command line: `pyops env | ops | explain | kernels | demo | report`; `bench` is in cli_bench.py, `summary | draw` in cli_models.py.

What a command needs is imported when it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from pyops.testing import OpSpec

HELP = "Kernels for PyTorch: what runs here, and how fast."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")


def main() -> None:
    """The entry point `pyops`."""
    app()


def out() -> Console:
    return Console(file=sys.stdout, highlight=False)


def fail(message: str, code: int = 2) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]pyops:[/] {escape(message)}")
    raise typer.Exit(code)


def one_of(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        fail(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for bug reports and scripts.")] = False) -> None:
    """Versions, the machine, what was built, and which backends can run here."""
    from pyops import _environment

    facts = _environment.collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    console = out()
    for title, rows in environment_rows(facts).items():
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(name, escape(str(value)))
        console.print(table)
    table = Table("backend", "runs on", "why not", title="Backends", title_justify="left")
    for name, found in facts["backends"].items():
        usable = f"[green]{', '.join(found['devices'])}[/]" if found["devices"] else "[yellow]-[/]"
        table.add_row(name, usable, escape(found["reason"] or ""))
    console.print(table)
    for warning in facts["warnings"]:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}")


def environment_rows(facts: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    cpu, cuda, build = facts["cpu"], facts["cuda"], facts["build"]
    gpus = [f"{g['name']}, compute capability {g['capability'][0]}.{g['capability'][1]}, {g['memory_gib']} GiB" for g in cuda["gpus"]]
    built = [
        ("kernels", f"{build['mode']} ({build['why']})"),
        ("loaded", "yes" if build["loaded"] else build["not_loaded"]),
        ("CUDA architectures", ", ".join(build.get("archs") or []) or "none"),
    ]
    labels = {
        "requested": "PYOPS_BUILD",
        "cxx": "C++ compiler",
        "nvcc": "nvcc",
        "cuda_home": "CUDA toolkit",
        "built_with_torch": "built with torch",
        "cpu_isas": "CPU instruction sets",
        "cpu_isa": "in use",
    }
    for key, label in labels.items():
        if build.get(key):
            built.append((label, ", ".join(build[key]) if isinstance(build[key], list) else build[key]))
    return {
        "Versions": [(name, facts[name] or "not installed") for name in ("pyops", "torch", "triton", "python", "platform")],
        "Machine": [
            ("CPU", f"{cpu['model']}, {cpu['cores'] or '?'} cores, {cpu['logical']} logical, torch uses {cpu['threads']} threads"),
            ("GPU", "\n".join(gpus) or "none that PyTorch can use"),
            ("CUDA runtime", cuda["runtime"] or "torch is built without CUDA"),
            ("NVIDIA driver", cuda["driver"] or "none"),
            *facts["variables"].items(),
        ],
        "Build": built,
    }


@app.command()
def ops() -> None:
    """Every op, and the dtypes each backend runs it in."""
    from rich.table import Table

    from pyops.testing import SPECS

    table = Table("op", "backend", *DTYPES, title="Ops", title_justify="left")
    notes: dict[tuple[str, str], list[str]] = {}
    for spec in SPECS.values():
        for name in spec.backends:
            reasons = [cannot(spec, name, dtype) for dtype in DTYPES]
            table.add_row(spec.name, name, *("-" if reason else "[green]yes[/]" for reason in reasons))
            for reason in dict.fromkeys(filter(None, reasons)):
                notes.setdefault((name, reason), []).append(spec.name)
        table.add_section()
    console = out()
    console.print(table)
    for (name, reason), names in notes.items():
        where = "" if len(names) == len(SPECS) else f" ({', '.join(names)})"
        console.print(f"[bold]{name}[/]{where}: {escape(reason)}", soft_wrap=True)


def cannot(spec: OpSpec, backend: str, dtype: str) -> str | None:
    """Why a backend cannot run the op's first sample in dtype on its own device, or None."""
    import torch

    import pyops
    from pyops._environment import HOME

    if getattr(torch, dtype) not in spec.dtypes:
        return f"no {dtype}"
    arguments, keywords = sample_arguments(spec, spec.samples[0].id, dtype, HOME[backend])
    row = dict(pyops.explain(spec.name, *arguments, **keywords).rows)[backend]
    if row.startswith("cannot: "):
        return row.removeprefix("cannot: ")
    needs_gpu = HOME[backend] == "cuda" and not torch.cuda.is_available()
    return "PyTorch sees no CUDA GPU" if needs_gpu else None


def sample_arguments(spec: OpSpec, sample: str, dtype: str, device: str) -> tuple[tuple, dict]:
    """A registry sample's arguments as fake tensors: no memory, and CUDA ones without a GPU."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    ids = [found.id for found in spec.samples]
    if sample not in ids:
        fail(f"--sample: {spec.name} has {', '.join(ids)}; got {sample!r}")
    made, keywords = spec.samples[ids.index(sample)].make(getattr(torch, dtype), "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return tuple(map(fake, value)) if isinstance(value, tuple) else value

        return fake(made), {name: fake(value) for name, value in keywords.items()}


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="A public function of pyops, for example fused_lstm.")],
    device: Annotated[str, typer.Option(help="cpu or cuda; needs no GPU.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    seq: Annotated[int | None, typer.Option(help="Steps of a sequence (recurrent ops).")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows (recurrent ops).")] = None,
    input_size: Annotated[int | None, typer.Option("--input", help="Input features (recurrent ops).")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden units (recurrent ops).")] = None,
    sample: Annotated[str | None, typer.Option(help="A sample of the op's registry, instead of sizes.")] = None,
    backend: Annotated[str | None, typer.Option(help="Ask for one by name.")] = None,
) -> None:
    """Which backend a call would run on, and why not the others. Runs nothing and allocates nothing."""
    import pyops
    from pyops.testing import SPECS

    one_of(device, DEVICES, "--device")
    one_of(dtype, DTYPES, "--dtype")
    spec = SPECS[one_of(op, tuple(SPECS), "OP")]
    sizes = {"seq": seq, "batch": batch, "input": input_size, "hidden": hidden}
    if sample is None and spec.family == "rnn":
        arguments, keywords = recurrent_arguments(spec, dtype, device, sizes)
    elif any(size is not None for size in sizes.values()):
        fail("--seq, --batch, --input and --hidden are for recurrent ops without --sample")
    else:
        arguments, keywords = sample_arguments(spec, sample or spec.samples[0].id, dtype, device)
    try:
        out().print(str(pyops.explain(op, *arguments, **keywords, backend=backend)), markup=False, soft_wrap=True)
    except ValueError as error:
        fail(str(error))


def recurrent_arguments(spec: OpSpec, dtype: str, device: str, sizes: dict[str, int | None]) -> tuple[tuple, dict]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if any(size is not None and size < 0 for size in sizes.values()) or sizes["hidden"] == 0:
        fail("sizes: expected 0 or more, and --hidden 1 or more")
    T, B, I, H = (default if size is None else size for size, default in zip(sizes.values(), (64, 16, 256, 256), strict=True))
    (x, _, _, weight_hh, *_), _ = spec.samples[0].make(torch.float32, "cpu")
    G = weight_hh.shape[0] // weight_hh.shape[1]
    with FakeTensorMode():
        shapes = ((B, I) if x.dim() == 2 else (T, B, I)), (G * H, I), (G * H, H)
        x, weight_ih, weight_hh = (torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape in shapes)
    return (x, None, weight_ih, weight_hh), {}


@app.command()
def kernels(
    pattern: Annotated[str, typer.Argument(help="Only kernels whose name contains this, or matches it where it has * or ?.")] = "*",
    arch: Annotated[str | None, typer.Option(help="Only this architecture, for example sm_80.")] = None,
    backend: Annotated[str | None, typer.Option(help="cuda or triton.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a list of rows.")] = False,
) -> None:
    """What every compiled kernel costs: registers, spills, stack, shared memory, occupancy. A table kept by the tests; needs no GPU."""
    from pyops import kernels as found

    rows = found.load()
    if arch is not None:
        one_of(arch, tuple(dict.fromkeys(name for a in found.ARCHITECTURES for name in (a, a.rstrip("a")))), "--arch")
    if backend is not None:
        one_of(backend, ("cuda", "triton"), "--backend")
    rows = found.select(rows, pattern, arch, backend)
    if not rows:
        fail(f"no kernel matches {pattern!r}; `pyops kernels` lists them all", 1)
    if as_json:
        print(json.dumps([row.facts() for row in rows], indent=1))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("threads", "registers", "spill", "stack", "shared", "blocks/SM", "occupancy")
    console = out()
    console.width = max(console.width, 110)  # a figure cut short would mislead; a narrow terminal folds the lines
    for name, side in dict.fromkeys((row.arch, row.backend) for row in rows):
        table = Table("kernel", box=SIMPLE_HEAD, title=f"{name}, {side}; spill, stack, shared in bytes", title_justify="left")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if (row.arch, row.backend) == (name, side):
                spill = f"[yellow]{row.spill_bytes}[/]" if row.spill_bytes else "0"
                costs = (row.threads, row.registers, spill, row.stack_bytes, row.shared_bytes, row.blocks_per_sm, f"{row.occupancy:.0%}")
                table.add_row(escape(row.kernel), *map(str, costs))
        console.print(table)
    console.print("compiled by " + ", ".join(f"{tool} {version}" for tool, version in found.compilers().items()), markup=False)


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="sequence: a recurrent layer; images: a network of EfficientNet's blocks; vit: a ViT, then a Swin. Networks of "
            "pyops.models: lenet, resnet, hybrid, capsnet and vae on digits; characters: a language model; translation: number words."
        ),
    ] = "sequence",
    cell: Annotated[str | None, typer.Option(help="Of sequence: lstm (default), gru or rnn.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: what the task needs; with --data one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Ask for one by name; default: pyops chooses.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads for both models. Default: torch's, but 1 for sequence and text, which gain nothing from more."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the batches.")] = 0,
    data: Annotated[Path | None, typer.Option(help="A folder of MNIST's four files; default: scikit-learn's digits, enlarged.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep the training's state in this file after each epoch, and go on from it. Of pyops.models' networks."),
    ] = None,
    out_path: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("pyops-demo/index.html"),
) -> None:
    """Trains a network with torch.nn and with pyops, side by side: same results, and what it saves.

    Exits with 1 where the two disagree beyond rounding or do not learn, and with 130 when it is stopped by Ctrl-C.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pyops import demo as found

    one_of(task, tuple(found.EPOCHS), "--task")
    if cell is not None:
        one_of(cell, tuple(found.CELLS), "--cell")
    one_of(device, DEVICES, "--device")
    try:
        run = found.runner(task, cell, data, checkpoint)
    except ValueError as error:
        fail(str(error))
    require_gpu(device)
    console = out()
    if threads is not None or task in found.SMALL:
        torch.set_num_threads(threads or 1)
    epochs = epochs or (found.EPOCHS[task] if data is None else 1)
    columns = (
        TextColumn("training both models"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=2 * epochs * found.RACES.get(task, 1))
            result = run(device, epochs, backend, seed, lambda: progress.advance(bar))
    except KeyboardInterrupt:
        kept = checkpoint is not None and checkpoint.exists()
        console.print(
            f"stopped; {checkpoint} has all finished epochs: the same command goes on from there" if kept
            else "stopped; nothing is kept without --checkpoint FILE", markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(130) from None
    except ValueError as error:
        fail(str(error))
    results = result if isinstance(result, list) else [result]
    for each in results:
        found.show(each, console)
    console.print(f"page: {found.write(results, out_path)}", markup=False, soft_wrap=True)
    if any(each.failures for each in results):
        raise typer.Exit(1)


def require_gpu(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA GPU here; see `pyops env`")


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="JSON files of pyops bench, or of pytest bench --benchmark-json.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The folder for report.md and report.html.")] = Path("pyops-report"),
) -> None:
    """Turns benchmark results into tables and charts: report.md and one self-contained report.html."""
    from pyops import report as found

    try:
        paths = found.write(files, out_dir)
    except (ValueError, OSError) as error:
        fail(str(error))
    for path in paths:
        out().print(str(path), markup=False, soft_wrap=True)


from pyops import cli_bench, cli_models  # noqa: E402, F401  (they register their commands, with the helpers above)
