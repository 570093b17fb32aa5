"""Trains a handwriting classifier twice, with torch.nn's recurrent layer and with pyops', and judges whether they agree.

The data are scikit-learn's bundled digits: 1,797 images of 8 x 8 pixels, read row by row, so a sequence of 8 steps of 8 inputs. Both
trainings start from the same weights and see the same batches; their epochs alternate, so that the machine's noise hits both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.testing import relative_error, within_gate

CELLS = {"lstm": (nn.LSTM, pyops.nn.LSTM), "gru": (nn.GRU, pyops.nn.GRU), "rnn": (nn.RNN, pyops.nn.RNN)}
# With 20 epochs these reach 96.7 % to 98.2 % on the test images, with each cell and seeds 0 to 2.
HIDDEN = 64
BATCH = 32
LEARNING_RATE = 1e-2  # at its highest: one cycle up and down
REQUIRED_ACCURACY = 0.95
# Rounding differences grow as a training goes on, and by how much is luck. The yardstick is a third training whose every weight is moved by
# one unit in the last place before every step; the two compared may lie this many times as far apart (measured: 0.2 to 2 times).
DRIFT_FACTOR = 10.0


class Classifier(nn.Module):
    """A recurrent layer over an image's rows and a linear layer on its last state: [B, 8, 8] -> [B, 10]."""

    def __init__(self, recurrent: nn.RNNBase):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.recurrent(images)
        return self.head(output[:, -1])


@dataclass
class Training:
    """One model's training: the mean loss and the seconds of each epoch, and its accuracy on the test images."""

    name: str
    model: Classifier
    steps: int  # of the whole training, for the learning rate's cycle
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    nudged: bool = False  # every weight is moved by one unit in the last place before every step

    def __post_init__(self) -> None:
        self.luck = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=self.steps)

    def epoch(self, images: Tensor, labels: Tensor, order: Tensor) -> None:
        start = _now(images)
        total = images.new_zeros(())
        for rows in order.split(BATCH):
            if self.nudged:
                nudge(self.model, self.luck)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images[rows]), labels[rows])
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach() * len(rows)
        self.seconds.append(_now(images) - start)
        self.losses.append(total.item() / len(order))


@dataclass
class Result:
    """What the demo found; `failures` is empty when all is well."""

    cell: str
    device: str
    runs_on: str
    torch: Training
    pyops: Training
    output_difference: float  # largest, of the two trained models' scores for the test images
    parameter_difference: float  # largest
    drift: float  # relative L2 distance of the trained parameters
    yardstick: float  # the same for a training that is nudged by one unit in the last place
    checks: list[tuple[str, float, float, str | None]]  # what, torch's and pyops' error on the same weights, None or what is wrong
    images: Tensor
    labels: Tensor
    predictions: Tensor
    failures: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """torch's time over pyops', epoch by epoch, in rising order."""
        return sorted(t / p for t, p in zip(self.torch.seconds, self.pyops.seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median over epochs."""
        return statistics.median(self.ratios)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Where the middle half of the epochs lies: a wide one says that the machine was busy with something else."""
        quarter = len(self.ratios) // 4
        return self.ratios[quarter], self.ratios[-1 - quarter]


def missing() -> str | None:
    """None, or what to install."""
    if find_spec("sklearn") is None:
        return "pyops demo reads its images from scikit-learn, which is not installed: pip install scikit-learn"
    return None


def load_digits(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images [N, 8, 8] in 0..1, train labels, test images, test labels): a quarter is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels.reshape(-1, 8, 8) / 16, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part, device=device) for part in split)
    return train_x.float(), train_y.long(), test_x.float(), test_y.long()


def run(
    cell: str = "lstm",
    device: str = "cpu",
    epochs: int = 20,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """The whole demo. `progress` is called after each epoch of each of the two models.

    Raises ValueError for an unknown cell, no epochs, or a backend that cannot run it here.
    """
    if cell not in CELLS:
        raise ValueError(f"demo: cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    if epochs < 1:
        raise ValueError(f"demo: epochs: expected 1 or more, got {epochs}")
    train_x, train_y, test_x, test_y = load_digits(seed, device)
    torch.manual_seed(seed)
    theirs, ours = CELLS[cell]
    reference = Classifier(theirs(8, HIDDEN, batch_first=True)).to(device)
    candidate = Classifier(ours(8, HIDDEN, batch_first=True, backend=backend)).to(device)
    candidate.load_state_dict(reference.state_dict())
    steps = epochs * -(-len(train_x) // BATCH)
    pair = [Training(f"torch.nn.{theirs.__name__}", reference, steps), Training(f"pyops.nn.{ours.__name__}", candidate, steps)]
    third = Training("nudged", copy.deepcopy(reference), steps, nudged=True)
    for training in pair:  # the first call of each allocates, picks kernels and starts threads: not the models' speed
        F.cross_entropy(training.model(train_x[:BATCH]), train_y[:BATCH]).backward()

    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(train_x), generator=shuffle).to(device)
        for training in pair if epoch % 2 else reversed(pair):
            training.epoch(train_x, train_y, order)
            progress()
        third.epoch(train_x, train_y, order)

    with torch.no_grad():
        scores = [training.model(test_x) for training in pair]
    for training, score in zip(pair, scores, strict=True):
        training.accuracy = (score.argmax(1) == test_y).float().mean().item()
    weights = [flat(training.model) for training in (*pair, third)]
    layer = candidate.recurrent
    arguments = (test_x, None, *layer.all_weights[0])
    chosen = pyops.explain(f"fused_{cell}", *arguments, batch_first=True, backend=backend).chosen
    result = Result(
        cell=cell,
        device=device,
        runs_on=str(chosen),
        torch=pair[0],
        pyops=pair[1],
        output_difference=(scores[1] - scores[0]).abs().max().item(),
        parameter_difference=(weights[1] - weights[0]).abs().max().item(),
        drift=relative_error([(weights[1], weights[0])]),
        yardstick=relative_error([(weights[2], weights[0])]),
        checks=compare(reference.recurrent, layer, test_x),
        images=test_x,
        labels=test_y,
        predictions=scores[1].argmax(1),
    )
    result.failures = judge(result)
    return result


def compare(theirs: nn.RNNBase, ours: nn.RNNBase, images: Tensor) -> list[tuple[str, float, float, str | None]]:
    """Both layers with `theirs`' trained weights against the same layer in float64: outputs, and gradients for a fixed random cotangent.

    pyops' numerics gate: relative L2 error at most 1.25 times torch's for outputs and 3 times for gradients, or one unit in the last place.
    """
    ours = copy.deepcopy(ours)
    ours.load_state_dict(theirs.state_dict())
    cotangent = torch.randn(len(images), 8, HIDDEN, generator=torch.Generator().manual_seed(0)).to(images.device)

    def evaluate(layer: nn.RNNBase) -> list[tuple[str, Tensor]]:
        weight = next(layer.parameters())
        x = images.to(weight.dtype).requires_grad_()
        output, _ = layer(x)
        names, leaves = zip(("input", x), *layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(output, leaves, cotangent.to(weight.dtype))
        return [("outputs", output), *((f"gradient of {name}", grad) for name, grad in zip(names, grads, strict=True))]

    truth, eager, found = evaluate(copy.deepcopy(theirs).double()), evaluate(theirs), evaluate(ours)
    checks = []
    for (name, t), (_, e), (_, f) in zip(truth, eager, found, strict=True):
        wrong = within_gate([(f, t, e)], torch.float32, gradient=name != "outputs")
        checks.append((name, relative_error([(e, t)]), relative_error([(f, t)]), wrong))
    return checks


def judge(result: Result) -> list[str]:
    """What is wrong, in words."""
    found = [f"{name} of pyops' layer: {wrong}" for name, _, _, wrong in result.checks if wrong]
    for training in (result.torch, result.pyops):
        if training.accuracy < REQUIRED_ACCURACY:
            found.append(f"{training.name}: test accuracy {training.accuracy:.1%} is below {REQUIRED_ACCURACY:.0%}")
    if not result.drift <= DRIFT_FACTOR * result.yardstick:
        found.append(
            f"the trained parameters lie {result.drift:.2g} apart (relative), more than {DRIFT_FACTOR:.0f} times "
            f"the {result.yardstick:.2g} that rounding alone makes"
        )
    return found


def nudge(model: nn.Module, luck: torch.Generator) -> None:
    """Moves every weight to the next number above or below, as rounding might."""
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=luck).to(weight.device) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf).to(weight)))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def _now(where: Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
