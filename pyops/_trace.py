"""A network's layers as they are called on an input: which gives to which, in what sizes, and which of them run together as one call.

Two runs in eval mode. In one every layer has a hook: kernels cannot stand for layers that someone watches, so each is called, and what
passes between them is followed. In the other nobody watches but PyTorch's global hooks, which kernels do not mind: a layer that is not
called then was run by the innermost module around it that is called (a chain, an MBConv block), together with its neighbours. That one
comes first, so that a network which finds out something in its first call has done so, and may be repeated for the time it takes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyops.nn._derived import kind_of

# Functions that only hand on what they got, or that a reader of a graph has no use for.
SILENT = {"contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "__get__", "requires_grad_", "data"}


class Call(NamedTuple):
    """One call of a module."""

    module: nn.Module
    number: int


@dataclass(eq=False)
class Node:
    """A layer's call, a function's outside of layers, or an input or output of the network."""

    name: str
    module: nn.Module | None = None
    inside: tuple[Call, ...] = ()  # the calls around it, outermost first
    runner: nn.Module | None = None  # who ran the layer without calling it
    group: int | None = None  # a number shared by those that ran as one
    ours: bool = False  # a layer that pyops runs


class Edge(NamedTuple):
    source: Node
    target: Node
    size: str


@dataclass
class Run:
    """What was called in a run that nobody watched, views of layers among it.

    seconds: of each module's calls together, without those of the modules that it called; callers: who called it first.
    """

    seconds: dict[nn.Module, float] = field(default_factory=dict)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    callers: dict[nn.Module, nn.Module | None] = field(default_factory=dict)


@dataclass
class _Frame:
    """A call that is under way: when it was come to, when its own work began, the seconds since then that were others'."""

    module: nn.Module
    arrived: float
    began: float = 0.0
    inside: float = 0.0


@dataclass
class Trace:
    """nodes: in the order of their calls; sizes: of each module by id, (input, output); runs: as many as were asked for."""

    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    sizes: dict[int, tuple[str, str]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def groups(self) -> dict[int, list[Node]]:
        """The nodes of each group."""
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            if node.group is not None:
                found.setdefault(node.group, []).append(node)
        return found

    def counts(self) -> tuple[int, int]:
        """How many calls of layers there are, and how many calls run them."""
        grouped = self.groups().values()
        alone = sum(node.module is not None and node.group is None for node in self.nodes)
        return alone + sum(node.module is not None for group in grouped for node in group), alone + len(grouped)


def trace(
    model: nn.Module,
    inputs: tuple[Any, ...],
    depth: int | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    runs: int = 1,
) -> Trace:
    """Runs `model` on `inputs` and keyword arguments `options`, `runs` times alone and once watched. Modules `depth` levels below it (1:
    its children) are not looked into; None: every layer is seen.

    The model's mode and hooks are afterwards what they were; whatever its forward raises is raised.
    """
    flow = _Flow(model, depth)
    with evaluating(model), torch.no_grad():
        flow.trace.runs = [_run_alone(model, inputs, options) for _ in range(runs)]
        with _watched(model), flow.following(), flow:
            flow.start((inputs, options))
            flow.end(model(*inputs, **options))
    _group(flow.trace.nodes, flow.trace.runs[-1], set(model.modules()))
    return flow.trace


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part is in the mode that it was in."""
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """With a hook on every part: that it is there is enough."""
    handles = [part.register_forward_hook(lambda *_: None) for part in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_alone(model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Run:
    """A run without anyone's hooks but the clock's, whose own time is in nobody's."""
    run, now = Run(), _clock(model, inputs, options)
    stack: list[_Frame] = []

    def enter(module: nn.Module, _: Any) -> None:
        arrived = now()
        run.calls[module] += 1
        run.callers.setdefault(module, stack[-1].module if stack else None)
        stack.append(_Frame(module, arrived))
        stack[-1].began = now()

    def leave(module: nn.Module, *_: Any) -> None:
        ended = now()
        frame = stack.pop()
        while frame.module is not module:  # a call that raised, and whoever called it went on
            frame = stack.pop()
        run.seconds[module] = run.seconds.get(module, 0.0) + ended - frame.began - frame.inside
        if stack:
            stack[-1].inside += now() - frame.arrived

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return run


def _clock(model: nn.Module, *values: Any) -> Callable[[], float]:
    """Seconds; where a GPU works, once it has done what it was given."""
    if not any(t.is_cuda for t in (*model.parameters(), *_tensors(values))):
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _group(nodes: list[Node], run: Run, own: set[nn.Module]) -> None:
    """Neighbours that one call of a module ran, from the first layer among them on: what comes before it is the module's own.

    own: the network's modules. Others are views of them; one that nobody called in the watched run was put aside for the hooks, and its
    caller ran the layers by it.
    """
    groups: list[list[Node]] = []
    last: Call | None = None
    seen = {call.module for node in nodes for call in node.inside} | own
    views = {caller for module, caller in run.callers.items() if module not in seen and is_ours(module)}
    called = run.calls
    for node in nodes:
        alone = node.module in called or not node.inside
        runner = None if alone else next((call for call in reversed(node.inside) if call.module in called), None)
        if runner is not None and runner is last:
            groups[-1].append(node)
        elif runner is not None and node.module is not None:
            groups.append([node])
            last = runner
        else:
            last = None
        if node.module is not None:
            node.runner = None if runner is None else runner.module
            node.ours = is_ours(node.runner or node.module) or node.runner in views
    for number, group in enumerate((group for group in groups if len(group) > 1), 1):
        for node in group:
            node.group = number


class _Flow(TorchFunctionMode):
    """Follows tensors from call to call: who made each, and of images whether their channels come last."""

    def __init__(self, model: nn.Module, depth: int | None):
        super().__init__()
        self.trace = Trace()
        self.names = {part: name for name, part in model.named_modules() if name}
        self.names = {model: type(model).__name__} | self.names
        # attention's one layer below it is none that it calls: its matrices are its own
        self.whole = {part for part in self.names if isinstance(part, nn.MultiheadAttention) or not any(part.children())}
        if depth is not None:
            self.whole |= {part for name, part in model.named_modules() if name.count(".") + 1 >= depth and name}
        self.makers: dict[int, Node] = {}
        self.channels_last: dict[int, bool] = {}
        self.alive: list[Tensor] = []  # an id is a tensor's as long as it lives
        self.stack: list[Call] = []
        self.hidden = 0  # calls of whole modules that are under way
        self.calls = 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """With PyTorch's global hooks, which see views of layers as well."""
        handles = [register_module_forward_pre_hook(self.enter), register_module_forward_hook(self.leave, with_kwargs=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # PyTorch's handle leaves this behind, and its compiler then warns of global hooks
            getattr(torch_module, "_global_forward_hooks_with_kwargs", {}).pop(handles[1].id, None)

    def start(self, inputs: Any) -> None:
        for value in _tensors(inputs):
            self.made(Node("input"), [], [value], False)

    def end(self, result: Any) -> None:
        node = Node("output")
        self.trace.nodes.append(node)
        self.trace.edges += self.edges(_tensors(result), node)

    def enter(self, module: nn.Module, _: Any) -> None:
        self.calls += 1
        self.stack.append(Call(module, self.calls))
        self.hidden += module in self.whole

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.stack.pop()
        self.hidden -= module in self.whole
        given, results = _tensors((args, kwargs)), _tensors(result)
        if not any(module.children()):  # a layer may have made rows of an image, and an image of them again
            last = self.layout_after("linear" if isinstance(module, nn.Linear) else "", (), given)
            for t in results:
                if last is not None and t.dim() == 4:
                    self.channels_last.setdefault(id(t), last)
        self.trace.sizes[id(module)] = self.size(given), self.size(results)
        if module in self.whole and not self.hidden:
            last = self.channels_last.get(id(results[0])) if results else None
            self.made(Node(self.names[module], module, tuple(self.stack)), given, results, last)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        results = _tensors(_written(func, args)) or _tensors(result)
        if not given or not results:
            return result
        last = self.layout_after(name, args, given)
        if self.hidden or name in SILENT or name.endswith("_like") or name.startswith("new_"):
            self.pass_on(given, results, last)
        elif any(id(t) in self.makers for t in given):
            self.made(Node(name.strip("_"), None, tuple(self.stack)), given, results, last)
        return result

    def layout_after(self, name: str, args: Any, given: list[Tensor]) -> bool | None:
        """Whether channels come last in what a function gives; None: it is no image."""
        if name.endswith("2d"):
            for t in given:
                self.channels_last.setdefault(id(t), False)  # whatever made it: now it is an image
            return False
        known = [last for t in given if t.dim() == 4 and (last := self.channels_last.get(id(t))) is not None]
        if not known:
            return None
        if name in ("linear", "layer_norm"):
            return True
        if name == "permute":
            order = tuple(args[1] if isinstance(args[1], (tuple, list, torch.Size)) else args[1:])
            if order in ((0, 2, 3, 1), (0, 3, 1, 2)):
                return order[1] == 2
        return any(known)

    def keep(self, t: Tensor, last: bool | None) -> None:
        self.alive.append(t)
        self.channels_last.pop(id(t), None)
        if last is not None:
            self.channels_last[id(t)] = last

    def pass_on(self, given: list[Tensor], results: list[Tensor], last: bool | None) -> None:
        maker = next((self.makers[id(t)] for t in given if id(t) in self.makers), None)
        for t in results:
            self.keep(t, last)
            if maker is not None and not self.hidden:
                self.makers[id(t)] = maker

    def made(self, node: Node, given: list[Tensor], results: list[Tensor], last: bool | None) -> None:
        self.trace.nodes.append(node)
        self.trace.edges += self.edges(given, node)
        for t in results:
            self.keep(t, last)
            self.makers[id(t)] = node

    def edges(self, given: list[Tensor], node: Node) -> list[Edge]:
        """One from each maker."""
        found = {maker: self.size([t]) for t in reversed(given) if (maker := self.makers.get(id(t))) is not None}
        return [Edge(maker, node, size) for maker, size in reversed(found.items())]

    def size(self, tensors: list[Tensor]) -> str:
        """Of the first: H x W x C of images, all dimensions of other tensors."""
        if not tensors:
            return ""
        shape = tuple(tensors[0].shape)
        last = self.channels_last.get(id(tensors[0]))
        if len(shape) == 4 and last is not None:
            shape = shape[1:] if last else (*shape[2:], shape[1])
        return " x ".join(map(str, shape))


def _written(func: Any, args: Any) -> list[Any]:
    """The arguments that a function returns its results in."""
    if isinstance(func, torch._ops.OpOverload):
        return [value for value, known in zip(args, func._schema.arguments, strict=False) if known.alias_info and known.alias_info.is_write]
    return args[:1] if getattr(func, "__name__", "") == "__setitem__" else []


def is_ours(module: nn.Module | None) -> bool:
    """Whether the module is pyops', or was fused as one that is."""
    return module is not None and kind_of(module).__module__.startswith(("pyops.nn.", "pyops._fusion."))


def options_of(module: nn.Module | None) -> tuple[str, str]:
    """(kernel, stride) of a layer that has them: 3 x 3."""
    kind = type(module).__name__
    dims = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else 1
    values = (getattr(module, name, None) for name in ("kernel_size", "stride"))
    kernel, stride = (" x ".join(map(str, v if isinstance(v, (tuple, list)) else (v,) * dims)) if v else "" for v in values)
    return kernel, stride


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
