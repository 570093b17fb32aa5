"""Trains a network twice, with torch.nn and with pyops, and judges whether the two agree and learn: what every task shares.

Both trainings start from the same weights and see the same batches; their epochs alternate, so that the machine's noise hits both. Most
tasks read scikit-learn's bundled digits: 1,797 images of 8 x 8 pixels.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.testing import relative_error

if TYPE_CHECKING:
    from pyops.demo.checkpoint import Checkpoint
    from pyops.report.tables import Table

EVALUATED = 512  # inputs in one batch of an evaluation
CLASSES = 10  # whose scores stand in front, where a classifier of digits gives more
# Rounding differences grow as a training goes on, and by how much is luck. The yardstick is a third training whose every weight is moved by
# one unit in the last place before every step; the two compared may lie this many times as far apart (measured: 0.2 to 3 times).
DRIFT_FACTOR = 10.0
Check = tuple[str, float, float, str | None]  # what, torch's and pyops' error on the same weights, None or what is wrong


class Data(NamedTuple):
    """Inputs with what is wanted of them, in two parts: images and labels, or tokens and tokens."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


Run = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a model, inputs and what is wanted of them


def scores_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, scores: Run = scores_of) -> float:
    """The share of inputs whose highest score is the wanted one's."""
    return (evaluate(model, x, y, scores)[:, :CLASSES].argmax(1) == y).float().mean().item()


def percent(share: float) -> str:
    return f"{100 * share:.4g}%"


@dataclass(frozen=True)
class Goal:
    """What a trained model is judged by, on the test part."""

    name: str
    measure: Callable[[nn.Module, Tensor, Tensor], float]
    required: float
    text: Callable[[float], str] = percent  # of a value
    lower: bool = False  # is better
    reached: str = "both read the digits"

    def missed(self, value: float) -> str | None:
        """None, or how far off a value is."""
        if value <= self.required if self.lower else value >= self.required:
            return None
        return f"{self.name} {self.text(value)} is {'above' if self.lower else 'below'} {self.text(self.required)}"


@dataclass(frozen=True)
class Recipe:
    """How a task trains."""

    batch: int
    learning_rate: float  # at its highest: one cycle up and down
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    goal: Goal = Goal("test accuracy", accuracy, 0.95)
    random: bool = False  # the model draws random numbers while it trains: every training shall draw the same
    alike: bool = True  # ... and does: the trained weights may be compared
    loss: Run = cross_entropy
    loss_name: str = "cross-entropy"
    scores: Run = scores_of  # what the two models are compared by on the same weights


@dataclass
class Training:
    """One model's training: the mean loss and the seconds of each epoch, and what it reached on the test part."""

    name: str
    model: nn.Module
    recipe: Recipe
    steps: int  # of the whole training, for the learning rate's cycle
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    score: float = 0.0  # the goal's measure
    nudged: bool = False  # every weight is moved by one unit in the last place before every step
    taken: int = 0  # steps so far

    def __post_init__(self) -> None:
        self.luck = torch.Generator().manual_seed(0)
        self.optimizer = self.recipe.optimizer(self.model.parameters(), self.recipe.learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.recipe.learning_rate, total_steps=self.steps)

    def epoch(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        start = now(x)
        total = torch.zeros((), device=x.device)
        for rows in order.split(self.recipe.batch):
            if self.nudged:
                nudge(self.model, self.luck)
            total += self.step(x[rows], y[rows]) * len(rows)
            self.schedule.step()
        self.seconds.append(now(x) - start)
        self.losses.append(total.item() / len(order))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on one batch; its loss."""
        if self.recipe.random:  # anew before each step: a model that draws in another order or number is out of step for one batch only
            torch.manual_seed(self.taken)
        self.taken += 1
        self.optimizer.zero_grad()
        loss = self.recipe.loss(self.model, x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, and what has been measured so far."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "luck": self.luck.get_state(),
            "taken": self.taken,
            "losses": list(self.losses),
            "seconds": list(self.seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.luck.set_state(state["luck"])
        self.taken, self.losses, self.seconds = state["taken"], state["losses"], state["seconds"]


@dataclass(frozen=True)
class Cost:
    """What one thing takes with torch and with pyops, in `unit`; `ratio` is torch's over pyops'."""

    what: str
    how: str  # it was measured
    unit: str
    torch: float
    pyops: float

    @property
    def ratio(self) -> float:
        return self.torch / self.pyops


@dataclass
class Result:
    """What the demo found; `failures` is empty when all is well."""

    lead: str  # what was done, in a sentence or two
    part: str  # of pyops' model: what `checks` is about
    device: str
    runs_on: str
    torch: Training
    pyops: Training
    output_difference: float  # largest, of the two trained models' scores for the test images
    parameter_difference: float  # largest
    drift: float  # relative L2 distance of the trained parameters
    yardstick: float  # the same for a training that is nudged by one unit in the last place
    images: Tensor | None = None  # [N, H, W], with the labels and what pyops' model takes them for
    labels: Tensor | None = None
    predictions: Tensor | None = None
    examples: Table | None = None  # of what pyops' model makes of test inputs that are no images
    checks: list[Check] = field(default_factory=list)
    differences: list[tuple[str, float]] = field(default_factory=list)  # more of them: what, and the largest
    costs: list[Cost] = field(default_factory=list)
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
    """None, or what to install for the digits."""
    if find_spec("sklearn") is None:
        return "pyops demo reads its images from scikit-learn, which is not installed: pip install scikit-learn"
    return None


def load_digits(seed: int, device: str) -> Data:
    """Images [N, 8, 8] in 0..1; a quarter is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels.reshape(-1, 8, 8) / 16, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part, device=device) for part in split)
    return Data(train_x.float(), train_y.long(), test_x.float(), test_y.long())


def start(recipe: Recipe, data: Data, epochs: int, **models: nn.Module) -> list[Training]:
    """A training of each model, by name.

    Raises ValueError for no epochs, or a backend that cannot run a model here.
    """
    if epochs < 1:
        raise ValueError(f"demo: epochs: expected 1 or more, got {epochs}")
    for model in models.values():  # the first call of each allocates, picks kernels and starts threads: not the models' speed
        rehearsal = copy.deepcopy(model)  # batch norm's statistics count calls
        recipe.loss(rehearsal, data.train_x[: recipe.batch], data.train_y[: recipe.batch]).backward()
    steps = epochs * -(-len(data.train_x) // recipe.batch)
    return [Training(name, model, recipe, steps) for name, model in models.items()]


def race(
    pair: list[Training], data: Data, epochs: int, seed: int, progress: Callable[[], None], lead: str, part: str, runs_on: str,
    checkpoint: Checkpoint | None = None,
) -> Result:  # fmt: skip
    """Trains both, torch's first in `pair`, and a third that is nudged. The result is not judged yet.

    With a checkpoint it starts where that stopped, if it knows this part, and saves after each epoch.
    """
    theirs, ours = pair
    third = Training("nudged", copy.deepcopy(theirs.model), theirs.recipe, theirs.steps, nudged=True)
    shuffle = torch.Generator().manual_seed(seed)
    train_x, train_y, test_x, test_y = data
    trainings = {"torch": theirs, "pyops": ours, "nudged": third}
    done = 0 if checkpoint is None else checkpoint.restore(part, trainings, shuffle)
    for epoch in range(epochs):
        if epoch < done:
            progress()
            progress()
            continue
        order = torch.randperm(len(train_x), generator=shuffle).to(train_x.device)
        for training in pair if epoch % 2 else reversed(pair):
            training.epoch(train_x, train_y, order)
            progress()
        third.epoch(train_x, train_y, order)
        if checkpoint is not None:
            checkpoint.save(part, trainings, shuffle, epoch + 1)

    goal = theirs.recipe.goal
    scores = [evaluate(training.model, test_x, test_y, theirs.recipe.scores) for training in pair]
    for training in pair:
        training.score = goal.measure(training.model, test_x, test_y)
    weights = [flat(training.model) for training in (*pair, third)]
    return Result(
        lead=lead,
        part=part,
        device=train_x.device.type,
        runs_on=runs_on,
        torch=theirs,
        pyops=ours,
        output_difference=(scores[1] - scores[0]).abs().max().item(),
        parameter_difference=(weights[1] - weights[0]).abs().max().item(),
        drift=relative_error([(weights[1], weights[0])]),
        yardstick=relative_error([(weights[2], weights[0])]),
    )


def evaluate(model: nn.Module, x: Tensor, y: Tensor, scores: Run = scores_of) -> Tensor:
    """The model's scores in inference."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([scores(model, *part) for part in zip(x.split(EVALUATED), y.split(EVALUATED), strict=True)])
    model.train(training)
    return found


def read(result: Result, images: Tensor, data: Data) -> None:
    """Adds to a classifier's result what pyops' model reads in the test images, shown as `images`."""
    result.images, result.labels = images, data.test_y
    training = result.pyops
    result.predictions = evaluate(training.model, data.test_x, data.test_y, training.recipe.scores)[:, :CLASSES].argmax(1)


def judge(result: Result) -> list[str]:
    """What is wrong, in words."""
    found = [f"{name} of pyops' {result.part}: {wrong}" for name, _, _, wrong in result.checks if wrong]
    for training in (result.torch, result.pyops):
        if wrong := training.recipe.goal.missed(training.score):
            found.append(f"{training.name}: {wrong}")
    if result.torch.recipe.alike and not result.drift <= DRIFT_FACTOR * result.yardstick:
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


def now(where: Tensor) -> float:
    """Seconds, once the device of `where` has done its work."""
    if where.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
