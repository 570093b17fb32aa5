"""A network as a graph, by graphviz: layers and functions as nodes, sizes on the edges, a box around layers that run as one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pyops._trace import Edge, Node, Trace, options_of, trace

FORMATS = ("svg", "png", "pdf", "dot")
INSTALL = "pyops draw runs on graphviz, which is not installed: pip install graphviz"
GET_DOT = "Graphviz's program `dot` is not on the path: apt install graphviz, brew install graphviz or conda install graphviz"
# of nodes and edges; colours that can be told apart in grey as well
LAYER = {"shape": "box", "style": "rounded,filled", "fillcolor": "white"}
FUNCTION = {"shape": "ellipse", "style": "filled", "fillcolor": "grey90", "height": "0.3", "margin": "0.08,0.02"}
END = {"shape": "plaintext"}
TOGETHER = {"style": "rounded,filled", "color": "steelblue", "fillcolor": "aliceblue", "fontcolor": "steelblue"}
SKIP = {"style": "dashed", "color": "firebrick", "fontcolor": "firebrick"}


def source(model: nn.Module, inputs: tuple[Any, ...], depth: int | None = None) -> str:
    """The graph in Graphviz's language. depth: modules that many levels below the model are one node each.

    Raises ImportError without graphviz, and whatever the model's forward raises.
    """
    try:
        from graphviz import Digraph, escape
    except ImportError as error:
        raise ImportError(INSTALL) from error
    found = trace(model, inputs, depth)
    graph = Digraph(type(model).__name__, node_attr={"fontname": "Helvetica", "fontsize": "11"})
    graph.attr("edge", fontname="Helvetica", fontsize="9", color="grey30")
    ids = {node: f"n{number}" for number, node in enumerate(found.nodes)}
    for node in found.nodes:
        if node.group is None:
            graph.node(ids[node], **_look(node, escape))
    for number, nodes in found.groups().items():
        runner = next(node.runner for node in nodes if node.runner is not None)
        with graph.subgraph(name=f"cluster_{number}") as box:
            box.attr(label=f"call {number}: {type(runner).__name__}", fontname="Helvetica", fontsize="10", **TOGETHER)
            for node in nodes:
                box.node(ids[node], **_look(node, escape))
    skips = _skips(found)
    for edge in found.edges:
        graph.edge(ids[edge.source], ids[edge.target], label=edge.size, **(SKIP if edge in skips else {}))
    return graph.source


def _look(node: Node, escape: Any) -> dict[str, str]:
    if node.module is None:
        return {"label": escape(node.name), **(FUNCTION if node.inside else END)}
    kernel, stride = options_of(node.module)
    steps = "" if set(stride) <= set("1 x") else f"/ {stride}"
    kind = " ".join(filter(None, (type(node.module).__name__, kernel, steps)))
    return {"label": f"{escape(node.name)}\\n{escape(kind)}", **LAYER}


def _skips(found: Trace) -> set[Edge]:
    """Edges that go past other nodes to where they meet what those made."""
    places = {node: place for place, node in enumerate(found.nodes)}
    into: dict[Node, list[Edge]] = {}
    for edge in found.edges:
        into.setdefault(edge.target, []).append(edge)
    return {edge for edges in into.values() for edge in edges if edge is not max(edges, key=lambda edge: places[edge.source])}


def write(text: str, path: Path) -> None:
    """The graph into a file of the format that its suffix names, one of FORMATS.

    Raises RuntimeError, and leaves the text beside as .dot, where the program that draws is missing.
    """
    import graphviz

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:]
    if kind == "dot":
        path.write_text(text, encoding="utf-8")
        return
    try:
        path.write_bytes(graphviz.Source(text).pipe(format=kind))
    except graphviz.ExecutableNotFound as error:
        beside = path.with_suffix(".dot")
        beside.write_text(text, encoding="utf-8")
        raise RuntimeError(f"{GET_DOT}. Then: dot -T{kind} {beside} -o {path}") from error
