"""The eager twin of each network of the zoo: torchvision's own where it has one, else the same in plain torch.nn, with the same state_dict
keys. What pyops' networks are compared with, in numbers and in time."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

_TWINS: dict[str, Callable[..., nn.Module]] = {}


def twin_of(*names: str):
    """Of a function or class: it builds the eager twin of networks of those names and takes their options."""

    def add(build: Any):
        for name in names:
            assert name not in _TWINS, name
            _TWINS[name] = build
        return build

    return add


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def twin(name: str, **options: Any) -> nn.Module:
    """The eager twin of ``pyops.models.create(name, **options)``, with weights of its own.

    Raises ImportError where it is torchvision's and torchvision is not installed.
    """
    _load()
    if name in _TWINS:
        return _TWINS[name](**options)
    from torchvision import models

    return models.get_model(name, **options)
