"""`pyops draw`: nodes, edges and boxes of the graph as text, and what is said where Graphviz is missing."""

from __future__ import annotations

import re
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from pyops import _backends
from pyops._trace import trace

from . import seen_network
from .test_cli import invoke
from .test_summary import folder  # noqa: F401  (a fixture)

pytest.importorskip("graphviz")
from pyops._drawing import source

IMAGE = (torch.zeros(1, 3, 16, 16),)


def names(found) -> list[tuple[str, str, str]]:
    return [(edge.source.name, edge.target.name, edge.size) for edge in found.edges]


@pytest.mark.parametrize("build", [seen_network.ours, seen_network.plain])
def test_data_flow(build):
    """The same of both: whoever runs the layers, in place or not."""
    found = names(trace(build(blocks=1), IMAGE))
    chain = ["input", "stem.0", "stem.1", "blocks.0.conv1", "blocks.0.bn1", "blocks.0.relu", "blocks.0.conv2", "blocks.0.bn2", "add"]
    chain += ["blocks.0.relu", "pool", "flatten", "head", "output"]
    assert [(a, b) for a, b, _ in found if (a, b) != ("stem.1", "add")] == list(pairwise(chain))
    assert ("stem.1", "add", "8 x 8 x 8") in found and ("input", "stem.0", "16 x 16 x 3") in found and ("head", "output", "1 x 5") in found


def test_functions_between_layers():
    """Joins, slices and writes into what is there keep their makers; attributes, copies and constants are no nodes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            a, b = self.a(x).contiguous(), self.b(x.clone())
            both = torch.cat([a, b * self.weight])
            both[0] = a[1]
            return {"both": both, "shape": torch.zeros(both.shape[0])}

    found = {(a, b) for a, b, _ in names(trace(Net(), (torch.randn(2, 4),)))}
    assert found == {
        ("input", "a"), ("input", "b"), ("b", "mul"), ("a", "cat"), ("mul", "cat"), ("a", "getitem"), ("cat", "setitem"),
        ("getitem", "setitem"), ("setitem", "output"),
    }  # fmt: skip


def test_outputs_written_by_a_kernel():
    """Window attention's kernel writes into tensors that it is given: its node stands between the two linear layers."""
    import pyops

    found = names(trace(pyops.nn.WindowAttention(8, 4, 0, 2), (torch.randn(1, 8, 8, 8),)))
    between = [b for a, b, _ in found if a == "qkv"]
    assert len(between) == 1 and (between[0], "proj", "8 x 8 x 8") in found


@pytest.mark.skipif(_backends.requested(None) != "auto", reason="a backend was asked for")
def test_text():
    text = source(seen_network.ours(blocks=1), IMAGE)
    boxes = re.findall(r"subgraph cluster_(\d+) \{(.*?)\n\t\}", text, re.S)
    assert [number for number, _ in boxes] == ["1", "2", "3"] and all("ConvChain" in box for _, box in boxes)
    assert "Conv2d 3 x 3 / 2 x 2" in boxes[0][1] and "bn1" in boxes[1][1]
    assert "label=add" in boxes[2][1] and "bn2" in boxes[2][1], "the sum belongs to the call"
    assert "subgraph" not in source(seen_network.plain(blocks=1), IMAGE)
    (skip,) = [line for line in text.splitlines() if "dashed" in line]
    ids = dict(re.findall(r'^\t+(n\d+) \[label="?([\w.]+)', text, re.M))
    assert [ids[node] for node in re.findall(r"n\d+", skip)] == ["stem.1", "add"] and "8 x 8 x 8" in skip


def test_depth():
    """A block is one node: what passes inside is not shown, what passes between is."""
    found = trace(seen_network.plain(), IMAGE, depth=2)
    assert [node.name for node in found.nodes] == [
        "input", "stem.0", "stem.1", "blocks.0", "blocks.1", "pool", "flatten", "head", "output",
    ]  # fmt: skip
    assert len(found.edges) == 8 and not found.groups()
    assert [node.name for node in trace(seen_network.ours(), IMAGE, depth=1).nodes][1:4] == ["stem", "blocks", "pool"]


# ---------------------------------------------------------------------------------------------------------------- the command


def test_of_the_zoo_and_of_ones_own(folder):  # noqa: F811
    invoke("draw", "lenet", "-o", "pictures/lenet.dot")
    text = (folder / "pictures" / "lenet.dot").read_text()
    assert text.startswith("digraph LeNet") and "features.0" in text and "28 x 28 x 6" in text
    invoke("draw", "users_network:ours", "--input", "1,3,16,16", "--option", "blocks=3", "--depth", 2, "-o", "own.dot")
    assert "blocks.2" in (folder / "own.dot").read_text()


def test_without_dot(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    text = invoke("draw", "lenet", "-o", tmp_path / "lenet.svg", code=1)
    assert "apt install graphviz" in text and f"dot -Tsvg {tmp_path / 'lenet.dot'} -o {tmp_path / 'lenet.svg'}" in text
    assert (tmp_path / "lenet.dot").read_text().startswith("digraph LeNet") and not (tmp_path / "lenet.svg").exists()


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program dot is not here")
@pytest.mark.parametrize("kind, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_rendering(tmp_path, kind, start):
    invoke("draw", "lenet", "-o", tmp_path / f"lenet.{kind}")
    assert (tmp_path / f"lenet.{kind}").read_bytes().startswith(start)


def test_mistakes(tmp_path):
    assert "--out: expected a file ending in .svg, .png, .pdf, .dot, got" in invoke("draw", "lenet", "-o", tmp_path / "lenet.gif", code=2)
    (tmp_path / "taken").write_text("")
    assert "taken" in invoke("draw", "lenet", "-o", tmp_path / "taken" / "lenet.dot", code=1)


def test_without_graphviz(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    assert "pip install graphviz" in invoke("draw", "lenet", "-o", tmp_path / "lenet.svg", code=2)
