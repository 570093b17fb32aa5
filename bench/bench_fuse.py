"""Networks of torchvision after `pyops.fuse` against the same networks run by others: inference, training steps and the most memory that
one holds; float32, on a GPU also bfloat16. `--bench-models a,b` names any of torchvision's networks for classification.

Weights are random, batch norm's statistics too, so that folding them is work. Before anything is timed, outputs are compared with eager
PyTorch's. Ours takes images as users hold them, NCHW on a CPU and channels_last on a GPU; peers each the layout they are named by.
`first_call` keeps the seconds from a ready network to its first result: fusing, compiling and exporting count.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import pyops
from pyops.demo.measure import peak_bytes
from pyops.testing import relative_error
from pyops.testing.gate import GRADIENT
from pyops.testing.samples import conv_peers

from .bench_models import laid_out, tensors, training_step, work_of
from .bench_ops import DEVICE
from .conftest import collect, record

NETWORKS = ("resnet18", "efficientnet_b0", "densenet121", "vgg16", "inception_v3", "convnext_tiny", "swin_t", "vit_b_16")
DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
OWN_LAYOUT = torch.channels_last if DEVICE == "cuda" else torch.contiguous_format
# relative distance to eager's outputs that rounding explains: a GPU's convolutions take TF32 for float32 unless told otherwise
ROUNDING = {torch.float32: 5e-3 if DEVICE == "cuda" else 1e-4, torch.bfloat16: 0.1}

Call = Callable[[], Any]


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("--bench-models")
    metafunc.parametrize("name", wanted.split(",") if wanted else NETWORKS)


def build(name: str, batch: int, dtype: torch.dtype, train: bool) -> tuple[nn.Module, Tensor]:
    """The network in eager PyTorch, and images of the size that its published weights take."""
    from torchvision import models

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet's and Inception's random weights
        model = models.get_model(name, weights=None)
    liven(model)
    size = getattr(model, "image_size", None) or models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    images = torch.randn(batch, 3, size, size)
    return model.to(DEVICE, dtype).train(train).requires_grad_(train), images.to(DEVICE, dtype)


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Nothing is left at the ones, zeros and near-zeros that a training starts from: a mistake behind them would not be seen."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(0, 0.1)
        elif isinstance(part, nn.Linear) and not part.weight.any():
            part.weight.normal_(0, part.in_features**-0.5)
        elif isinstance(scale := getattr(part, "layer_scale", None), nn.Parameter):
            scale.uniform_(0.1, 0.3)


def in_layout(model: nn.Module, images: Tensor, layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """A copy of the network, and its images."""
    model, (images,) = laid_out(copy.deepcopy(model), (images,), layout)
    return model, images


def timed(name: str, factory: Callable[[], Call], seconds: dict[str, float], expected: list[Tensor]) -> Callable[[], Call]:
    """The factory, which notes how long it takes to a first result, code compiled before left aside. Its call must give what is expected;
    nothing expected: whatever."""

    def prepare() -> Call:
        compiles = DEVICE == "cpu" and name.startswith("torch.compile")
        with fresh_cache() if compiles else nullcontext():  # not in a GPU's autotuning, which takes minutes
            start = time.perf_counter()
            call = factory()
            result = call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
        if expected:
            check(name, tensors(result), expected, ROUNDING[expected[0].dtype])
        return call

    return prepare


def check(name: str, found: list[Tensor], expected: list[Tensor], allowed: float) -> None:
    """Raises AssertionError where results differ by more than is allowed: what computes something else is not worth timing."""
    distance = relative_error(zip(found, expected, strict=True))
    if not distance <= allowed:
        raise AssertionError(f"{name}: its results are {distance:.2g} from eager PyTorch's, relative; rounding explains {allowed:.2g}")


def compete(own: Callable[[], Call], others: dict[str, Callable[[], Call]], expected: list[Tensor], wanted: str) -> tuple[Any, ...]:
    """(ours, peers, why the others do not run, seconds to each one's first result)"""
    seconds: dict[str, float] = {}
    ours = timed("ours", own, seconds, expected)()
    factories = {name: timed(name, factory, seconds, expected) for name, factory in others.items()}
    peers, skipped = collect(factories, wanted if wanted == "all" else f"torch.nn NCHW,{wanted}")
    return ours, peers, skipped, seconds


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def bench_fused(name, dtype, batch, race, benchmark, request):
    eager, images = build(name, batch, dtype, train=False)

    def plain(model, values):
        return lambda: model(values)

    def frozen(**options):
        model, values = in_layout(eager, images, torch.channels_last)
        return plain(conv_peers.frozen(model, values, **options), values)

    def exported(run):
        if DEVICE != "cpu":
            raise ValueError("inference on a CPU only")
        return run(eager, images)

    others = {
        "torch.nn": lambda: plain(*in_layout(eager, images, torch.channels_last)),
        "torch.nn NCHW": lambda: plain(eager, images),
        "torch.compile": frozen,
        "torch.compile max-autotune": lambda: frozen(mode="max-autotune"),
        "onnxruntime": lambda: exported(conv_peers.onnxruntime_of),
        "openvino": lambda: exported(conv_peers.openvino_of),
    }
    with torch.no_grad():
        model, values = in_layout(eager, images, OWN_LAYOUT)
        wanted = request.config.getoption("--bench-peers")
        ours, peers, skipped, seconds = compete(lambda: plain(pyops.fuse(model), values), others, tensors(eager(images)), wanted)
        flops, moved = work_of(eager, (images,))
        times = race(DEVICE)(ours, peers)
    facts = dict(op=name, sample=f"batch {batch}", backend=DEVICE, skipped=skipped, first_call=seconds)
    record(benchmark, times, flops, moved, DEVICE, dtype, **facts, **{"pass": "forward"})


def first_step(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs and gradients of a step without chance: dropout and stochastic depth, which have `p`, let everything through."""
    chances = [(part, part.p) for part in model.modules() if isinstance(getattr(part, "p", None), float)]
    for part, _ in chances:
        part.p = 0.0
    outputs = tensors(model(images))
    torch.autograd.backward([y.float().square().mean() for y in outputs])
    found = [*(y.detach() for y in outputs), *(p.grad for p in model.parameters() if p.grad is not None)]
    for part, chance in chances:
        part.p = chance
    model.zero_grad()
    return found


def check_step(eager: nn.Module, images: Tensor, fused: nn.Module, values: Tensor) -> None:
    """One step's outputs and gradients. What rounding does to them is seen from eager's other layout: 6 % for Inception's."""
    expected = first_step(copy.deepcopy(eager), images)
    other = first_step(*in_layout(eager, images, torch.channels_last))
    allowed = GRADIENT * relative_error(zip(other, expected, strict=True))
    check("ours", first_step(fused, values), expected, max(allowed, ROUNDING[images.dtype]))


@pytest.mark.parametrize("batch", [8])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def bench_fused_training(name, dtype, batch, race, benchmark, request):
    """Forward and backward. Only ours is checked: peers are PyTorch's own, and a compiled one has its chances compiled."""
    eager, images = build(name, batch, dtype, train=True)
    model, values = in_layout(eager, images, OWN_LAYOUT)
    check_step(eager, images, pyops.fuse(copy.deepcopy(model)), values)

    def compiled(**options):
        torch._dynamo.reset()
        network, laid = in_layout(eager, images, torch.channels_last)
        return training_step(network, (laid,), torch.compile(network, **options))

    others = {
        "torch.nn": lambda: step_of(*in_layout(eager, images, torch.channels_last)),
        "torch.nn NCHW": lambda: step_of(eager, images),
        "torch.compile": compiled,
        "torch.compile max-autotune": lambda: compiled(mode="max-autotune"),
    }
    ours, peers, skipped, seconds = compete(
        lambda: step_of(pyops.fuse(model), values), others, [], request.config.getoption("--bench-peers")
    )
    flops, moved = work_of(eager, (images,))
    facts = dict(op=name, sample=f"batch {batch}", backend=DEVICE, skipped=skipped, first_call=seconds)
    where = next(model.parameters())
    facts["peak_bytes"] = {name: peak_bytes(call, where) for name, call in {"ours": ours, **peers}.items()}
    times = race(DEVICE)(ours, peers)
    # forward, then gradients of inputs and of parameters
    record(benchmark, times, 3 * flops, 3 * moved, DEVICE, dtype, **facts, **{"pass": "training"})


def step_of(model: nn.Module, images: Tensor) -> Call:
    return training_step(model, (images,))
