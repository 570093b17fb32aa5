"""The MBConv blocks of EfficientNet-B0 against the same layers run by others: inference, training steps, and memory of whole stages."""

from __future__ import annotations

import copy

import pytest
import torch

from pyops.demo.measure import peak_bytes
from pyops.nn import MBConv
from pyops.testing.samples import conv_peers

from .bench_ops import DEVICE
from .conftest import collect, record

# input channels, output channels, kernel, stride, expansion, input size: every shape that occurs in stages 1 to 7
BLOCKS = {
    "1": (32, 16, 3, 1, 1, 112),
    "2": (16, 24, 3, 2, 6, 112),
    "2r": (24, 24, 3, 1, 6, 56),
    "3": (24, 40, 5, 2, 6, 56),
    "3r": (40, 40, 5, 1, 6, 28),
    "4": (40, 80, 3, 2, 6, 28),
    "4r": (80, 80, 3, 1, 6, 14),
    "5": (80, 112, 5, 1, 6, 14),
    "5r": (112, 112, 5, 1, 6, 14),
    "6": (112, 192, 5, 2, 6, 14),
    "6r": (192, 192, 5, 1, 6, 7),
    "7": (192, 320, 3, 1, 6, 7),
}


def macs_of(stage: str) -> int:
    """Products of one image's convolutions."""
    C, O, K, S, E, size = BLOCKS[stage]
    out, expanded = (size - 1) // S + 1, C * E
    return (size * size * C * expanded if E > 1 else 0) + out * out * expanded * (K * K + O)


def peers_of(block: MBConv, x: torch.Tensor, wanted: str) -> tuple[dict, dict]:
    def eager(layout):
        twin, value = eager_twin(block, layout), x.contiguous(memory_format=layout)
        return lambda: twin(value)

    def compiled():
        call = conv_peers.frozen(Plain(eager_twin(block, torch.channels_last, hooks=False)), x)
        return lambda: call(x)

    factories = {
        "torch.nn": lambda: eager(torch.channels_last),
        "torch.nn NCHW": lambda: eager(torch.contiguous_format),
        "torch.compile": compiled,
        "onnxruntime": lambda: conv_peers.onnxruntime_of(Plain(block), x),
        "openvino": lambda: conv_peers.openvino_of(Plain(block), x),
    }
    return collect(factories, wanted)


def eager_twin(block: torch.nn.Module, layout: torch.memory_format, hooks: bool = True) -> torch.nn.Module:
    """A copy of the block (or blocks); with hooks, which keep the kernels out, every layer is PyTorch's own."""
    twin = copy.deepcopy(block).to(memory_format=layout)
    for part in twin.modules():
        if hooks:
            part.register_forward_hook(lambda *_: None)
    return twin


class Plain(torch.nn.Module):
    """The block's layers one by one, for an exporter or a compiler."""

    def __init__(self, block: MBConv):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(*part) if isinstance(part, torch.nn.Sequential) else part for part in block.block
        )
        self.residual = block.use_res_connect
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y if self.residual else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("stage", list(BLOCKS))
def bench_mbconv(stage, batch, dtype, race, benchmark, request):
    C, O, K, S, E, size = BLOCKS[stage]
    torch.manual_seed(0)
    block = MBConv(C, O, K, S, E, squeeze_channels=max(1, C // 4)).eval().requires_grad_(False)
    block = block.to(DEVICE, dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, C, size, size).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    wanted = request.config.getoption("--bench-peers")
    with torch.no_grad():
        peers, skipped = peers_of(block, x, "torch.nn NCHW," + wanted if wanted != "all" else wanted)
        times = race(DEVICE)(lambda: block(x), peers)
    out = (size - 1) // S + 1
    moved = (x.numel() + batch * O * out * out) * x.element_size()
    facts = dict(op="MBConv", sample=f"stage {stage}, batch {batch}", backend="cpu", skipped=skipped)
    record(benchmark, times, 2 * batch * macs_of(stage), moved, DEVICE, dtype, **facts, **{"pass": "forward"})


def training_step(block: torch.nn.Module, x: torch.Tensor):
    x = x.detach().requires_grad_()
    cotangent = torch.ones_like(block(x))

    def step():
        block(x).backward(cotangent)
        x.grad = None
        for parameter in block.parameters():
            parameter.grad = None

    return step


def race_training(block, stages, x, race, benchmark, **facts):
    layouts = {"torch.nn": torch.channels_last, "torch.nn NCHW": torch.contiguous_format}
    peers = {name: training_step(eager_twin(block, layout), x.contiguous(memory_format=layout)) for name, layout in layouts.items()}
    ours = training_step(block, x)
    where = next(block.parameters())
    facts["peak_bytes"] = {name: peak_bytes(call, where) for name, call in {"ours": ours, **peers}.items()}
    times = race(DEVICE)(ours, peers)
    flops = 6 * x.shape[0] * sum(macs_of(stage) for stage in stages)
    moved = 2 * x.numel() * x.element_size()  # the input read, its gradient written
    record(benchmark, times, flops, moved, DEVICE, x.dtype, backend="cpu", skipped={}, **facts, **{"pass": "training"})


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("stage", [stage for stage in BLOCKS if stage != "1"])
def bench_mbconv_training(stage, batch, race, benchmark):
    C, O, K, S, E, size = BLOCKS[stage]
    torch.manual_seed(0)
    block = MBConv(C, O, K, S, E, squeeze_channels=max(1, C // 4)).to(DEVICE).to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, C, size, size).to(DEVICE).contiguous(memory_format=torch.channels_last)
    race_training(block, [stage], x, race, benchmark, op="MBConv", sample=f"stage {stage}, batch {batch}")


STAGES = {"2": ("2", "2r"), "3": ("3", "3r"), "4": ("4", "4r", "4r"), "5": ("5", "5r", "5r"), "6": ("6", "6r", "6r", "6r"), "7": ("7",)}


@pytest.mark.parametrize("stage", list(STAGES))
def bench_stage_training(stage, race, benchmark):
    """Whole stages of EfficientNet-B0: what a training step takes, and `peak_bytes`, the most it holds."""
    torch.manual_seed(0)
    blocks = []
    for name in STAGES[stage]:
        C, O, K, S, E, _ = BLOCKS[name]
        blocks.append(MBConv(C, O, K, S, E, squeeze_channels=max(1, C // 4)))
    stages = torch.nn.Sequential(*blocks).to(DEVICE).to(memory_format=torch.channels_last).train()
    C, *_, size = BLOCKS[STAGES[stage][0]]
    x = torch.randn(8, C, size, size).to(DEVICE).contiguous(memory_format=torch.channels_last)
    race_training(stages, STAGES[stage], x, race, benchmark, op="stage of MBConv", sample=f"stage {stage}, batch 8")
