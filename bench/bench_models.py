"""Whole networks of pyops.models against their eager twins (torchvision's own, where it has the network): inference, training steps and
the most memory that one holds. Images in both layouts, of the size that the network is known for; `--bench-models a,b` names some.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyops import models as zoo
from pyops._flops import counting
from pyops.demo.measure import peak_bytes
from pyops.testing.samples import conv_peers
from pyops.testing.twins import twin

from .bench_ops import DEVICE
from .conftest import collect, record


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("--bench-models")
    metafunc.parametrize("name", [zoo.entry(name).name for name in wanted.split(",")] if wanted else zoo.list())


def laid_out(model: nn.Module, inputs: tuple[Tensor, ...], layout: torch.memory_format) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Of networks of images; of others, as they are."""
    if all(value.dim() != 4 for value in inputs):
        return model, inputs
    images = tuple(value.contiguous(memory_format=layout) if value.dim() == 4 else value for value in inputs)
    return model.to(memory_format=layout), images


def build(name: str, batch: int, train: bool) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    """(ours, what makes the twin with the same weights in a layout, inputs)"""
    torch.manual_seed(0)
    ours = zoo.create(name).to(DEVICE).train(train)
    inputs = tuple(value.to(DEVICE) for value in zoo.entry(name).inputs(batch))

    def eager(layout: torch.memory_format):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision's, of random weights that are replaced here
            model = twin(name)
        model.load_state_dict(ours.state_dict())
        return laid_out(model.to(DEVICE).train(train), inputs, layout)

    return ours, eager, inputs


def peers_of(eager, inputs: tuple[Tensor, ...], wrap, compiled, wanted: str) -> tuple[dict, dict]:
    """wrap: of a network and its inputs, the call to time."""
    factories = {
        "torch.nn": lambda: wrap(*eager(torch.channels_last)),
        "torch.nn NCHW": lambda: wrap(*eager(torch.contiguous_format)),
        "torch.compile": lambda: compiled(*eager(torch.channels_last)),
    }
    if all(value.dim() != 4 for value in inputs):
        del factories["torch.nn NCHW"]
    return collect(factories, wanted if wanted == "all" else f"torch.nn NCHW,{wanted}")


def work_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """(FLOPs, bytes of inputs, outputs and parameters) of an inference."""
    with torch.no_grad(), counting() as found:
        outputs = tensors(model(*inputs))
    return found[model], sum(t.numel() * t.element_size() for t in (*inputs, *outputs, *model.parameters()))


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("batch", [1, 8])
def bench_model(name, batch, race, benchmark, request):
    ours, eager, inputs = build(name, batch, train=False)
    with torch.no_grad():

        def frozen(model, values):
            call = conv_peers.frozen(model, *values)
            return lambda: call(*values)

        def plain(model, values):
            return lambda: model(*values)

        peers, skipped = peers_of(eager, inputs, plain, frozen, request.config.getoption("--bench-peers"))
        flops, moved = work_of(ours, inputs)
        model, values = laid_out(ours, inputs, torch.channels_last)
        times = race(DEVICE)(lambda: model(*values), peers)
    facts = dict(op=name, sample=f"batch {batch}", backend=DEVICE, skipped=skipped)
    record(benchmark, times, flops, moved, DEVICE, torch.float32, **facts, **{"pass": "forward"})


def training_step(model: nn.Module, inputs: tuple[Tensor, ...], call: Any = None):
    """Forward and backward; gradients are dropped at the end. call: the network compiled."""
    call = model if call is None else call  # not `or`: a compiled network asks itself for its length

    def step():
        outputs = [y for y in tensors(call(*inputs)) if y.requires_grad]
        torch.autograd.backward([y.float().square().mean() for y in outputs])
        for parameter in model.parameters():
            parameter.grad = None

    return step


@pytest.mark.parametrize("batch", [8])
def bench_model_training(name, batch, race, benchmark, request):
    ours, eager, inputs = build(name, batch, train=True)

    def compiled(model, values):
        torch._dynamo.reset()
        return training_step(model, values, torch.compile(model))

    peers, skipped = peers_of(eager, inputs, training_step, compiled, request.config.getoption("--bench-peers"))
    flops, moved = work_of(ours, inputs)
    step = training_step(*laid_out(ours, inputs, torch.channels_last))
    step()
    where = next(ours.parameters())
    facts = dict(op=name, sample=f"batch {batch}", backend=DEVICE, skipped=skipped)
    facts["peak_bytes"] = {name: peak_bytes(call, where) for name, call in {"ours": step, **peers}.items()}
    times = race(DEVICE)(step, peers)
    # forward, then gradients of inputs and of parameters
    record(benchmark, times, 3 * flops, 3 * moved, DEVICE, torch.float32, **facts, **{"pass": "training"})
