"""Which tasks there are, and what each takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pyops.demo import images, networks, sequence, text, vit
from pyops.demo.training import missing

# of each task, unless told otherwise
EPOCHS = {"sequence": 20, "images": images.EPOCHS, "vit": vit.EPOCHS, **networks.EPOCHS, **text.EPOCHS}
RACES = {"vit": 2, **text.RACES}  # how many pairs of networks a task trains, where not one
SMALL = ("sequence", *text.TASKS)  # gain nothing from more threads than one


def runner(task: str, cell: str | None = None, data: Path | None = None, checkpoint: Path | None = None) -> Callable[..., Any]:
    """What runs a task, to be called with device, epochs, backend, seed and progress.

    Raises ValueError for an option that does not belong to the task, or when its images cannot be had.
    """
    if cell is not None and task != "sequence":
        raise ValueError(f"--cell: belongs to --task sequence, got --task {task}")
    if data is not None and task not in networks.TASKS:
        raise ValueError(f"--data: belongs to --task {', '.join(networks.TASKS)}; {task} has data of its own")
    if checkpoint is not None and task not in (*networks.TASKS, *text.TASKS):
        raise ValueError(f"--checkpoint: belongs to --task {', '.join((*networks.TASKS, *text.TASKS))}; {task} keeps nothing")
    if task not in text.TASKS and data is None and (reason := missing()):
        raise ValueError(reason)
    if task in text.TASKS:
        return partial(text.run, task, checkpoint=checkpoint)
    if task in networks.TASKS:
        return partial(networks.run, task, data=data, checkpoint=checkpoint)
    others: dict[str, Callable[..., Any]] = {"sequence": partial(sequence.run, cell or "lstm"), "images": images.run, "vit": vit.run}
    return others[task]
