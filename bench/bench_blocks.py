"""Inference of whole blocks, the MBConv blocks of EfficientNet-B0, against the same layers run by others."""

from __future__ import annotations

import copy

import pytest
import torch

from pyops.nn import MBConv
from pyops.testing.samples import conv_peers

from .bench_ops import DEVICE
from .conftest import record

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


def peers_of(block: MBConv, x: torch.Tensor, wanted: str) -> tuple[dict, dict]:
    def eager(layout):
        twin = copy.deepcopy(block).to(memory_format=layout)
        twin.block.register_forward_hook(lambda *_: None)  # a hook keeps every layer PyTorch's own
        for part in twin.block.modules():
            part.register_forward_hook(lambda *_: None)
        value = x.contiguous(memory_format=layout)
        return lambda: twin(value)

    factories = {
        "torch.nn": lambda: eager(torch.channels_last),
        "torch.nn NCHW": lambda: eager(torch.contiguous_format),
        "onnxruntime": lambda: conv_peers.onnxruntime_of(Plain(block), x),
        "openvino": lambda: conv_peers.openvino_of(Plain(block), x),
    }
    peers, skipped = {}, {}
    for name, factory in factories.items():
        if wanted != "all" and name not in wanted.split(","):
            continue
        try:
            peers[name] = factory()
            peers[name]()
        except (ImportError, TypeError, ValueError) as reason:
            skipped[name] = str(reason)
    return peers, skipped


class Plain(torch.nn.Module):
    """The block's layers one by one, for an exporter."""

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
    expanded = C * E
    macs = (size * size * C * expanded if E > 1 else 0) + out * out * expanded * (K * K + O)
    moved = (x.numel() + batch * O * out * out) * x.element_size()
    facts = dict(op="MBConv", sample=f"stage {stage}, batch {batch}", backend="cpu", skipped=skipped)
    record(benchmark, times, 2 * batch * macs, moved, DEVICE, dtype, **facts, **{"pass": "forward"})
