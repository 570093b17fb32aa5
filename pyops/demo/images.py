"""The demo's task `images`: a small network of EfficientNet's blocks reads the whole image.

Its twin is the same network in plain torch.nn, as torchvision writes it, with the same names in its state_dict.

Source: Tan and Le, 2019 (EfficientNet); Huang et al., 2016 (stochastic depth).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.demo import measure
from pyops.demo.training import Check, Cost, Digits, Recipe, Result, Training, evaluate, judge, load_digits, race, start
from pyops.nn import ConvBNAct, MBConv
from pyops.testing import relative_error, within_gate

EPOCHS = 10
SIZE = 16  # the images' side, twice their own: two strides of 2 leave 4 x 4
STEM, HEAD, EXPAND = 16, 128, 4
# kernel size, stride, channels, drop path
BLOCKS = ((3, 2, 24, 0.0), (3, 1, 24, 0.05), (5, 2, 40, 0.0), (5, 1, 40, 0.1))

DRAWS = 12  # batches in the comparison on the same weights
SCORES, TRAINING_SCORES = "scores in inference", "scores in training"


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
    reference.load_state_dict(candidate.state_dict(), strict=True)
    pair = start(RECIPE, digits, epochs, **{"torch.nn": reference, "pyops.nn": candidate})
    filters = reference.features[1].block[1][0].weight
    probe = filters.new_empty((RECIPE.batch, len(filters), SIZE, SIZE)).to(memory_format=torch.channels_last)
    chosen = str(pyops.explain("depthwise_conv_bn_act", probe, filters, padding=1, backend=backend).chosen)
    lead = (
        f"A network of {len(BLOCKS)} EfficientNet blocks reads handwritten digits. It is trained twice on {device}: with torch.nn, and "
        f"with pyops, whose depthwise convolutions run on its {chosen!r} backend."
    )
    result = race(pair, digits, epochs, seed, progress, lead=lead, part="network", runs_on=chosen)
    result.images = small.test_x
    same = with_weights(candidate, reference)
    result.checks, result.differences = compare(reference, same, digits.train_x)
    result.costs = costs(pair, digits)
    result.failures = judge(result)
    return result


def with_weights(model: Network, source: Network) -> Network:
    model = copy.deepcopy(model)
    model.load_state_dict(source.state_dict())
    return model


def costs(pair: list[Training], digits: Digits) -> list[Cost]:
    """Of a training step, an inference, and a step's memory."""
    batch, labels = digits.train_x[: RECIPE.batch], digits.train_y[: RECIPE.batch]
    steps = [statistics.median(t.seconds) / -(-len(digits.train_x) // RECIPE.batch) for t in pair]
    memory = []
    for training in pair:
        scratch = Training(training.name, copy.deepcopy(training.model), RECIPE, 3)
        scratch.step(batch, labels)  # the optimizer's state is there to stay, and so does not count
        scratch.optimizer.zero_grad()
        memory.append(measure.peak_bytes(lambda scratch=scratch: scratch.step(batch, labels), batch))  # type: ignore[misc]
    models = [training.model.eval() for training in pair]
    with torch.no_grad():
        calls: list[Callable[[], object]] = [lambda model=model: model(batch) for model in models]  # type: ignore[misc]
        inference = measure.times(calls, batch)
    for model in models:
        model.train()
    size = f"{RECIPE.batch} images, median"
    return [
        Cost("training step", size, "ms", steps[0] * 1e3, steps[1] * 1e3),
        Cost("inference", size, "ms", inference[0] * 1e3, inference[1] * 1e3),
        Cost("peak memory", "training step, above the weights", "MiB", memory[0] / 2**20, memory[1] / 2**20),
    ]


def compare(theirs: Network, ours: Network, images: Tensor) -> tuple[list[Check], list[tuple[str, float]]]:
    """Both networks on the same weights against the same network in float64, in inference and in training: (checks, differences).

    The gate is the one of pyops' tests: relative L2 error at most 1.25 times torch's for outputs and 3 times for gradients, or one unit in
    the last place. Several batches make one vector, and so do the parameters of one kind: for a single bias the ratio of two rounding
    errors is luck, and a bias before another batch norm has no gradient but rounding.
    """
    truth = copy.deepcopy(theirs).double()
    draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed, batch in enumerate(images.split(RECIPE.batch)[:DRAWS]):
        results = [observe(model, batch, seed) for model in (ours, truth, theirs)]
        for name in results[0]:
            draws.setdefault(name, []).extend(zip(*(found[name] for found in results), strict=True))
    checks: list[Check] = []
    for name, found in draws.items():
        wrong = within_gate(found, torch.float32, gradient=name.startswith("gradients"))
        errors = [relative_error((draw[k], draw[1]) for draw in found) for k in (2, 0)]
        checks.append((name, *errors, wrong))  # type: ignore[arg-type]
    largest = [(name, max((f - e).abs().max().item() for f, _, e in draws[name])) for name in (SCORES, TRAINING_SCORES)]
    return checks, [(f"largest in the {name}, same weights", value) for name, value in largest]


def observe(model: Network, images: Tensor, seed: int) -> dict[str, list[Tensor]]:
    """The network's scores in both modes and, from a training pass, its running statistics and gradients for a fixed random cotangent."""
    model = copy.deepcopy(model)  # the training pass moves the running statistics
    dtype = model.classifier.weight.dtype
    x = images.to(dtype).requires_grad_()
    found = {SCORES: [evaluate(model, x)]}
    torch.manual_seed(seed)
    scores = model.train()(x)
    found[TRAINING_SCORES] = [scores]
    found["running statistics"] = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    cotangent = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(scores, (x, *parameters.values()), cotangent)
    found["gradients of the images"] = [gradients[0]]
    for name, gradient in zip(parameters, gradients[1:], strict=True):
        found.setdefault(f"gradients of the {kind(model, name)}", []).append(gradient)
    return found


def kind(model: Network, name: str) -> str:
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Conv2d):
        return "batch norms" if isinstance(layer, nn.BatchNorm2d) else "classifier"
    if ".fc" in name:
        return "squeeze-excitations"
    return "depthwise filters" if layer.groups > 1 else "other filters"
