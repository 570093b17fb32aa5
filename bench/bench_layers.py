"""Single layers as modules, which keep what they make of their weights, against the same layers run by others: convolution with batch norm
and activation in inference and training, ConvNeXt's block, linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyops.nn import ConvBNAct, ConvNeXtBlock, LinearAct
from pyops.testing.samples import conv_peers, linear

from .bench_ops import DEVICE
from .conftest import collect, record

# channels, size, outputs, kernel, options: layers of ResNet and VGG, a DenseNet layer's second, the stem, AlexNet's groups, Inception's 1x7
LAYERS: dict[str, tuple] = {
    "3x3 64@56": (64, 56, 64, 3, {}),
    "3x3 128@28": (128, 28, 128, 3, {}),
    "3x3 256@14": (256, 14, 256, 3, {}),
    "3x3 512@7": (512, 7, 512, 3, {}),
    "3x3 64@224": (64, 224, 64, 3, {}),
    "3x3 128@28 to 32": (128, 28, 32, 3, {}),
    "3x3 64@56 to 128, stride 2": (64, 56, 128, 3, dict(stride=2)),
    "1x1 64@56 to 256": (64, 56, 256, 1, {}),
    "1x1 256@56 to 64": (256, 56, 64, 1, {}),
    "1x1 1024@14 to 256": (1024, 14, 256, 1, {}),
    "7x7 3@224 to 64, stride 2": (3, 224, 64, 7, dict(stride=2)),
    "5x5 96@27 to 256, 2 groups": (96, 27, 256, 5, dict(groups=2)),
    "1x7 128@17 to 192": (128, 17, 192, (1, 7), {}),
}


def build(layer: str, dtype=torch.float32) -> ConvBNAct:
    C, _, O, K, options = LAYERS[layer]
    torch.manual_seed(0)
    return ConvBNAct(C, O, K, **options).to(DEVICE, dtype).to(memory_format=torch.channels_last)


def image(layer: str, batch: int, dtype=torch.float32) -> torch.Tensor:
    C, size, *_ = LAYERS[layer]
    return torch.randn(batch, C, size, size).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def products(module: ConvBNAct, x: torch.Tensor) -> int:
    with torch.no_grad():
        return module(x).numel() * module[0].weight[0].numel()  # type: ignore[index,operator,union-attr]


def plain(module: nn.Module) -> nn.Module:
    """The same layers as PyTorch's own."""
    return nn.Sequential(*(copy.deepcopy(part) for part in module.children())).train(module.training)


def peers_of(module: nn.Module, x: torch.Tensor, wanted: str) -> tuple[dict, dict]:
    def eager(layout):
        twin, value = copy.deepcopy(module).to(memory_format=layout), x.contiguous(memory_format=layout)
        return lambda: twin(value)

    def compiled():
        call = conv_peers.frozen(copy.deepcopy(module), x)
        return lambda: call(x)

    factories = {
        "torch.nn": lambda: eager(torch.channels_last),
        "torch.nn NCHW": lambda: eager(torch.contiguous_format),
        "torch.compile": compiled,
        "onnxruntime": lambda: conv_peers.onnxruntime_of(module, x),
        "openvino": lambda: conv_peers.openvino_of(module, x),
    }
    return collect(factories, wanted if wanted == "all" else f"torch.nn NCHW,{wanted}")


def race_inference(module, twin, x, flops, race, benchmark, request, **facts):
    with torch.no_grad():
        peers, skipped = peers_of(twin, x, request.config.getoption("--bench-peers"))
        times = race(DEVICE)(lambda: module(x), peers)
        moved = (x.numel() + module(x).numel()) * x.element_size()
    record(benchmark, times, flops, moved, DEVICE, x.dtype, backend=DEVICE, skipped=skipped, **facts, **{"pass": "forward"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", list(LAYERS))
def bench_conv(layer, batch, dtype, race, benchmark, request):
    module, x = build(layer, dtype).eval().requires_grad_(False), image(layer, batch, dtype)
    flops = 2 * products(module, x)
    race_inference(module, plain(module), x, flops, race, benchmark, request, op="ConvBNAct", sample=f"{layer}, batch {batch}")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", list(LAYERS))
def bench_conv_training(layer, batch, race, benchmark):
    module, x = build(layer).train(), image(layer, batch)
    race_training(module, plain(module), x, 6 * products(module, x), race, benchmark, op="ConvBNAct", sample=f"{layer}, batch {batch}")


def race_training(module, twin, x, flops, race, benchmark, **facts):
    """Forward and backward against the twin in either layout."""
    cotangent = torch.randn_like(module(x))

    def step_of(call, layout):
        call, value = call.to(memory_format=layout), x.contiguous(memory_format=layout).detach().requires_grad_()
        grad = cotangent.contiguous(memory_format=layout)

        def step():
            call(value).backward(grad)
            value.grad = None
            for parameter in call.parameters():
                parameter.grad = None

        return step

    layouts = {"torch.nn": torch.channels_last, "torch.nn NCHW": torch.contiguous_format}
    peers = {name: step_of(copy.deepcopy(twin), layout) for name, layout in layouts.items()}
    times = race(DEVICE)(step_of(module, torch.channels_last), peers)
    moved = 4 * x.numel() * x.element_size()
    record(benchmark, times, flops, moved, DEVICE, x.dtype, backend=DEVICE, skipped={}, **facts, **{"pass": "training"})


class PlainConvNeXt(nn.Module):
    """The block's layers one by one, for an exporter or a compiler."""

    def __init__(self, block: ConvNeXtBlock):
        super().__init__()
        self.block, self.layer_scale = nn.Sequential(*block.block), block.layer_scale
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_scale * self.block(x) + x


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dim, size", [(96, 56), (192, 28), (384, 14), (768, 7)])
def bench_convnext(dim, size, batch, race, benchmark, request):
    torch.manual_seed(0)
    module = ConvNeXtBlock(dim, layer_scale=0.1).to(DEVICE).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    x = torch.randn(batch, dim, size, size).to(DEVICE).contiguous(memory_format=torch.channels_last)
    flops = 2 * x.numel() * (49 + 8 * dim)
    race_inference(
        module, PlainConvNeXt(module), x, flops, race, benchmark, request, op="ConvNeXtBlock", sample=f"{dim}@{size}, batch {batch}"
    )


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("M, K, N", linear.LAYERS)
def bench_linear(M, K, N, activation, race, benchmark, request):
    torch.manual_seed(0)
    module, x = LinearAct(K, N, activation=activation).to(DEVICE).eval().requires_grad_(False), torch.randn(M, K, device=DEVICE)
    layer = nn.Linear(K, N).to(DEVICE)
    layer.load_state_dict(module.state_dict())
    twin = nn.Sequential(layer, *([nn.GELU()] if activation == "gelu" else [])).requires_grad_(False).eval()
    with torch.no_grad():
        wanted = request.config.getoption("--bench-peers").split(",")
        factories = {"onnxruntime": conv_peers.onnxruntime_of, "openvino": conv_peers.openvino_of}
        peers = {"torch.nn": lambda: twin(x), **{name: make(twin, x) for name, make in factories.items() if name in wanted}}
        times = race(DEVICE)(lambda: module(x), peers)
    moved = 4 * (M * K + K * N + M * N)
    facts = dict(op="LinearAct", sample=f"{M}x{K}x{N} {activation}", backend=DEVICE, skipped={})
    record(benchmark, times, 2 * M * K * N, moved, DEVICE, x.dtype, **facts, **{"pass": "forward"})
