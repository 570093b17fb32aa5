"""The demo's tasks with whole networks of the zoo that read digits: MNIST, or scikit-learn's digits enlarged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyops
from pyops.demo import contest, mnist, zoo
from pyops.demo.checkpoint import Checkpoint, digest
from pyops.demo.training import Goal, Recipe, Result, accuracy, read
from pyops.models import margin_loss, reconstruction_loss

SHARE = 0.85  # of a variational autoencoder's bound in what it would be with no code, at most; linear codes of these digits reach 0.7


def small_resnet(model: Any) -> nn.Module:
    """ResNet's stem for one channel and its first two stages: what images of 32 x 32 pixels leave work for."""
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, 10)
    return model


def capsules_scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The capsules' lengths, then the pixels reconstructed from the wanted one."""
    lengths, reconstruction = model(x, y)
    return torch.cat([lengths, reconstruction.flatten(1)], 1)


def capsules_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    lengths, reconstruction = model(x, y)
    return margin_loss(lengths, y) + reconstruction_loss(reconstruction, x)


def noise_of_pyops(model: Any) -> nn.Module:
    """Lets the eager variational autoencoder draw, after the same seed, the numbers that pyops' op draws."""
    if hasattr(model, "draw"):
        model.draw = draw
    return model


def draw(like: Tensor) -> Tensor:
    nothing = torch.zeros(like.shape, device=like.device)
    return pyops.gaussian_sample(nothing, nothing)[0].to(like.dtype)


def autoencoder_scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What is decoded, then what the divergence of the code is made of."""
    output, divergence = model(x.flatten(1))
    return torch.cat([output, divergence[:, None]], 1)


def autoencoder_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model.loss(x.flatten(1))


def bound(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The negative evidence lower bound (of codes drawn once, but for the constant) over that of no code, where each image is taken for
    the mean of all."""
    training = model.training
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = autoencoder_loss(model.train(), x, y).item()  # in inference a code is not drawn
    model.train(training)
    return found / (0.5 * x.flatten(1).var(0, correction=0).sum().item())


class Task(NamedTuple):
    """A network of the zoo and how it is trained."""

    network: str
    about: str  # what reads
    size: int  # of the images' sides
    epochs: int
    recipe: Recipe
    adapt: Callable[[Any], nn.Module] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  (never written)
    classifies: bool = True


TASKS = {
    "lenet": Task("lenet", "LeNet", 32, 12, Recipe(64, 3e-3, zoo.adam)),
    "resnet": Task("resnet18", "The first half of ResNet-18", 32, 4, Recipe(64, 2e-3, zoo.adam), small_resnet),
    "hybrid": Task("digits_hybrid", "A network of convolutions, then recurrent layers,", 28, 10, Recipe(64, 4e-3, zoo.adam)),
    "capsnet": Task(
        "capsnet", "A CapsNet with an eighth of the channels", 28, 7,
        Recipe(
            64, 3e-3, zoo.adam, Goal("test accuracy", partial(accuracy, scores=capsules_scores), 0.95),
            loss=capsules_loss, loss_name="margin and reconstruction", scores=capsules_scores,
        ),
        options=dict(channels=32, capsules=4, decoder=(64, 128)),
    ),
    "vae": Task(
        "variational_autoencoder", "A variational autoencoder", 28, 30,
        Recipe(
            64, 3e-3, zoo.adam,
            Goal("negative ELBO, of that without a code", bound, SHARE, lower=True, reached="both compress the digits"),
            random=True, loss=autoencoder_loss, loss_name="negative ELBO", scores=autoencoder_scores,
        ),
        noise_of_pyops, dict(in_features=28 * 28, hidden=(128,), latent=16), classifies=False,
    ),
}  # fmt: skip
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
    facts: dict[str, Any] = dict(
        task=name, epochs=epochs, batch=task.recipe.batch, seed=seed, device=device, backend=backend, data=digest(digits)
    )
    store = None if checkpoint is None else Checkpoint(checkpoint, **facts)
    with pyops.backend(backend or "auto"):
        models = zoo.pair(task.network, device, seed, task.adapt, **task.options)
        chosen = backend or "auto"
        result = contest.run(models, task.recipe, digits, epochs, seed, progress, lead, chosen, zoo.kind, task.network, store)
        if task.classifies:
            read(result, shown, digits)
    return [result]
