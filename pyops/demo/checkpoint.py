"""Where a demo's training stands, in one file: it can be stopped at any time, and goes on as if it never had been.

The file is written after each epoch, first aside and then renamed, so that there is always a whole one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pyops.demo.training import Data, Training

FORMAT = 1


class Checkpoint:
    """A file of the trainings of a task's networks.

    Args:
        path: of the file; what it holds is gone on with.
        facts: what the task was started with, by the name of the command's option or of the size: a file with others is refused.

    Raises ValueError for a file that is no checkpoint, or one of another task or other sizes.
    """

    def __init__(self, path: Path, **facts: str | int | None):
        self.path = Path(path)
        self.facts = facts
        self.networks: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"demo: checkpoint: {self.path}: is no checkpoint of this demo: {error}") from error
        if not isinstance(saved, dict) or saved.get("pyops demo") != FORMAT:
            raise ValueError(f"demo: checkpoint: {self.path}: is no checkpoint of this demo")
        for name in {**self.facts, **saved["facts"]}:
            wanted, found = self.facts.get(name), saved["facts"].get(name)
            if wanted != found:
                raise ValueError(f"demo: checkpoint: {self.path}: {name}: was saved with {found!r}, this run has {wanted!r}")
        self.networks = saved["networks"]

    def restore(self, network: str, trainings: dict[str, Training], shuffle: torch.Generator) -> int:
        """Brings a network's trainings, and torch's random states, to where they were saved; the number of finished epochs."""
        saved = self.networks.get(network)
        if saved is None:
            self.save(network, trainings, shuffle, 0)  # so that a path that cannot be written is told before an epoch is lost
            return 0
        for name, training in trainings.items():
            state = saved["trainings"][name]
            shapes, found = sizes(training.model.state_dict()), sizes(state["model"])
            if shapes != found:
                differing = sorted(key for key in {**shapes, **found} if shapes.get(key) != found.get(key))[0]
                raise ValueError(
                    f"demo: checkpoint: {self.path}: {network}: {differing}: was saved with the sizes {found.get(differing)}, "
                    f"this network's are {shapes.get(differing)}"
                )
            training.load_state_dict(state)
        shuffle.set_state(saved["shuffle"])
        torch.set_rng_state(saved["random"])
        if torch.cuda.is_available() and saved["random_cuda"]:
            torch.cuda.set_rng_state_all(saved["random_cuda"])
        return saved["epoch"]

    def save(self, network: str, trainings: dict[str, Training], shuffle: torch.Generator, epoch: int) -> None:
        self.networks[network] = {
            "epoch": epoch,
            "trainings": {name: training.state_dict() for name, training in trainings.items()},
            "shuffle": shuffle.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"pyops demo": FORMAT, "facts": self.facts, "networks": self.networks}, aside)
            os.replace(aside, self.path)
        except (OSError, RuntimeError) as error:  # torch's own file writer raises RuntimeError
            raise ValueError(f"demo: checkpoint: {self.path}: cannot be written: {error}") from error
        finally:
            if aside.exists():  # something came between
                aside.unlink()


def sizes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def digest(data: Data) -> str:
    """A few letters that other data would not have."""
    found = hashlib.sha256()
    for part in data:
        found.update(repr((part.shape, part.dtype)).encode())
        host = part.cpu().contiguous()
        found.update(ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()))
    return found.hexdigest()[:16]
