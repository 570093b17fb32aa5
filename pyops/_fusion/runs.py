"""Layers that a forward calls one after another, run as one where kernels can stand for several: what `rewrite` puts in the calls' place.

A run is a tuple of names: of a child of the owner, "?name" of one that is left out where it is None, "+" or "+=" where a residual is
added, or a key of FUNCTIONS. What no kernel stands for is called as the forward called it, in its order.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyops.nn.chain import SUMS, ConvChain, grouped, runs_apart
from pyops.ops import _conv_call

Names = tuple[str, ...]

FUNCTIONS: dict[str, nn.Module] = {}  # layers that do what functions without parameters do, by the function's call


class Plan(NamedTuple):
    """The steps of a run, and the layers that they were made for: (where a layer was found, under which name, itself)."""

    owner: dict[str, Any]  # its attributes: a shallow copy of it has others
    places: list[tuple[dict[str, Any], str, Any]]
    early: list[Any]  # before the residual
    sum: Any  # takes the residual; None: there is none in a view
    late: list[Any]
    waits: bool  # the sum's layers are the owner's at one place alone: called elsewhere too, batch norm has to see its inputs in order

    def holds(self, owner: nn.Module) -> bool:
        if self.owner is not owner.__dict__:
            return False
        for place, name, layer in self.places:  # noqa: SIM110  (a generator costs a microsecond at every run)
            if place.get(name) is not layer:
                return False
        return True


class Held(NamedTuple):
    """A run that waits for its residual, before the view that takes it in."""

    plan: Plan
    input: Tensor


def run(owner: nn.Module, names: Names, input: Any) -> Any:
    """The layers of `names`, none of which is a sum, one after another."""
    if runs_apart(input):
        for name in names:
            input = _call(owner, name, input)
        return input
    for step in plan(owner, names).early:
        input = step(input)
    return input


def begin(owner: nn.Module, names: Names, input: Any, firm: bool) -> Any:
    """The layers before the sum: what they give, or `Held` where the last of them run with the sum.

    firm: nothing comes between this call and `finish`, so that even the first layers can wait; else `input` itself might be written to.
    """
    at = place_of_sum(names)
    if not runs_apart(input):
        found = plan(owner, names)
        if found.sum is not None and (firm or (found.waits and any(isinstance(step, ConvChain) for step in found.early))):
            for step in found.early:
                input = step(input)
            return Held(found, input)
    return run(owner, names[:at], input)


def finish(owner: nn.Module, names: Names, begun: Any, residual: Any) -> Any:
    """The sum and the layers behind it."""
    at = place_of_sum(names)
    if type(begun) is Held:
        chain, output = begun.plan.sum, begun.input
        if type(residual) is Tensor:
            output = chain(output, residual)
            for step in begun.plan.late:
                output = step(output)
            return output
        begun = nn.Sequential(*list(chain)[: chain.before])(output)
    return run(owner, names[at + 1 :], SUMS[names[at]](begun, residual))


def view(input: Any, *sizes: Any) -> Any:
    """`input.view(*sizes)`; an image in channels_last gets PyTorch's layout first, in place, since views share its memory."""
    image = type(input) is Tensor and input.dim() == 4 and not _conv_call.is_followed()
    if image and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        input.data = input.contiguous()
    return input.view(*sizes)


def place_of_sum(names: Names) -> int:
    return next(i for i, name in enumerate(names) if name in SUMS)


def plan(owner: Any, names: Names) -> Plan:
    found = owner._kept.get(names)
    if found is None or not found.holds(owner):
        found = owner._kept[names] = _make(owner, names)
    return found


def _make(owner: nn.Module, names: Names) -> Plan:
    layers: list[Any] = []
    places: list[tuple[dict[str, Any], str, Any]] = []
    for name in names:
        if name in SUMS:
            layers.append(name)
        elif name in FUNCTIONS:
            layers.append(FUNCTIONS[name])
        else:
            key = name.removeprefix("?")
            layer = getattr(owner, key)
            places.append((owner._modules, key, owner._modules.get(key)))
            if key not in owner._modules:
                places.append((owner.__dict__, key, layer))
            if layer is not None or key == name:
                layers.append(layer)
    steps = grouped(layers)
    at = next((i for i, (_, adds) in enumerate(steps) if adds), len(steps))
    takes = at < len(steps) and isinstance(steps[at][0], ConvChain)
    only = [step for step, _ in steps]
    view = only[at] if takes else None
    seen = Counter(part for _, part in owner.named_modules(remove_duplicate=False))
    waits = view is not None and all(seen[layer] < 2 for layer in view)
    return Plan(owner.__dict__, places, only[:at], view, only[at + 1 :], waits)


def _call(owner: nn.Module, name: str, input: Any) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name].forward(input)  # a call would tell hooks of every module, and tracers, of a layer that is not there
    layer = getattr(owner, name.removeprefix("?"))
    return input if layer is None and name[0] == "?" else layer(input)
