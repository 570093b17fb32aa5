"""pyops.fuse on modules written in every manner: what their forwards mean stays what it was."""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import linecache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import relu

import pyops
from pyops._fusion import classes, rewrite

from .fusing import check_fused, facts, results


def image(*shape: int):
    return lambda: (torch.randn(shape or (2, 4, 6, 6)),)


class Base(nn.Module):
    """Layers for the forwards below."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.act, self.drop = nn.ReLU(inplace=True), nn.SiLU(), nn.Dropout2d(0.3)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.skip = None
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class ReadTwice(Base):
    def forward(self, x):
        a = self.conv1(x)
        b = self.bn1(a)
        return self.relu(b) + a


class AddedToLater(Base):
    def forward(self, x):
        a = self.conv1(x)
        b = self.drop(a)
        a += b
        return a


class NamesItself(Base):
    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return x if isinstance(self, NamesItself) else -x


class CapturedByLambda(Base):
    def forward(self, x):
        read = lambda: out  # noqa: E731
        out = self.conv1(x)
        before = read()
        out = self.bn1(out)
        return self.relu(out) + before


class CapturedByGenerator(Base):
    def forward(self, x):
        out = self.conv1(x)
        kept = (out * i for i in range(2))
        out = self.bn1(out)
        return self.relu(out) + sum(kept)


class Comprehension(Base):
    def forward(self, x):
        outs = [self.relu(self.bn1(self.conv1(x))) for _ in range(2)]
        out = self.conv2(outs[0])
        out = self.bn2(out)
        return torch.stack([out + o for o in outs])


class Loop(Base):
    def forward(self, x):
        for _ in range(2):
            y = self.conv1(x)
            x = self.bn1(y)
            x = self.relu(x)
        while x.dim() < 4:
            x = self.act(x)
        return x


class LoopCarries(Base):
    def forward(self, x):
        y = x
        for _ in range(2):
            z = y * 2
            y = self.conv1(x)
            x = self.bn1(y)
            x = x + z
        return x


class EarlyReturn(Base):
    def forward(self, x):
        out = self.conv1(x)
        if x.shape[0] == 2:
            return self.relu(self.bn1(out))
        out = self.bn2(out)
        return out


class Tries(Base):
    def forward(self, x):
        try:
            out = self.conv1(x)
            out = self.bn1(out.view(-1))
        except RuntimeError:
            pass
        except ValueError:
            pass
        return out


class Deletes(Base):
    def forward(self, x):
        out = self.conv1(x)
        y = self.bn1(out)
        del out
        return self.relu(y)


class Walrus(Base):
    def forward(self, x):
        out = x + self.bn1(self.conv1(x := x * 2))
        return self.relu(out)


class AddsNumber(Base):
    def forward(self, x):
        scale = 2
        out = self.bn1(self.conv1(x))
        out += scale
        out = self.relu(out)
        out = self.conv2(out)
        return self.bn2(out) + scale


class AddsDouble(Base):
    def forward(self, x):
        identity = x.double()
        out = self.conv1(x)
        out = self.bn1(out)
        out += identity
        wide = self.bn2(self.conv2(out)) + identity
        return self.act(wide), out


class AddsBroadcast(Base):
    def forward(self, x):
        identity = x[:, :, :1, :1]
        out = self.bn1(self.conv1(x)) + identity
        out = self.relu(out)
        row = out.mean((0, 2), keepdim=True)
        out = self.conv2(out)
        out = self.bn2(out)
        out += row
        return self.relu(out)


class WrittenInShortcut(Base):
    """The convolution reads x before the shortcut writes to it."""

    def forward(self, x):
        x = x * 1.0
        out = self.conv1(x)
        out = self.bn1(out)
        identity = self.relu(x)
        out = out + identity
        return self.act(out)


class WrittenInExpression(Base):
    def forward(self, x):
        x = x * 1.0
        return self.act(self.bn1(self.conv1(x)) + self.relu(x))


class SharedNorm(Base):
    """Running statistics depend on who comes first."""

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        identity = self.bn2(x)
        out += identity
        return self.relu(out)


class SharedBySubmodule(Base):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn2)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        identity = self.down(x)
        out += identity
        return self.relu(out)


class PlainFunction(Base):
    def __init__(self):
        super().__init__()
        self.plain = torch.tanh
        self.late = functools.partial(F.leaky_relu, negative_slope=0.3)

    def forward(self, x):
        return self.late(self.bn2(self.conv2(self.plain(self.bn1(self.conv1(x))))))


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x * 2


class OddCallables(Base):
    def __init__(self):
        super().__init__()
        self.odd = Unhashable()
        self.listed = [nn.ReLU(), F.silu]

    def forward(self, x):
        x = self.odd(self.bn1(self.conv1(x)))
        x = self.listed[0](self.bn2(self.conv2(x)))
        return self.listed[1](x)


class Swaps(Base):
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        self.act = nn.Tanh() if isinstance(self.act, nn.SiLU) else nn.SiLU()
        return self.act(self.bn2(self.conv2(out)))


class Shadowed(Base):
    """A name that is a property of the class is no child."""

    bn3 = staticmethod(torch.sin)

    @property
    def bn4(self):
        return torch.cos

    def forward(self, x):
        return self.bn4(self.bn3(self.bn1(self.conv1(x))))


class Arguments(Base):
    def forward(self, x, *rest, scale=2.0, act=None, **more):
        out = self.bn1(self.conv1(x, *rest))
        out = self.relu(out) * scale
        return out if act is None else act(out)


class Parent(Base):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class CallsParent(Parent):
    def forward(self, x):
        x = super().forward(x)
        x = self.conv2(x)
        return self.act(self.bn2(x))


class CallsParentByName(Parent):
    def forward(self, x):
        return self.act(self.bn2(Parent.forward(self, x)))


class Inherits(Parent):
    def __init__(self):
        super().__init__()
        self.relu = nn.Hardswish()


class AsksForClass(Parent):
    def forward(self, x):
        return super(type(self), self).forward(x) + 1


class AsksForClassToo(Parent):
    def forward(self, x):
        return super(self.__class__, self).forward(x) + 1


class Called(Parent):
    def __call__(self, x):
        return super().__call__(x) * 2


def doubled(method):
    @functools.wraps(method)
    def run(self, x):
        return method(self, x) * 2

    return run


class Decorated(Base):
    @doubled
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    @staticmethod
    def scale(x):
        return x

    @classmethod
    def of(cls):
        return cls()


class Generates(Base):
    def steps(self, x):
        x = self.conv1(x)
        yield x
        x = self.bn1(x)
        yield self.relu(x)

    def forward(self, x):
        return torch.stack(list(self.steps(x)))


class Skips(Base):
    def forward(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        if self.skip is not None:
            out = self.skip(out)
        if self.training:  # noqa: SIM108
            out = self.relu(out)
        else:
            out = self.act(out)
        out = self.conv2(out)
        if self.skip is None:
            out = self.bn2(out)
        return out


class Imported(Base):
    def forward(self, x):
        return relu(self.bn1(self.conv1(x)))


class LocalF(Base):
    def forward(self, x, F=torch):
        return F.relu(self.bn1(self.conv1(x))) + F.tanh(self.bn2(self.conv2(x)))


class Impostor:
    relu = staticmethod(torch.sin)


class AssignedF(Base):
    def forward(self, x):
        F = Impostor
        return F.relu(self.bn1(self.conv1(x)))


class ImportsInside(Base):
    def forward(self, x):
        from torch import sin as relu

        return relu(self.bn1(self.conv1(x)))


class DefinesInside(Base):
    def forward(self, x):
        def relu(y):
            return y.sin()

        return relu(self.bn1(self.conv1(x)))


def closed_over():
    F = Impostor

    class ClosedOver(Base):
        def forward(self, x):
            return F.relu(self.bn1(self.conv1(x)))

    return ClosedOver()


class Mangled(Base):
    def __init__(self):
        super().__init__()
        self.__conv, self.__scale = nn.Conv2d(4, 4, 1), 3.0

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.__conv(out) * self.__scale


class OtherMethods(Base):
    def features(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    def head(self, x):
        x = x.mean((2, 3))
        x = self.fc1(x)
        x = F.relu(x)
        return self.fc2(x)

    def forward(self, x):
        return self.head(self.features(x))


class LongText(Base):
    def forward(self, x):
        text = """
    of several
lines"""
        out = self.relu(self.bn1(self.conv1(x)))
        return out * len(text)


class RenamesSelf(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        self = self.act
        return self(out)


class LooksAtVariables(Base):
    def forward(self, x):
        y = self.conv1(x)
        z = self.bn1(y)
        return z + eval("y")


class Required(Base):
    """Its subclasses have to say who they are."""

    def __init_subclass__(cls, *, word, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.word = word


class WithRequired(Required, word="here"):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Refuses(type):
    def __new__(meta, name, bases, namespace, word=None):
        if any(isinstance(base, Refuses) for base in bases):
            raise ValueError("no subclasses")
        return super().__new__(meta, name, bases, namespace)


class OfMetaclass(Base, metaclass=Refuses):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Abstract(Base, metaclass=abc.ABCMeta):
    __slots__ = ("places",)

    @abc.abstractmethod
    def forward(self, x): ...


class Slots(Abstract):
    __slots__ = ("more",)

    def forward(self, x):
        self.more = 1
        return self.relu(self.bn1(self.conv1(x)))


class NamesOfOurs(Base):
    """Names that fused modules might use."""

    def __init__(self):
        super().__init__()
        self.chain, self.run = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.ReLU()
        self._original, self._kind = nn.Conv2d(4, 4, 1), 3

    def forward(self, x):
        return self.run(self.chain(self.act(self.bn1(self.conv1(x))))) * self._kind + self._original(x)


class KeepsItself(Base):
    def __init__(self):
        super().__init__()
        self._kept = []

    def forward(self, x):
        self._kept.append(1)
        return self.act(self.bn1(self.conv1(x))) * len(self._kept)

    def train(self, mode=True, why=None):
        self._kept = []
        return super().train(mode)


class ReadsMemory(Base):
    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return torch.as_strided(x, (2, 4, 36), (144, 36, 1))


class Contexts(Base):
    def forward(self, x):
        with torch.set_grad_enabled(self.training), contextlib.nullcontext():
            out = self.conv1(x)
            out = self.bn1(out)
        out = self.relu(out)
        return self.act(out)


class Views(Base):
    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        flat = x.view(x.size(0), -1)
        flat.mul_(2.0)
        return flat.sum(1) + x.view(-1, 36).mean()


CASES = [
    ReadTwice, AddedToLater, CapturedByLambda, CapturedByGenerator, Comprehension, Loop, LoopCarries, EarlyReturn, Tries, Deletes, Walrus,
    AddsNumber, AddsDouble, AddsBroadcast, WrittenInShortcut, WrittenInExpression, SharedNorm, SharedBySubmodule, PlainFunction,
    OddCallables, Swaps, Shadowed, Arguments, CallsParent, CallsParentByName, Inherits, AsksForClass, AsksForClassToo, Called, Decorated,
    Generates, Skips, Imported, LocalF, AssignedF, ImportsInside, DefinesInside, closed_over, Mangled, OtherMethods, LongText, RenamesSelf,
    LooksAtVariables, WithRequired, OfMetaclass, Slots, NamesOfOurs, KeepsItself, ReadsMemory, Contexts, Views, NamesItself,
]  # fmt: skip


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_manners(make, train):
    if train and make in (WrittenInShortcut, WrittenInExpression):
        pytest.skip("torch has no gradient of an input that was written to")
    torch.manual_seed(0)
    check_fused(make(), image(), train)


@pytest.mark.parametrize(
    "kind",
    [
        AddsDouble,
        AddsBroadcast,
        WrittenInShortcut,
        PlainFunction,
        CallsParent,
        Inherits,
        Mangled,
        OtherMethods,
        LongText,
        WithRequired,
        Slots,
    ],
)
def test_manners_that_are_rewritten(kind):
    """Else the cases above would prove little."""
    assert "forward" in rewrite.methods_of(kind) or "features" in rewrite.methods_of(kind)
    assert classes.is_fused(pyops.fuse(kind()))


RESIDUALS = {
    "added_to": "y += x\nreturn F.relu(y)",
    "same_name": "y = y + x\ny = F.relu(y)\nreturn y",
    "another_name": "z = y + x\nreturn F.relu(z)",
    "within": "return F.relu(x + y)",
    "within_its_own": "x = F.relu(y + x)\nreturn self.bn1(x)",
    "shortcut": "return F.relu(y + self.down(x))",
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lines", RESIDUALS.values(), ids=RESIDUALS)
def test_residuals(lines, train):
    """However the sum is written, and though the variable was read before."""
    lines = f"y = F.relu(self.bn1(self.conv1(x)))\ny = self.bn2(self.conv2(y))\n{lines}".replace("\n", "\n        ")
    kind = made(f"class Written(Base):\n    def forward(self, x):\n        {lines}\n", "Written", f"<residual {hash(lines)}>")
    torch.manual_seed(0)
    check_fused(kind(), image(), train)
    calls = [name for name in rewrite.methods_of(kind)["forward"].__code__.co_consts if isinstance(name, tuple)]
    assert any(set(names) >= {"conv2", "bn2"} and {"+", "+="} & set(names) and "ReLU([], {})" in names[3:] for names in calls), calls


def test_layers_replaced_after_the_fusion():
    torch.manual_seed(0)
    model = Skips().eval()
    twin = copy.deepcopy(model)
    pyops.fuse(model)
    (x,) = image()()

    def agree():
        torch.testing.assert_close(results(model, (x,)), results(twin, (x,)), rtol=1e-4, atol=1e-5)

    agree()
    for change in (
        lambda m: setattr(m, "skip", nn.Conv2d(4, 4, 1, bias=False).requires_grad_(False).apply(lambda l: nn.init.ones_(l.weight))),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "skip", None),
        lambda m: setattr(m, "act", torch.tanh) if m._modules.pop("act") else None,
        lambda m: setattr(m, "act", torch.cos),
        lambda m: nn.utils.parametrizations.weight_norm(m.conv2),
        lambda m: m.bn2.train(),
        lambda m: m.conv1.weight.data.mul_(2) if m.train() and m.eval() else None,
    ):
        change(model), change(twin)
        agree()
    model.conv1 = twin.conv1 = None
    for network in (model, twin):
        with pytest.raises(TypeError, match="not callable"):
            network(x)


def test_shallow_copies_part_ways():
    model = pyops.fuse(PlainFunction().eval())
    (x,) = image()()
    with torch.no_grad():
        model(x)
        other = copy.copy(model)
        other.late = torch.cos
        model(x)
        torch.testing.assert_close(other(x), torch.cos(model.bn2(model.conv2(model.plain(model.bn1(model.conv1(x)))))))


def made(source: str, name: str, file: str | None) -> type[nn.Module]:
    """A class of that source; file: where `inspect` finds it, None: nowhere."""
    if file is not None:
        linecache.cache[file] = len(source), None, source.splitlines(True), file
    namespace = dict(nn=nn, torch=torch, F=F, Base=Base, __name__="somewhere")
    exec(compile(source, file or "<nowhere>", "exec"), namespace)
    return namespace[name]


SOURCE = """
class Made(Base):
    def forward(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        return self.relu(out)
"""


def test_source_that_is_not_there_or_was_changed():
    assert rewrite.methods_of(made(SOURCE, "Made", "<here>"))
    assert not rewrite.methods_of(made(SOURCE, "Made", None))
    changed = made(SOURCE, "Made", "<edited>")
    linecache.cache["<edited>"] = 1, None, SOURCE.replace("bn1", "bn2").splitlines(True), "<edited>"
    assert not rewrite.methods_of(changed)
    assert check_fused(changed(), image()) is False or type(changed()) is changed


def test_what_cannot_be_fused_says_why():
    reasons = {type(found.module).__name__: found.reason for found in pyops.fuse.__globals__["survey"](
        nn.ModuleList([OfMetaclass(), KeepsItself()])
    )}  # fmt: skip
    assert "cannot be derived from: no subclasses" in reasons["OfMetaclass"]
    assert "_kept of its own" in reasons["KeepsItself"]
    assert "class behind its own" in classes.refused(AsksForClass)


# -- forwards drawn from a grammar -----------------------------------------------------------------------------------------------------

LAYERS = ["conv1", "conv2", "bn1", "bn2", "relu", "act", "drop", "down", "none"]


@st.composite
def forwards(draw):
    """Statements on variables, each of which any later one may read."""
    names, lines = ["x"], []
    for step in range(draw(st.integers(2, 7))):
        source = draw(st.sampled_from(names[-2:]))
        target = draw(st.sampled_from([source if source != "x" else "v0", f"v{step}"]))
        calls = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3))
        value = functools.reduce(lambda inner, layer: f"F.relu({inner})" if layer == "none" else f"self.{layer}({inner})", calls, source)
        kind = draw(st.sampled_from(["call", "call", "sum", "swapped", "added", "branch", "within"]))
        other = draw(st.sampled_from(names))
        if kind == "sum":
            value = f"{value} + {other}"
        elif kind == "swapped":
            value = f"{other} + {value}"
        elif kind == "branch":
            value = f"{value} + self.down({other})"
        elif kind == "within":
            value = f"self.act({value} + {other})"
        lines.append(f"{target} = {value}")
        names.append(target)
        if kind == "added" and other != target:
            lines.append(f"{target} += {other}")
    lines.append(f"return {draw(st.sampled_from(names))}, {names[-1]}")
    return lines


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(forwards(), st.booleans())
def test_drawn_forwards(lines, train):
    body = "\n".join(f"        {line}" for line in lines)
    kind = made(f"class Drawn(Base):\n    def forward(self, x):\n        x = x * 1.0\n{body}\n", "Drawn", f"<drawn {hash(body)}>")
    torch.manual_seed(0)
    model = kind().train(train)
    twin = copy.deepcopy(model)
    pyops.fuse(model)
    inputs = image()()

    def outcome(network):
        try:
            return results(network, inputs)
        except RuntimeError as error:  # of gradients that an in-place ReLU forbids
            return type(error)

    before, after = outcome(twin), outcome(model)
    if isinstance(before, list):  # where torch refuses, layers in one pass may find the gradient
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    pyops.unfuse(model)
    assert facts(model) == facts(twin)
