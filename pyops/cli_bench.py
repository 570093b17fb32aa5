"""`pyops bench`: the benchmarks of the source checkout, on pytest-benchmark."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyops.cli import app, fail, one_of, out


@app.command()
def bench(
    quick: Annotated[bool, typer.Option(help="Five rounds a benchmark: minutes, and rough numbers.")] = False,
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    models: Annotated[str | None, typer.Option(help="Whole networks instead, by name: resnet18,lenet; or all.")] = None,
    fuse: Annotated[str | None, typer.Option(help="Networks of torchvision after pyops.fuse instead: resnet18,vgg16; or all.")] = None,
    out_path: Annotated[Path, typer.Option("--out", help="The JSON file to write.")] = Path("pyops-bench.json"),
) -> None:
    """Times every op, or networks of pyops.models, or torchvision's after `pyops.fuse`, against baselines (bench/ of the source checkout),
    prints the summary and keeps the JSON for `pyops report`."""
    folder = bench_folder()
    if sum(choice is not None for choice in (op, models, fuse)) > 1:
        fail("--op, --models, --fuse: expected one of them")
    if op is not None:
        from pyops.testing import SPECS

        one_of(op, tuple(SPECS), "--op")
    zoo = [] if models is None else networks(models)
    fused = [] if fuse is None else torchvision_networks(fuse)
    absent = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if absent:
        fail("pyops bench runs on pytest-benchmark, which is not installed: pip install pytest pytest-benchmark")
    import pytest

    from pyops.demo.presentation import print_table
    from pyops.report import load, tables

    target = out_path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    console = out()
    options = [f"--rootdir={folder.parent}", f"--benchmark-json={target}", "--capture=sys"]
    options += ["--bench-rounds=5"] if quick else []
    options += ["-k", f"{op}-"] if op else []
    whole = {"models": folder / "bench_models.py", "fuse": folder / "bench_fuse.py"}
    if models is None and fuse is None:
        options += [*(f"--ignore={suite}" for suite in whole.values()), str(folder)]
    else:
        options += [f"--bench-models={','.join(zoo or fused)}", str(whole["fuse" if models is None else "models"])]
    with Counter(console) as counter, redirect_stdout(StringIO()) as log:
        code = pytest.main(options, plugins=[counter])
    if code != 0 or not target.exists():
        console.print(log.getvalue(), markup=False)
        fail(f"the benchmarks did not finish (pytest's exit code {int(code)}, its output is above)", 1)
    print_table(tables.summary(load(target)), console)
    console.print(f"results: {target}\npage: pyops report {os.path.relpath(target)}", markup=False, soft_wrap=True)


def networks(names: str) -> list[str]:
    """Of a list with commas, each known to pyops.models."""
    from pyops import models

    wanted = models.list() if names == "all" else [name.strip() for name in names.split(",")]
    try:
        return [models.entry(name).name for name in wanted]
    except ValueError as error:
        fail(f"--models: {str(error).removeprefix('models: name: ')}")


def torchvision_networks(names: str) -> list[str]:
    """Of a list with commas, each one of torchvision's for classification; none for "all": the benchmark's own choice."""
    if find_spec("torchvision") is None:
        fail("--fuse: the networks are torchvision's, which is not installed: pip install torchvision")
    from torchvision import models

    known = models.list_models(module=models)
    wanted = [] if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known)
            fail(f"--fuse: torchvision has no network {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return wanted


def bench_folder() -> Path:
    """bench/ beside the package's source, else in the current directory."""
    import pyops

    for root in (Path(pyops.__file__).parent.parent, Path.cwd()):
        if (root / "bench" / "bench_ops.py").exists():
            return root / "bench"
    fail("the benchmarks live in pyops' source checkout: run this in it, or install it with `pip install -e .`")


class Counter:
    """A pytest plugin: a progress bar over the collected benchmarks, in place of pytest's own output."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # redrawn between benchmarks only: a thread that draws would take time from the one being timed
        self.progress = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.task = self.progress.add_task("collecting", total=None)

    def __enter__(self) -> Counter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def pytest_collection_finish(self, session: Any) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self.task, description=nodeid.rpartition("[")[2].rstrip("]"), refresh=True)

    def pytest_runtest_logfinish(self) -> None:
        self.progress.advance(self.task)
