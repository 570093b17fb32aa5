"""What `pyops.fuse` is held to on anyone's model: the numbers within the numerics gate, and `unfuse` the way back, exactly."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import pyops

from .conftest import assert_gate
from .models import liven

DROPS = ("p", "drop_prob", "drop_rate", "dropout", "attention_dropout")  # what layers call the share that they drop in training


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating tensors of the forward's result. inputs: a tensor, a tuple of arguments or a dict of keyword arguments."""
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def doubled(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def laid_out(model: nn.Module, inputs: Any) -> Any:
    """Images in channels_last, as a fused network has them inside, where eager can read such: PyTorch sums a convolution otherwise in the
    other layout."""
    if not any(isinstance(part, nn.Conv2d) for part in model.modules()):
        return inputs
    last = torch.channels_last
    images = tree_map(lambda x: x.contiguous(memory_format=last) if isinstance(x, Tensor) and x.dim() == 4 else x, inputs)
    try:
        with torch.no_grad():
            call(copy.deepcopy(model), images)
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)
        return inputs
    return images


def drawn(inputs: Any, seed: int) -> Any:
    """Other inputs of the same kind: with the elements of every tensor in another order, but for seed 0."""
    torch.manual_seed(seed)

    def mixed(x: Any) -> Any:
        return torch.empty_like(x).copy_(x.flatten()[torch.randperm(x.numel())].view(x.shape)) if isinstance(x, Tensor) else x

    return tree_map(mixed, inputs) if seed else inputs


def redraw(model: nn.Module, seed: int) -> None:
    """Other weights near those that it has: how a folded filter is rounded is luck as much as an input is."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


def still(model: nn.Module) -> None:
    """No random numbers in training, which a float64 network draws otherwise."""
    for part in model.modules():
        for name in DROPS:
            if isinstance(part.__dict__.get(name), float):
                setattr(part, name, 0.0)


def shape_of(model: nn.Module) -> list[Any]:
    """Everything about a model that `unfuse` brings back, beside its tensors."""
    return [(name, type(part), sorted(part.__dict__)) for name, part in model.named_modules()]


def kinds(model: nn.Module) -> Counter[str]:
    """How many modules of a fused model behave as which class of pyops.nn; "": as their own, rewritten."""
    fused = [type(part) for part in model.modules() if "_fused_attributes" in part.__dict__]
    return Counter(getattr(getattr(cls, "_kind", cls), "__name__", "") for cls in fused)


def fused(model: nn.Module) -> None:
    """Fuses `model`; its state dict is then the very same."""
    before = model.state_dict(keep_vars=True)
    assert pyops.fuse(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)


def check_inference(model: nn.Module, inputs: Any) -> Counter[str]:
    """Holds a fused model's outputs in eval mode to the gate and `unfuse` to the way back; what parts of it became, as `kinds` says."""
    torch.manual_seed(0)
    liven(model.eval())
    eager, truth, shape = copy.deepcopy(model), copy.deepcopy(model).double(), shape_of(model)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad(), torch.backends.flags(fp32_precision="ieee"):
        before, images = call(model, inputs), laid_out(eager, inputs)
        fused(model)
        found = kinds(model)

        def draw(seed: int):
            eager.load_state_dict(start)
            if seed:
                redraw(eager, seed)
            for twin in (model, truth):
                twin.load_state_dict(eager.state_dict())
            given = drawn(inputs, seed)
            return call(model, given), call(truth, doubled(given)), call(eager, drawn(images, seed))

        assert_gate(draw, torch.float32)
        model.load_state_dict(start)
        pyops.unfuse(model)
        assert shape_of(model) == shape
        assert all(torch.equal(a, b) for a, b in zip(call(model, inputs), before, strict=True))
    return found


def check_training(model: nn.Module, inputs: Any) -> Counter[str]:
    """Holds one step of a fused model in train mode to the gate: outputs, every gradient, the running statistics; what parts became."""
    torch.manual_seed(0)
    liven(model.train())
    still(model)
    eager, truth, shape = copy.deepcopy(model), copy.deepcopy(model).double(), shape_of(model)
    start, images = copy.deepcopy(model.state_dict()), laid_out(eager, inputs)
    fused(model)
    found = kinds(model)

    def step(model: nn.Module, given: Any) -> list[Tensor]:
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(1)
        outputs = call(model, given)
        sum((y**2).mean() for y in outputs).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [t.detach().clone() for t in (*outputs, *grads, *(b for b in model.buffers() if b.is_floating_point()))]

    def draw(seed: int):
        given = drawn(inputs, seed)
        return step(model, given), step(truth, doubled(given)), step(eager, drawn(images, seed))

    with torch.backends.flags(fp32_precision="ieee"):
        assert_gate(draw, torch.float32, gradient=True)
    counts = [[b for b in part.buffers() if not b.is_floating_point()] for part in (model, eager)]
    assert all(torch.equal(a, b) for a, b in zip(*counts, strict=True))
    pyops.unfuse(model)
    assert shape_of(model) == shape
    return found
