"""What every fused model is held to: the numbers, gradients, statistics and state dict that it had, and the way back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pyops

from .conftest import assert_gate


def leaves(value: Any) -> list[Tensor]:
    """The tensors in whatever a forward gives, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.to(torch.float64)
    return type(value)(map(in_double, value)) if isinstance(value, (tuple, list)) else value


def results(model: nn.Module, inputs: tuple, seed: int = 1) -> list[Tensor]:
    """Outputs; in training also every gradient, the inputs' included, and the buffers."""
    torch.manual_seed(seed)
    inputs = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
    if not model.training:
        with torch.no_grad():
            return leaves(model(*inputs))
    given = [value.requires_grad_() for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    model.zero_grad()
    outputs = [output for output in leaves(model(*(value.clone() if isinstance(value, Tensor) else value for value in inputs)))]
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        sum((output * output).mean() for output in differentiable).backward()
    grads = [t.grad for t in (*model.parameters(), *given) if t.grad is not None]
    return [t.detach().clone() for t in (*outputs, *grads, *model.buffers())]


def facts(model: nn.Module) -> list[tuple]:
    """What unfuse restores of every module."""
    return [(name, type(part), sorted(part.__dict__)) for name, part in model.named_modules()]


def check_fused(
    model: nn.Module, inputs: Callable[[], tuple], train: bool = False, random: bool = False, images_last: bool = False
) -> bool:
    """Holds the model, fused, to its twin; whether anything of it was fused. random: its numbers are drawn in the inputs' dtype, so that
    only eager's float32 knows them. images_last: eager's rounding is measured in the layout that fused models work in."""
    model.train(train)
    twin, before = copy.deepcopy(model), facts(model)
    truth, start = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    assert pyops.fuse(model) is model
    changed = facts(model) != before
    assert list(model.state_dict()) == list(start)

    def draw(seed):
        torch.manual_seed(seed)
        given = inputs()
        found = []
        laid_out = tuple(x.contiguous(memory_format=torch.channels_last) for x in given) if images_last else given
        for network, values in ((model, given), (truth, in_double(given)), (twin, laid_out)):
            network.load_state_dict(start)
            found.append(results(network, values))
        return found

    ours, _, eager = draw(0)
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in eager]
    with torch.backends.flags(fp32_precision="ieee"):  # Winograd, and oneDNN's long sums, round more than the gate allows
        if not changed:
            assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(ours, eager, strict=True))
        elif random:
            for a, b in zip(*draw(0)[::2], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert_gate(draw, torch.float32, gradient=train)
    assert pyops.unfuse(model) is model and facts(model) == before
    torch.manual_seed(0)
    given = inputs()
    for network in (model, twin):
        network.load_state_dict(start)
    assert all(torch.equal(a, b) for a, b in zip(results(model, given), results(twin, given), strict=True))
    return changed
