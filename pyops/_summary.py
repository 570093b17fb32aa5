"""A network's layer table, by torchinfo: sizes, parameters, FLOPs, and which layers run together as one call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from pyops._flops import counting
from pyops._trace import Node, evaluating, is_ours, options_of, trace

INSTALL = "pyops summary runs on torchinfo, which is not installed: pip install torchinfo"


class Row(NamedTuple):
    """A module. flops: two for a product and its addition in convolutions, linear and recurrent layers and attention.
    runs: who runs it in inference, and with which others."""

    name: str
    kind: str
    depth: int
    input: str
    output: str
    kernel: str
    stride: str
    parameters: int
    flops: int
    runs: str


class Summary(NamedTuple):
    """parameters, trainable: of the whole network, each counted once; calls: how many calls stand for how many layers; unused: layers with
    parameters that nobody calls."""

    rows: list[Row]
    parameters: int
    trainable: int
    bytes: int
    flops: int
    layers: int
    calls: int
    unused: list[str]


def summarize(model: nn.Module, inputs: tuple[Any, ...], depth: int | None = None) -> Summary:
    """The table of `model` on `inputs`, down to `depth` levels below it (None: all). A module that is called several times is one row:
    sizes and who ran it are of its last call, FLOPs of all. Modules without layers below them, or at `depth`, have the counts of all that
    is in them; others what no row below has: their own parameters and products, and those of layers that they use without a call.

    Raises ImportError without torchinfo, and whatever the model's forward raises.
    """
    try:
        import torchinfo
    except ImportError as error:
        raise ImportError(INSTALL) from error
    found = trace(model, inputs)
    with evaluating(model), counting() as flops:
        statistics = torchinfo.summary(model, input_data=list(inputs), depth=depth or sys.maxsize, verbose=0, col_names=(), mode="eval")
    layers = {node.module: node for node in found.nodes if node.module is not None}
    sizes, deepest = found.sizes, depth or sys.maxsize
    hidden = {part for layer in layers for part in layer.modules() if part is not layer}  # of attention: its own
    rows: list[Row] = []
    seen = set(hidden)
    for info in statistics.summary_list:
        module = info.module
        if info.depth > deepest or module in seen:
            continue
        seen.add(module)
        whole = module in layers or info.is_leaf_layer or info.depth == deepest
        below = [] if whole else list(_called_below(module, flops))
        listed = {p for part in below for p in part.parameters()}
        parameters = sum(p.numel() for p in module.parameters() if p not in listed)
        counted = max(0, flops.get(module, 0) - sum(flops[part] for part in below))
        name = info.var_name if info.depth else type(module).__name__
        runs = "" if below or module not in flops else _runs(module, layers)
        ends = sizes.get(id(module), ("", ""))
        rows.append(Row(name, type(module).__name__, info.depth, *ends, *options_of(module), parameters, counted, runs))
    every = list(model.parameters())
    unused = [n for n, part in model.named_modules() if part not in hidden and id(part) not in sizes and [*part.parameters(recurse=False)]]
    return Summary(
        rows,
        sum(p.numel() for p in every),
        sum(p.numel() for p in every if p.requires_grad),
        sum(p.numel() * p.element_size() for p in every),
        flops.get(model, 0),
        *found.counts(),
        unused,
    )


def _called_below(module: nn.Module, flops: dict[nn.Module, int]) -> Iterator[nn.Module]:
    """The nearest modules below one that were called."""
    for child in module.children():
        if child in flops:
            yield child
        else:
            yield from _called_below(child, flops)


def _runs(module: nn.Module, layers: dict[nn.Module, Node]) -> str:
    """Who runs a module: a numbered call with others, pyops alone, or PyTorch, which is said of all that is not known to be pyops'."""
    nodes = [layers[part] for part in module.modules() if part in layers]
    groups = {node.group for node in nodes}
    ours = [node for node in nodes if node.ours]
    if groups <= {None} and len(ours) in (0, len(nodes)):
        return "pyops" if ours or (not nodes and is_ours(module)) else "PyTorch"
    if len(groups) > 1 or None in groups:
        return f"{sum(node.group is None for node in nodes) + len(groups - {None})} calls"
    kind = type(nodes[0].runner).__name__
    return f"call {nodes[0].group}: {kind}" if ours else f"call {nodes[0].group}: PyTorch's {kind}"
