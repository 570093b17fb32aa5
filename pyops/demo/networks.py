"""The demo's tasks with whole networks of the zoo that read digits: MNIST, or scikit-learn's digits enlarged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import pyops
from pyops.demo import contest, mnist, zoo
from pyops.demo.checkpoint import Checkpoint, digest
from pyops.demo.training import Recipe, Result, read


def small_resnet(model: Any) -> nn.Module:
    """ResNet's stem for one channel and its first two stages: what images of 32 x 32 pixels leave work for."""
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, 10)
    return model


class Task(NamedTuple):
    """A network of the zoo and how it is trained."""

    network: str
    about: str  # what reads
    size: int  # of the images' sides
    epochs: int
    recipe: Recipe
    adapt: Callable[[Any], nn.Module] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  (never written)


TASKS = {
    "lenet": Task("lenet", "LeNet", 32, 12, Recipe(64, 3e-3, zoo.adam)),
    "resnet": Task("resnet18", "The first half of ResNet-18", 32, 4, Recipe(64, 2e-3, zoo.adam), small_resnet),
}
EPOCHS = {name: task.epochs for name, task in TASKS.items()}


def run(
    name: str,
    device: str = "cpu",
    epochs: int | None = None,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    *,
    data: Path | None = None,
    checkpoint: Path | None = None,
) -> list[Result]:
    """The whole demo of one of TASKS. `progress` is called after each epoch of each of the two models.

    Args:
        epochs: None: the task's, or one of MNIST's sixty thousand images.
        data: the folder of MNIST's files, see `mnist.load`.
        checkpoint: the file where the training's state is kept, and gone on from if it is there.

    Raises ValueError for an unknown name, no epochs, a backend that cannot run it here, or a file of `data` or `checkpoint` that is not
    what it should be.
    """
    if name not in TASKS:
        raise ValueError(f"demo: name: expected one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    if epochs is None:
        epochs = task.epochs if data is None else 1
    digits, shown = mnist.load(task.size, seed, device, data)
    lead = (
        f"{task.about} reads handwritten digits of {task.size} x {task.size} pixels. It is trained twice on {device}: as plain torch.nn, "
        f"and as pyops.models' {task.network}."
    )
    facts = dict(task=name, epochs=epochs, batch=task.recipe.batch, seed=seed, device=device, backend=backend, data=digest(digits))
    store = None if checkpoint is None else Checkpoint(checkpoint, **facts)
    with pyops.backend(backend or "auto"):
        models = zoo.pair(task.network, device, seed, task.adapt, **task.options)
        result = contest.run(
            models, task.recipe, digits, epochs, seed, progress, lead, backend or "auto", zoo.kind, task.network, store
        )  # fmt: skip
        read(result, shown, digits)
    return [result]
