"""What every network of the zoo is held to, beside its eager twin: the same state_dict, the same numbers within the numerics gate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyops import models as zoo
from pyops.testing.twins import twin

from .conftest import assert_gate


class Case(NamedTuple):
    """A network small enough to test."""

    inputs: Callable[[], tuple[Tensor, ...]]
    options: dict[str, Any] = {}  # noqa: RUF012  (never written)
    prepare: Callable[[nn.Module], Any] = lambda model: None  # of either network: sets dropout to 0 or the like before a training step
    shorten: Callable[[nn.Module], Any] = lambda model: None  # of either network: takes blocks out, so that large ones are tested soon


def both(name: str, case: Case) -> tuple[Any, Any]:
    """Ours and its twin, with the same weights, loaded strictly each way."""
    torch.manual_seed(0)
    ours, theirs = zoo.create(name, **case.options), twin(name, **case.options)
    case.shorten(ours), case.shorten(theirs)
    liven(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    return ours, theirs


def liven(model: nn.Module) -> None:
    """Batch norm, and linear layers that start at zero, as after a training: neither ones nor zeros anywhere."""
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
        elif isinstance(part, nn.Linear) and not part.weight.any():
            nn.init.normal_(part.weight, 0, 0.1)


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a network's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [leaf for part in (result.values() if isinstance(result, dict) else result or ()) for leaf in leaves(part)]


def check_inference(name: str, case: Case) -> None:
    ours, theirs = (model.eval() for model in both(name, case))
    truth = copy.deepcopy(theirs).double()

    def draw(seed):
        torch.manual_seed(seed)
        inputs = case.inputs()
        with torch.no_grad():
            return leaves(ours(*inputs)), leaves(truth(*doubled(inputs))), leaves(theirs(*inputs))

    assert_gate(draw, torch.float32)


def check_training(name: str, case: Case) -> None:
    """Outputs, every parameter's gradient and, where there is batch norm, its running statistics, of one step in train mode."""
    ours, theirs = both(name, case)
    truth = copy.deepcopy(theirs).double()
    for model in (ours, theirs, truth):
        case.prepare(model.train())
    start = copy.deepcopy(theirs.state_dict())

    def step(model, inputs):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(1)
        outputs = leaves(model(*inputs))
        sum((y.float() ** 2).mean() if y.dtype != torch.float64 else (y**2).mean() for y in outputs).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [*(y.detach() for y in outputs), *grads, *(b for b in model.buffers() if b.is_floating_point())]

    def draw(seed):
        torch.manual_seed(seed)
        inputs = case.inputs()
        return [[t.clone() for t in step(model, x)] for model, x in ((ours, inputs), (truth, doubled(inputs)), (theirs, inputs))]

    assert_gate(draw, torch.float32, gradient=True)


def check_copies(name: str, case: Case) -> None:
    """A deep copy and a pickled one compute what the network computes, after it has been called."""
    model = zoo.create(name, **case.options).eval()
    case.shorten(model)
    inputs = case.inputs()
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = leaves(model(*inputs))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.manual_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(leaves(other(*inputs)), wanted, strict=True))
