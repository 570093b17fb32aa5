"""`pyops.explain(model, x)`: what runs a model's layers, what `pyops.fuse` would change, what stays PyTorch's and why, the time of each.

Every line is the time of one module, without that of the modules it calls: a layer, the view or block that runs several layers in one
call, or a module's own functions and Python.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from pyops._fusion import classes, rules
from pyops._fusion.fusing import Found, fuse, survey, unfuse
from pyops._trace import Node, Trace, is_ours, trace
from pyops.nn._derived import has_hooks, kind_of
from pyops.nn.chain import ConvChain, LinearChain, Sequential
from pyops.nn.conv import KINDS
from pyops.ops import _conv_call

RUNS = 5
WARM_UPS = 2  # the first makes weights ready
HOOKED, ALONE = "it has hooks", "not called beside a layer that it runs with"
SHOWN = 4  # names in one cell
GROUPED = (nn.Linear, *(kind for kind in KINDS if not kind.__module__.startswith("pyops.")))  # layers that run with their neighbours


class Row(NamedTuple):
    """What one module runs.

    names, kinds: of the layers, in the order of their calls, or of the module itself where it only calls functions; functions: what is
    called between them, by name; runs: how they run; ours: on pyops' kernels; reason: why on PyTorch's, or what `pyops.fuse` would make of
    them; calls: in one run of the model; milliseconds: of those calls together; share: of the whole.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    functions: tuple[str, ...]
    runs: str
    ours: bool
    reason: str
    calls: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """What `pyops.explain(model, *inputs)` returns; print it for a table.

    layers: how many calls of layers there are; calls: how many calls run them; milliseconds: of a run, the sum over rows; fused: what the
    model would be after `pyops.fuse`, None where that would change nothing.
    """

    model: str
    inputs: str
    rows: tuple[Row, ...]
    layers: int
    calls: int
    milliseconds: float
    fused: Explanation | None = None

    @property
    def ours(self) -> float:
        """Milliseconds in pyops' calls."""
        return sum(row.milliseconds for row in self.rows if row.ours)

    def __str__(self) -> str:
        heads = ("layer", "type", "runs as", "ms", "%", "with pyops.fuse" if self.fused else "why not on pyops' kernels")
        lines = [heads]
        for row in self.rows:
            first, *others = zip(row.names, row.kinds, strict=True)
            lines.append((*first, row.runs, f"{row.milliseconds:.3f}", f"{100 * row.share:.1f}", row.reason))
            lines += [(*other, f"with {first[0]}", "", "", "") for other in others]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numbers = [heads.index("ms"), heads.index("%")]
        text = [f"{self.model}({self.inputs})"]
        for line in lines:
            cells = (cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            text.append("  ".join(cells).rstrip())
        text.append(f"{self._totals()}; in eval mode without gradients, median of {RUNS} runs")
        if self.fused is not None:
            text.append(f"after pyops.fuse: {self.fused._totals()}")
        return "\n".join(text)

    def _totals(self) -> str:
        inside = f"{self.ours:.3f} in pyops' calls, {self.milliseconds - self.ours:.3f} outside"
        return f"{self.layers} layers in {self.calls} calls, {self.milliseconds:.3f} ms: {inside}"


def explain(model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Explanation:
    """See `pyops.explain`."""
    if not inputs and not options:
        raise TypeError("explain: inputs: expected the arguments of the model's forward, got none")
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            raise TypeError(f"explain: model: expected no part that torch.compile made, got one: {name or 'the model'}")
    found = {entry.module: entry for entry in survey(model)}
    is_fused = any(classes.is_fused(part) for part in model.modules())
    with _same_random_numbers(model, inputs, options):
        now = _measured(model, inputs, options, found)
        if is_fused or all(entry.change is None for entry in found.values()):
            return now
        with _fused(model):
            later = _measured(model, inputs, options, {module: entry._replace(change=None) for module, entry in found.items()})
    return _compared(now, later)


@contextmanager
def _fused(model: nn.Module) -> Iterator[None]:
    """Of a model that is not: fused meanwhile."""
    try:
        fuse(model)
        yield
    finally:
        unfuse(model)


@contextmanager
def _same_random_numbers(model: nn.Module, *values: Any) -> Iterator[None]:
    """Afterwards the generators go on as if nothing had been drawn."""
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))]
    with torch.random.fork_rng({t.get_device() for t in tensors if t.is_cuda}):
        yield


def _measured(model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any], by: dict[nn.Module, Found]) -> Explanation:
    found = trace(model, inputs, options=options, runs=WARM_UPS + RUNS)
    names = {model: type(model).__name__} | {part: name for name, part in model.named_modules() if name}
    groups = _by_runner(model, found, names)
    times = _milliseconds(model, found, groups)
    total = sum(times.values())
    why, callers = _Why(names, by), set(found.runs[-1].callers.values())
    rows = []
    for runner, nodes in groups.items():
        layers = {node.name: type(node.module).__name__ for node in nodes if node.module is not None}
        functions = tuple(dict.fromkeys(node.name for node in nodes if node.module is None))
        calls = found.runs[-1].calls[runner]
        ours = is_ours(runner) or any(node.ours for node in nodes)
        reason = "" if ours else why.of(nodes[0]) if nodes and nodes[0].module is runner else why.own(runner) or ""
        shown = layers or {names.get(runner) or type(runner).__name__: type(runner).__name__}
        between = "Python between layers" if runner in callers else "PyTorch"
        runs = _how(kind_of(runner).__name__, ours, len(layers), functions, between)
        runs = runs if calls == 1 else f"{runs}, {calls} times"
        share = times[runner] / total
        rows.append(Row(tuple(shown), tuple(shown.values()), functions, runs, ours, reason, calls, times[runner], share))
    sizes = ", ".join(_size(value) for value in (*inputs, *options.values()))
    return Explanation(type(model).__name__, sizes, tuple(rows), *found.counts(), total)


def _by_runner(model: nn.Module, found: Trace, names: dict[nn.Module, str]) -> dict[nn.Module, list[Node]]:
    """The nodes in the time of each module, in the order of calls. `model` itself has whatever is nobody else's; modules without a node
    are those whose layers nobody sees, as scripted ones."""
    run = found.runs[-1]
    callers = set(run.callers.values())
    places = {module: (i, 0) for i, module in enumerate(run.calls)}
    groups: dict[nn.Module, list[Node]] = {model: []}
    groups |= {module: [] for module in run.calls if module in names and module not in callers}
    last = (-1, 0)
    for node in found.nodes:
        if node.module is None and not node.inside:
            continue  # an input or output
        inside = [call.module for call in reversed(node.inside)]
        if node.module is None:  # not of a view that runs no layer, nor of the layer that stands for a function
            inside = [module for module in inside if module in names or module in groups]
        runner = next((module for module in (node.module, *inside) if module is not None and module in run.calls), model)
        if node.module is not None:
            if not any(other.module is not None for other in groups.get(runner, ())):
                places[runner] = max(places[runner], (last[0], last[1] + 1))  # a block may call some layers before it runs others
            last = places[runner]
        groups.setdefault(runner, []).append(node)
    return dict(sorted(groups.items(), key=lambda group: places[group[0]]))


def _milliseconds(model: nn.Module, found: Trace, groups: dict[nn.Module, list[Node]]) -> dict[nn.Module, float]:
    """Of each group. Modules that have none, such as containers, count to who called them."""
    each: dict[nn.Module, list[float]] = {runner: [] for runner in groups}
    for run in found.runs[WARM_UPS:]:
        spent = dict.fromkeys(groups, 0.0)
        for module, seconds in run.seconds.items():
            owner: nn.Module | None = module
            while owner is not None and owner not in groups:
                owner = run.callers[owner]
            spent[model if owner is None else owner] += 1e3 * seconds
        for runner, milliseconds in spent.items():
            each[runner].append(milliseconds)
    return {runner: statistics.median(values) for runner, values in each.items()}


def _how(kind: str, ours: bool, layers: int, functions: tuple[str, ...], otherwise: str) -> str:
    if layers == 0 and not ours:
        return f"PyTorch's functions: {_listed(functions)}" if functions else otherwise
    if layers == 0 or layers + len(functions) == 1:
        return f"pyops: {kind}" if ours else "PyTorch"
    beside = f" with {_listed(functions)}" if functions else ""
    return f"one call: {kind}{beside}" if ours else f"one call: PyTorch's {kind}{beside}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _compared(now: Explanation, later: Explanation) -> Explanation:
    """`now`, where each row's reason says what it will be."""
    coming = {name: row for row in reversed(later.rows) for name in row.names}
    rows = []
    for row in now.rows:
        found = coming.get(row.names[0])
        if row.ours or found is None:
            rows.append(row)
            continue
        others = [name for name in found.names if name not in row.names]
        beside = f"; together: {_listed(others)}" if others else ""
        rows.append(row._replace(reason=f"{found.runs}{beside}" if found.ours else found.reason))
    return Explanation(now.model, now.inputs, tuple(rows), now.layers, now.calls, now.milliseconds, later)


class _Why:
    """Why a layer is PyTorch's. found: what `pyops.fuse` would do with the model's modules."""

    def __init__(self, names: dict[nn.Module, str], found: dict[nn.Module, Found]):
        self.names, self.found = names, found

    def reason(self, module: nn.Module) -> str | None:
        return self.found[module].reason if module in self.found else None

    def own(self, module: nn.Module) -> str | None:
        """What is about the module itself."""
        return self.reason(module) or (HOOKED if has_hooks(module) and not any(module.children()) else None) or _subclass(module)

    def of(self, node: Node) -> str:
        layer: Any = node.module
        around = [call.module for call in reversed(node.inside)]
        own = self.own(layer)
        if own is not None:
            return own
        if isinstance(layer, (_DropoutNd, nn.Identity)):
            return "does nothing in eval mode"
        block = next((module for module in around if is_ours(module) and kind_of(module) is not Sequential), None)
        if block is not None:
            return self.within(block)
        if any(self.found[module].change is not None for module in (layer, *around) if module in self.found):
            return "not fused yet"
        if kind_of(layer) not in GROUPED:
            return "no kernel for such a layer on its own"
        for module in around:
            if module in self.names and classes.original_of(module).forward is not nn.Sequential.forward:  # whose reason is no other
                reason = self.reason(module) or _unread(module)
                if reason is not None:
                    return f"{ALONE} ({self.names[module]}: {reason})"
        return ALONE

    def within(self, block: nn.Module) -> str:
        """In a view or block that could have run it with others."""
        for part in block.modules():
            if part is not block and part in self.names and has_hooks(part):
                return f"{self.names[part]}, which it would run with: {self.reason(part) or HOOKED}"
        if any(_conv_call.is_autocast(p.device.type) for p in block.parameters()):
            return "autocast"
        if isinstance(block, (ConvChain, LinearChain)):
            return "no kernel for these layers' options or dtype"
        return f"pyops' {kind_of(block).__name__} calls PyTorch's"


def _subclass(layer: nn.Module) -> str | None:
    """Of a class that kernels know."""
    own, *bases = type(layer).__mro__
    if is_ours(layer) or kind_of(layer) is not own or own.__module__.startswith("torch."):
        return None
    known = next((base for base in bases if base in GROUPED or rules.find(base) is not None), None)
    return None if known is None else f"a subclass of {known.__module__.partition('.')[0]}'s {known.__name__}"


def _unread(module: nn.Module) -> str | None:
    try:
        inspect.getsource(classes.original_of(module).forward)
    except (OSError, TypeError):
        return "no source of its forward to read"
    return None


def _size(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
