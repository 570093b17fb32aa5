"""What stands around convolutions, as modules, against PyTorch's layers and their compilers: pooling, upsampling, DenseNet's blocks, norms
over channels; inference and training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyops.nn import ConvBNAct, DenseBlock, DenseTransition, LayerNorm2d, LocalResponseNorm, UpsampleConvBNAct

from .bench_layers import plain, race_inference, race_training
from .bench_ops import DEVICE

# a stem, VGG's and a convolutional autoencoder's layers, AlexNet's norm, ConvNeXt's: module, input
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "7x7 3@224 to 64, stride 2, max 3x3/2": (lambda: ConvBNAct(3, 64, 7, 2, pool=nn.MaxPool2d(3, 2, 1)), (3, 224, 224)),
    "3x3 64@112, max 2x2": (lambda: ConvBNAct(64, 64, pool=nn.MaxPool2d(2)), (64, 112, 112)),
    "3x3 128@56, max 2x2": (lambda: ConvBNAct(128, 128, pool=nn.MaxPool2d(2)), (128, 56, 56)),
    "3x3 16@128 to 32, max 2x2": (lambda: ConvBNAct(16, 32, pool=nn.MaxPool2d(2)), (16, 128, 128)),
    "3x3 64@56, average 2x2": (lambda: ConvBNAct(64, 64, pool=nn.AvgPool2d(2)), (64, 56, 56)),
    "nearest, 3x3 32@64": (lambda: UpsampleConvBNAct(32, 32), (32, 64, 64)),
    "nearest, 3x3 32@64 to 16": (lambda: UpsampleConvBNAct(32, 16), (32, 64, 64)),
    "nearest, 3x3 16@128 to 3": (lambda: UpsampleConvBNAct(16, 3, activation="tanh"), (16, 128, 128)),
    "bilinear, 3x3 32@64": (lambda: UpsampleConvBNAct(32, 32, mode="bilinear"), (32, 64, 64)),
    "bilinear, 3x3 128@28 to 64": (lambda: UpsampleConvBNAct(128, 64, mode="bilinear"), (128, 28, 28)),
    "transition 256@56 to 128": (lambda: DenseTransition(256, 128), (256, 56, 56)),
    "transition 1024@14 to 512": (lambda: DenseTransition(1024, 512), (1024, 14, 14)),
    "LRN 96@55": (lambda: LocalResponseNorm(5, activation="relu"), (96, 55, 55)),
    "LayerNorm2d 96@56": (lambda: LayerNorm2d(96), (96, 56, 56)),
}
BLOCKS = {
    "6 layers from 64@56": (6, 64, 56),
    "12 layers from 128@28": (12, 128, 28),
    "24 layers from 256@14": (24, 256, 14),
    "16 layers from 512@7": (16, 512, 7),
}


class PlainNorm(nn.Module):
    """LayerNorm over channels as users write it."""

    def __init__(self, norm: LayerNorm2d):
        super().__init__()
        self.norm = nn.LayerNorm(norm.weight.shape[0], eps=norm.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainResponse(nn.Module):
    """ReLU and torch.nn.functional.local_response_norm's own ops; the function itself cannot be exported."""

    def __init__(self, norm: LocalResponseNorm):
        super().__init__()
        self.size, self.alpha, self.beta, self.k = norm.size, norm.alpha, norm.beta, norm.k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.relu()
        mean = nn.functional.avg_pool3d((a * a).unsqueeze(1), (self.size, 1, 1), 1, (self.size // 2, 0, 0)).squeeze(1)
        return a / (mean * self.alpha + self.k) ** self.beta


class PlainDenseBlock(nn.Module):
    """torchvision's layers, joined before each."""

    def __init__(self, block: DenseBlock):
        super().__init__()
        self.layers = nn.ModuleList(plain(layer) for layer in block.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def twin_of(module: nn.Module) -> nn.Module:
    if isinstance(module, LayerNorm2d):
        return PlainNorm(module).train(module.training)
    if isinstance(module, LocalResponseNorm):
        return PlainResponse(module).train(module.training)
    return PlainDenseBlock(module).train(module.training) if isinstance(module, DenseBlock) else plain(module)


def build(name: str, batch: int, dtype=torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name in BLOCKS:
        layers, channels, size = BLOCKS[name]
        make: Callable[[], nn.Module] = lambda: DenseBlock(layers, channels)  # noqa: E731
        shape: tuple[int, ...] = (channels, size, size)
    else:
        make, shape = MODULES[name]
    module = make().to(DEVICE, dtype).to(memory_format=torch.channels_last)
    return module, torch.randn(batch, *shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def products(module: nn.Module, x: torch.Tensor) -> int:
    """Of the convolutions, by the sizes that reach them."""
    found = []
    hooks = [
        part.register_forward_hook(lambda conv, _, y: found.append(y.numel() * conv.weight[0].numel()))
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", [*MODULES, *BLOCKS])
def bench_around(name, batch, dtype, race, benchmark, request):
    module, x = build(name, batch, dtype)
    twin = twin_of(module.eval().requires_grad_(False))
    flops = 2 * products(twin, x)
    race_inference(module, twin, x, flops, race, benchmark, request, op=type(module).__name__, sample=f"{name}, batch {batch}")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", [*MODULES, *BLOCKS])
def bench_around_training(name, batch, race, benchmark):
    module, x = build(name, batch)
    twin = twin_of(module.train())
    race_training(module, twin, x, 6 * products(twin, x), race, benchmark, op=type(module).__name__, sample=f"{name}, batch {batch}")
