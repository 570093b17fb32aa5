"""`pyops.explain(model, x)`: who runs each layer, why PyTorch does, and times that add up; the model is left as it was."""

import sys

import pytest
import torch
from torch import nn

import pyops
from pyops import _backends
from pyops._fusion.report import RUNS, Explanation

from . import seen_network

IMAGE = torch.zeros(1, 3, 16, 16)
auto = pytest.mark.skipif(_backends.requested(None) != "auto", reason="a backend was asked for")


def by_name(found: Explanation) -> dict:
    """The rows of each layer's name: the last, where several have it."""
    return {name: row for row in found.rows for name in row.names}


def check_sums(found: Explanation) -> None:
    assert sum(row.share for row in found.rows) == pytest.approx(1.0)
    assert sum(row.milliseconds for row in found.rows) == pytest.approx(found.milliseconds)
    assert found.ours == pytest.approx(sum(row.milliseconds for row in found.rows if row.ours))
    assert all(row.milliseconds > 0 and row.calls > 0 for row in found.rows)


def state_of(model: nn.Module) -> list:
    """What a module made ready for its kernels may be dropped."""
    return [(type(part), part.training, sorted({*part.__dict__} - {"_kept"}), list(part._forward_hooks)) for part in model.modules()]


@auto
def test_a_fused_network():
    model = pyops.fuse(seen_network.plain())
    found = pyops.explain(model, IMAGE)
    rows = by_name(found)
    first, second = (row for row in found.rows if "blocks.0.relu" in row.names)
    assert first.names == ("blocks.0.conv1", "blocks.0.bn1", "blocks.0.relu") and first.kinds == ("Conv2d", "BatchNorm2d", "ReLU")
    assert second.names == ("blocks.0.conv2", "blocks.0.bn2", "blocks.0.relu") and len(second.functions) == 1
    assert first.ours and first.runs == "one call: ConvChain" and "add" in second.runs and not first.reason
    assert rows["pool"].runs == "PyTorch" and "no kernel" in rows["pool"].reason
    assert rows["head"].reason == "not called beside a layer that it runs with"
    assert rows["Net"].runs == "PyTorch's functions: flatten" and found.rows[0].names == ("Net",)
    assert (found.layers, found.calls, found.fused) == (16, 7, None)
    check_sums(found)
    text = str(found)
    assert all(name in text for name, part in model.named_modules() if not any(part.children()))
    assert "Net(1 x 3 x 16 x 16)" in text and "16 layers in 7 calls" in text and f"median of {RUNS} runs" in text and "\x1b" not in text


@auto
def test_a_network_that_is_not_fused():
    model = seen_network.plain().train()
    model.blocks[1].eval()
    before = state_of(model)
    found = pyops.explain(model, IMAGE)
    assert state_of(model) == before and "_fused_attributes" not in model.__dict__
    rows = by_name(found)
    assert not any(row.ours for row in found.rows) and all(len(row.names) == 1 for row in found.rows)
    assert (
        rows["blocks.0.conv2"].runs == "PyTorch" and rows["blocks.0.relu"].runs == "PyTorch, 2 times" and rows["blocks.0.relu"].calls == 2
    )
    assert rows["blocks.0.conv2"].reason.startswith("one call: ConvChain") and "together: blocks.0.bn2" in rows["blocks.0.conv2"].reason
    assert "no kernel" in rows["pool"].reason and rows["blocks.0"].runs.startswith("PyTorch's functions: ")
    assert (found.layers, found.calls, found.fused.layers, found.fused.calls) == (16, 16, 16, 7)
    check_sums(found.fused)
    assert found.ours == 0.0 and "with pyops.fuse" in str(found) and "after pyops.fuse: 16 layers in 7 calls" in str(found)


@auto
def test_ones_own_sequential():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Identity(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))
    found = pyops.explain(pyops.fuse(model), torch.randn(3, 4))
    rows = by_name(found)
    assert rows["3"].names == ("3", "4") and rows["3"].runs == "one call: LinearChain"
    assert rows["1"].reason == "does nothing in eval mode"
    check_sums(found)


def test_recurrent_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.cell = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.GRUCell(5, 5)

        def forward(self, tokens, steps):
            y, _ = self.rnn(self.embed(tokens))
            h = torch.zeros_like(y[:, 0])
            for t in range(steps):
                h = self.cell(y[:, t], h)
            return h

    model, tokens = Net(), torch.randint(9, (2, 4))
    assert by_name(pyops.explain(model, tokens, steps=3))["rnn"].reason == "pyops: LSTM"
    rows = by_name(pyops.explain(pyops.fuse(model), tokens, 3))
    assert rows["rnn"].ours and rows["cell"].ours and (rows["cell"].runs, rows["cell"].calls) == ("pyops: GRUCell, 3 times", 3)
    assert rows["embed"].reason == "no kernel for such a layer on its own"
    model.rnn = nn.LSTM(4, 5, batch_first=True)
    assert by_name(pyops.explain(model, tokens, 3))["rnn"].reason == "not fused yet"
    alone = pyops.explain(pyops.fuse(nn.GRU(3, 4)), torch.randn(2, 1, 3))
    assert [row.runs for row in alone.rows] == ["pyops: GRU"] and alone.rows[0].share == 1.0


class Own(nn.Conv2d):
    pass


def stage(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_reasons(fused):
    model = nn.Sequential(*(stage(kind(3, 3, 3, padding=1)) for kind in (nn.Conv2d, nn.Conv2d, nn.Conv2d, Own, nn.Conv2d)))
    model[0][0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model[1][0])
    model[2][1].forward = model[2][1].forward
    rows = by_name(pyops.explain(pyops.fuse(model) if fused else model, IMAGE))
    assert rows["0.0"].reason == "it has hooks" and rows["0.1"].reason == "0.0, which it would run with: it has hooks"
    assert rows["1.0"].reason == "parametrised" and rows["1.1"].reason == "not called beside a layer that it runs with"
    assert rows["2.1"].reason == "its forward was set on the instance"
    assert rows["2.2"].reason == "2.1, which it would run with: its forward was set on the instance"
    assert rows["3.0"].reason == "a subclass of torch's Conv2d"
    assert not any(rows[name].ours for name in ("0.0", "0.1", "1.0", "2.1", "2.2", "3.0"))
    assert rows["4.0"].ours is fused and (fused or rows["4.0"].reason.startswith("one call: ConvChain"))


class Branch(nn.Module):
    """Functions among its layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return y.flatten(1)


@auto
def test_functions_run_with_layers_or_on_their_own():
    model = pyops.fuse(nn.Sequential(Branch()))
    found = pyops.explain(model, IMAGE)
    assert [row.names for row in found.rows] == [("Sequential",), ("0",), ("0.conv", "0.norm")]
    assert found.rows[1].functions == ("flatten",) and found.rows[2].runs == "one call: ConvChain with relu"
    model[0].conv.register_forward_hook(lambda *_: None)
    found = pyops.explain(model, IMAGE)
    assert [row.names for row in found.rows] == [("Sequential",), ("0",), ("0.conv",), ("0.norm",)]
    assert found.rows[1].runs == "PyTorch's functions: relu, flatten"
    check_sums(found)


def test_another_version_of_a_library(monkeypatch):
    from pyops._fusion import rules

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x) * 2

    rule = (lambda module: rules.Change(None), frozenset(["0" * 16]))
    monkeypatch.setitem(rules._RULES, f"{Block.__module__}.{Block.__qualname__}", rule)
    rows = by_name(pyops.explain(Block(), torch.randn(2, 3)))
    expected = f"another version of {Block.__module__} than pyops knows"
    assert rows["Block"].reason == expected and expected in rows["inner"].reason


def test_a_forward_without_source():
    names = {"nn": nn}
    exec(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()\n"
        "    def forward(self, x):\n"
        "        return self.act(self.conv(x))\n",
        names,
    )
    rows = by_name(pyops.explain(pyops.fuse(names["Net"]()), IMAGE))
    assert (
        rows["conv"].reason == rows["act"].reason == ("not called beside a layer that it runs with (Net: no source of its forward to read)")
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_scripted_layers_are_one():
    inner = torch.jit.trace(stage(nn.Conv2d(3, 3, 1)).eval(), IMAGE)
    rows = by_name(pyops.explain(nn.Sequential(inner, nn.Flatten()), IMAGE))
    assert list(rows) == ["Sequential", "0", "1"] and rows["0"].reason == "scripted or traced" and rows["0"].runs == "PyTorch"


@auto
def test_a_block_seen_through_a_view():
    """Which is put aside where layers are watched, and run where they are not."""
    model = pyops.models.mobilenet_v2(width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 1]])
    found = pyops.explain(model, torch.randn(1, 3, 32, 32))
    blocks = [row for row in found.rows if row.runs.startswith("one call: InvertedResidual")]
    assert len(blocks) == 3 and all(row.ours and not row.reason and len(row.names) > 4 for row in blocks)


@auto
def test_autocast():
    model = pyops.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert by_name(pyops.explain(model, IMAGE))["0"].ours
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = by_name(pyops.explain(model, IMAGE))
    assert rows["0"].reason == rows["2"].reason == "autocast"


@auto
def test_a_network_that_reads_its_input_as_given():
    """Its first call fails in channels_last and begins anew; a module that calls itself has one row."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4 * 14 * 14, 2)

        def forward(self, x, again=True):
            if again:
                return self(x, again=False)
            x = self.act(self.stem(x))
            return self.head(x.view(len(x), -1))

    found = pyops.explain(pyops.fuse(Net()), IMAGE)
    assert [row.names for row in found.rows] == [("Net",), ("stem", "act"), ("head",)]
    assert (found.layers, found.calls, found.rows[0].calls) == (3, 2, 2)
    check_sums(found)


def test_the_model_is_left_as_it_was():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fails = nn.LSTM(3, 3), False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("no")
            return self.layer(x + torch.randn(3))[0]

    model, x = Noisy().train(), torch.randn(2, 1, 3)
    model.register_forward_hook(lambda *_: None)
    before = state_of(model)
    state = torch.get_rng_state()
    pyops.explain(model, x)
    assert torch.equal(torch.get_rng_state(), state) and state_of(model) == before
    model.fails = True
    for fused in (model, pyops.fuse(model)):
        before = state_of(fused)
        with pytest.raises(RuntimeError, match="no"):
            pyops.explain(fused, x)
        assert state_of(fused) == before
    module = sys.modules["torch.nn.modules.module"]
    assert not module._global_forward_hooks and not module._global_forward_pre_hooks


def test_errors_and_ops():
    with pytest.raises(TypeError, match=r"explain: inputs: expected the arguments of the model's forward, got none"):
        pyops.explain(nn.Linear(2, 2))
    compiled = nn.Sequential(nn.ReLU())
    compiled[0].compile(backend="eager")
    with pytest.raises(TypeError, match=r"explain: model: expected no part that torch.compile made, got one: 0"):
        pyops.explain(compiled, torch.zeros(1))
    with pytest.raises(ValueError, match="explain: op: expected one of"):
        pyops.explain("relu")
    weights = torch.randn(20, 4), torch.randn(20, 5)
    assert pyops.explain(pyops.fused_lstm, torch.randn(2, 3, 4), None, *weights).op == "fused_lstm"
