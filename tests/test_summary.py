"""`pyops summary`: sizes, counts by hand, and that what runs as one call is told from what runs layer by layer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyops
from pyops import _backends
from pyops._flops import counting
from pyops._trace import trace

from . import seen_network
from .test_cli import invoke

pytest.importorskip("torchinfo")
from pyops._summary import summarize

IMAGE = (torch.zeros(1, 3, 16, 16),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a network in it, as the current directory."""
    shutil.copy(Path(__file__).parent / "seen_network.py", tmp_path / "users_network.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("users_network", None)


def table(model: nn.Module, inputs: tuple = IMAGE, depth: int | None = None) -> dict:
    """Rows by their path."""
    paths, found = [], {}
    for row in summarize(model, inputs, depth).rows:
        paths[row.depth :] = [row.name]
        found[".".join(paths[1:])] = row
    return found


def test_sizes_and_counts():
    rows = table(seen_network.plain())
    assert list(rows)[:4] == ["", "stem", "stem.0", "stem.1"] and rows[""].kind == "Net"
    conv = rows["stem.0"]
    assert (conv.input, conv.output, conv.kernel, conv.stride) == ("16 x 16 x 3", "8 x 8 x 8", "3 x 3", "2 x 2")
    assert (conv.parameters, conv.flops) == (3 * 8 * 9 + 8, 2 * 8 * 8 * 8 * 3 * 9)
    assert (rows["pool"].output, rows["pool"].flops) == ("1 x 1 x 8", 0)
    assert (rows["head"].input, rows["head"].parameters, rows["head"].flops) == ("1 x 8", 45, 2 * 8 * 5)
    assert rows["blocks"].parameters == rows["blocks"].flops == 0, "what is below it has rows of its own"
    found = summarize(seen_network.plain(), IMAGE)
    assert found.parameters == sum(row.parameters for row in found.rows) == found.trainable
    assert found.bytes == 4 * found.parameters and found.flops == sum(row.flops for row in found.rows)
    assert found.layers == found.calls == 2 + 2 * 6 + 2  # ReLU of a block is called twice


def test_depth():
    """Whole blocks on a row each, with all that is in them."""
    rows, all_rows = table(seen_network.plain(), depth=1), table(seen_network.plain())
    assert list(rows) == ["", "stem", "blocks", "pool", "head"]
    inside = [row for path, row in all_rows.items() if path.startswith("blocks.")]
    assert rows["blocks"].parameters == sum(row.parameters for row in inside)
    assert rows["blocks"].flops == sum(row.flops for row in inside) > 0
    assert rows["blocks"].runs == "PyTorch"


@pytest.mark.skipif(_backends.requested(None) != "auto", reason="a backend was asked for")
def test_depth_counts_calls():
    rows = table(seen_network.ours(), depth=1)
    assert (rows["stem"].runs, rows["blocks"].runs, rows["head"].runs) == ("call 1: ConvChain", "4 calls", "PyTorch")


@pytest.mark.skipif(_backends.requested(None) != "auto", reason="a backend was asked for")
def test_what_runs_together():
    rows = table(seen_network.ours())
    runs = {path: row.runs for path, row in rows.items()}
    assert runs["stem.0"] == runs["stem.1"] == "call 1: ConvChain"
    assert runs["blocks.0.conv1"] == runs["blocks.0.bn1"] == "call 2: ConvChain"
    assert runs["blocks.0.conv2"] == runs["blocks.0.bn2"] != runs["blocks.0.conv1"]
    assert runs["pool"] == runs["head"] == "PyTorch"
    found = summarize(seen_network.ours(), IMAGE)
    assert (found.layers, found.calls) == (16, 1 + 2 * 2 + 2)
    assert {row.runs for row in table(seen_network.plain()).values()} == {"", "PyTorch"}


def test_watched_layers_run_one_by_one():
    model = seen_network.ours()
    model.blocks[0].conv1.register_forward_hook(lambda *_: None)
    runs = {path: row.runs for path, row in table(model).items()}
    assert runs["blocks.0.conv1"] == runs["blocks.0.bn1"] == "PyTorch"
    assert runs["blocks.1.conv1"].endswith("ConvChain")


@pytest.mark.parametrize(
    "module, shape, together",
    [
        (lambda: pyops.nn.MBConv(8, 8), (1, 8, 6, 6), {"MBConv": 16}),
        (lambda: pyops.nn.ConvBNAct(4, 8), (1, 4, 6, 6), {"ConvBNAct": 3}),
        (lambda: pyops.nn.DenseBlock(2, 8, growth_rate=4), (1, 8, 6, 6), {"DenseBlock": 14}),
        (lambda: pyops.nn.ConvNeXtBlock(8), (1, 8, 8, 8), {"ConvNeXtBlock": 10}),
        (lambda: pyops.nn.SwinTransformerBlock(8, 2, 4, 0), (1, 8, 8, 8), {"SwinTransformerBlock": 6}),
        (lambda: pyops.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), {"TransformerEncoderLayer": 2}),
        (lambda: pyops.nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 4)), (2, 8), {"LinearChain": 2}),
        (lambda: nn.Sequential(pyops.nn.LSTM(8, 4)), (3, 2, 8), {}),
    ],
    ids=["mbconv", "conv", "dense", "convnext", "swin", "transformer", "linear", "lstm"],
)
def test_blocks(module, shape, together):
    """Layers and functions of each group, by who ran them."""
    found = trace(module(), (torch.randn(shape),))
    groups = [(type(next(n.runner for n in nodes if n.runner)).__name__, len(nodes)) for nodes in found.groups().values()]
    assert groups == list(together.items())


def test_pytorchs_own_fused_block_is_said_to_be_its_own():
    row = table(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(1, 5, 8),))["linear1"]
    assert row.runs == "call 1: PyTorch's TransformerEncoderLayer"


def test_images_with_channels_last():
    """Swin's blocks have them in the last dimension, convolutions in the second."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), pyops.nn.convnext.Permute((0, 2, 3, 1)), pyops.nn.SwinTransformerBlock(8, 2, 4, 0), pyops.nn.PatchMerging(8)
    )
    rows = table(model, (torch.randn(1, 3, 32, 24),))
    assert (rows["0"].input, rows["0"].output) == ("32 x 24 x 3", "8 x 6 x 8")
    assert {rows[path].output for path in ("1", "2.norm1", "2.attn.proj", "2.stochastic_depth", "2.mlp.4", "2")} == {"8 x 6 x 8"}
    assert rows["3"].output == "4 x 3 x 16"


def test_four_dimensions_that_are_no_image():
    """Heads of attention are not, nor rows in a grid until a convolution takes them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grid, self.heads, self.conv = nn.Unflatten(2, (2, 4)), nn.Identity(), nn.Conv2d(4, 6, 1)

        def forward(self, x):
            return self.conv(self.heads(self.grid(x).transpose(1, 2)).permute(0, 3, 1, 2))

    rows = table(Net(), (torch.randn(1, 5, 8),))
    assert (rows["grid"].input, rows["grid"].output, rows["heads"].output) == ("1 x 5 x 8", "1 x 5 x 2 x 4", "1 x 2 x 5 x 4")
    assert (rows["conv"].input, rows["conv"].output) == ("2 x 5 x 4", "2 x 5 x 6")


@pytest.mark.parametrize("kind", [nn.LSTM, pyops.nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_of_recurrent_layers(kind, bidirectional):
    model = nn.Sequential(kind(8, 4, bidirectional=bidirectional))
    with torch.no_grad(), counting() as found:
        model(torch.randn(3, 2, 8))
    assert found[model] == found[model[0]] == 2 * (3 * 2) * 16 * (8 + 4) * (2 if bidirectional else 1)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, pyops.nn.TransformerEncoderLayer])
def test_flops_of_attention(kind):
    L, E, F = 5, 8, 16
    model = kind(E, 2, F, batch_first=True).eval()
    with torch.no_grad(), counting() as found:
        model(torch.randn(1, L, E))
    assert found[model] == 2 * (L * E * 3 * E + 2 * L * L * E + L * E * E + 2 * L * E * F)


def test_a_shared_layer_is_counted_once():
    layer = nn.Linear(4, 4)
    found = summarize(nn.Sequential(layer, nn.ReLU(), layer), (torch.randn(2, 4),))
    assert [row.kind for row in found.rows] == ["Sequential", "Linear", "ReLU"]
    assert found.parameters == 20 and found.rows[1].flops == found.flops == 2 * (2 * 2 * 4 * 4)


def test_what_is_not_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    found = summarize(Net(), (torch.randn(2, 4),))
    assert found.unused == ["spare"] and found.parameters == 20 + 15 and found.layers == 1
    assert [row.parameters for row in found.rows] == [15, 20]
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert summarize(attention, (torch.randn(1, 5, 8),)).unused == [], "out_proj is called by nobody, but it is attention's"


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, pyops.nn.MultiheadAttention])
def test_attention_is_one_layer(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = kind(8, 2)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    found = summarize(Net(), (torch.randn(5, 1, 8),))
    assert [(row.name, row.parameters, row.output) for row in found.rows] == [("Net", 0, "5 x 1 x 8"), ("attention", 288, "5 x 1 x 8")]
    assert found.rows[1].runs == ("pyops" if kind is pyops.nn.MultiheadAttention else "PyTorch") and not found.unused


def test_layers_used_without_a_call():
    """A module that multiplies by a layer's weight itself has the layer's counts."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.second.weight)

    found = summarize(Net(), (torch.randn(2, 4),))
    assert [(row.name, row.flops, row.parameters) for row in found.rows] == [("Net", 2 * 2 * 4 * 3, 15), ("first", 2 * 2 * 4 * 4, 20)]
    assert found.unused == ["second"]


def test_a_module_that_calls_no_layer():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

    assert {path: row.runs for path, row in table(nn.Sequential(Own()), (torch.randn(2, 4),)).items()} == {"": "", "0": "PyTorch"}


def test_the_model_is_left_as_it_was():
    model = seen_network.ours().train()
    model.blocks[1].eval()
    before = {name: part.training for name, part in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    summarize(model, IMAGE)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def broken(x):
        raise RuntimeError("no")

    model.head.forward = broken
    with pytest.raises(RuntimeError, match="no"):
        trace(model, IMAGE)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert not any(part._forward_hooks for part in model.modules()) and not nn.modules.module._global_forward_hooks


# ---------------------------------------------------------------------------------------------------------------- the command


def test_of_the_zoo():
    text = invoke("summary", "lenet", "--batch", 2, "--option", "num_classes=7")
    assert "input 2 x 1 x 32 x 32" in text and "28 x 28 x 6" in text and "2 x 7" in text and "61,451 parameters" in text
    assert "call 1: ConvChain" in text


def test_of_ones_own(folder):
    text = invoke("summary", "users_network:ours", "--input", "1,3,16,16", "--option", "blocks=1")
    assert "blocks" in text and "ConvChain" in text and "10 layers called, 5 calls" in text
    found = json.loads(invoke("summary", "users_network:ready", "--input", "1,3,16,16", "--depth", 1, "--json"))
    assert [row["name"] for row in found["rows"]] == ["Net", "stem", "blocks", "pool", "head"] and found["calls"] == 16
    (folder / "tokens_network.py").write_text("from torch import nn\nbuild = lambda: nn.Sequential(nn.Embedding(50, 4))\n")
    assert "2 x 16 x 4" in invoke("summary", "tokens_network:build", "--input", "1,16:50", "--batch", 2)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["lenet6"], 2, "there is no network 'lenet6'; did you mean lenet"),
        (["lenet", "--option", "classes"], 2, "--option: expected key=value, got 'classes'"),
        (["lenet", "--option", "classes=3"], 2, "unexpected keyword argument 'classes'"),
        (["lenet", "--input", "1,x"], 2, "--input: expected sizes such as 1,3,224,224"),
        (["lenet", "--input", "0,1,32,32"], 2, "--input: expected sizes"),
        (["lenet", "--input", "1,4:0"], 2, "--input: expected sizes"),
        (["lenet", "--input", "1,3,32,32"], 1, "lenet on 1 x 3 x 32 x 32: ValueError: ConvBNAct: input: expected [N, 1, H, W]"),
        (["users_network:ours"], 2, "--input: expected for a network of your own"),
        (["users_network:other", "--input", "1"], 2, "has no attribute 'other'; expected module:factory"),
        (["absent_network:ours", "--input", "1"], 2, "No module named 'absent_network'; expected module:factory, importable from"),
        (["users_network:ready", "--option", "blocks=3"], 2, "is a module already"),
        (["users_network:refuses", "--option", "channels=3"], 2, "channels: expected 8, got 3"),
        (["users_network:number", "--input", "1"], 2, "expected a torch.nn.Module or a function that returns one, got int"),
    ],
)
def test_mistakes(folder, arguments, code, message):
    assert message in invoke("summary", *arguments, code=code)


def test_without_torchinfo(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchinfo", None)
    assert "pip install torchinfo" in invoke("summary", "lenet", code=2)
