"""The demo's task `images`: a small network of EfficientNet's blocks reads the whole image.

Its twin is the same network in plain torch.nn, as torchvision writes it, with the same names in its state_dict.

Source: Tan and Le, 2019 (EfficientNet); Huang et al., 2016 (stochastic depth).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.demo import contest
from pyops.demo.training import Recipe, Result, load_digits, read
from pyops.nn import ConvBNAct, MBConv

EPOCHS = 10
SIZE = 16  # the images' side, twice their own: two strides of 2 leave 4 x 4
STEM, HEAD, EXPAND = 16, 128, 4
# kernel size, stride, channels, drop path
BLOCKS = ((3, 2, 24, 0.0), (3, 1, 24, 0.05), (5, 2, 40, 0.0), (5, 1, 40, 0.1))


def optimizer(parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Fused, since for so many small parameters the one-by-one update would take a good part of the time compared. The large eps is for
    biases in front of another batch norm: their gradient is zero but for rounding, which Adam would blow up to full steps."""
    return torch.optim.Adam(parameters, learning_rate, eps=1e-4, fused=True)


RECIPE = Recipe(batch=64, learning_rate=5e-3, optimizer=optimizer, random=True)


class Network(nn.Module):
    """Convolutions, the mean over the image, a linear layer: [N, 3, H, W] -> [N, 10]."""

    def __init__(self, features: list[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(HEAD, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def network(backend: str | None = None) -> Network:
    """The network of pyops' modules."""
    options: dict[str, Any] = dict(activation="silu", backend=backend)
    layers: list[nn.Module] = [ConvBNAct(3, STEM, 3, **options)]
    channels = STEM
    for kernel, stride, out, drop in BLOCKS:
        layers.append(MBConv(channels, out, kernel, stride, EXPAND, drop_path=drop, **options))
        channels = out
    return Network([*layers, ConvBNAct(channels, HEAD, 1, **options)])


def twin() -> Network:
    """The same network of torch.nn's modules."""
    layers: list[nn.Module] = [convolution(3, STEM, 3)]
    channels = STEM
    for kernel, stride, out, drop in BLOCKS:
        layers.append(TwinBlock(channels, out, kernel, stride, drop))
        channels = out
    return Network([*layers, convolution(channels, HEAD, 1)])


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([nn.SiLU()] if activation else []))


class TwinSqueeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.fc2(F.silu(self.fc1(self.avgpool(input)))))


class TwinBlock(nn.Module):
    """An inverted residual with stochastic depth."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, drop: float):
        super().__init__()
        inner = channels * EXPAND
        self.block = nn.Sequential(
            convolution(channels, inner, 1),
            convolution(inner, inner, kernel, stride, groups=inner),
            TwinSqueeze(inner, max(1, channels // 4)),
            convolution(inner, out, 1, activation=False),
        )
        self.drop = drop
        self.residual = stride == 1 and channels == out

    def forward(self, input: Tensor) -> Tensor:
        output = self.block(input)
        if not self.residual:
            return output
        if self.training and self.drop:
            # pyops.nn.DropPath's draw; in float32 also for the float64 truth, which on a GPU would draw other numbers
            keep = torch.empty((len(input), 1, 1, 1), device=input.device).bernoulli_(1.0 - self.drop).to(input.dtype)
            output = output * (keep / (1.0 - self.drop))
        return output + input


def enlarge(images: Tensor) -> Tensor:
    """[N, 8, 8] -> [N, 3, SIZE, SIZE] in channels_last, the layout in which torch's own convolutions are fastest too."""
    large = F.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def run(
    device: str = "cpu",
    epochs: int = EPOCHS,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """The whole demo. `progress` is called after each epoch of each of the two models.

    Raises ValueError for no epochs, or a backend that cannot run it here.
    """
    small = load_digits(seed, device)
    digits = small._replace(train_x=enlarge(small.train_x), test_x=enlarge(small.test_x))
    torch.manual_seed(seed)
    candidate = network(backend).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = twin().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    filters = reference.features[1].block[1][0].weight
    probe = filters.new_empty((RECIPE.batch, len(filters), SIZE, SIZE)).to(memory_format=torch.channels_last)
    chosen = str(pyops.explain("depthwise_conv_bn_act", probe, filters, padding=1, backend=backend).chosen)
    lead = (
        f"A network of {len(BLOCKS)} EfficientNet blocks reads handwritten digits. It is trained twice on {device}: with torch.nn, and "
        f"with pyops, whose depthwise convolutions run on its {chosen!r} backend."
    )
    models: dict[str, nn.Module] = {"torch.nn": reference, "pyops.nn": candidate}
    result = contest.run(models, RECIPE, digits, epochs, seed, progress, lead, chosen, kind)
    read(result, small.test_x, digits)
    return result


def kind(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Conv2d):
        return "batch norms" if isinstance(layer, nn.BatchNorm2d) else "classifier"
    if ".fc" in name:
        return "squeeze-excitations"
    return "depthwise filters" if layer.groups > 1 else "other filters"
