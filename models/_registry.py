"""Which networks there are: a name, what builds it, and what it takes."""

from __future__ import annotations

import difflib
from builtins import list as list_of
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = Callable[[int], tuple[Tensor, ...]]  # of a batch size: arguments of the network's forward


class Entry(NamedTuple):
    """A network of the zoo."""

    name: str
    build: Callable[..., Any]
    inputs: Inputs  # at the size that the network is known for
    paper: str  # who described it


_ENTRIES: dict[str, Entry] = {}


def register(inputs: Inputs, paper: str, name: str | None = None):
    """Of a function that builds a network: lists it under its own name, or another."""

    def add(build: Callable[..., Any]):
        key = name or build.__name__
        assert key not in _ENTRIES, key
        _ENTRIES[key] = Entry(key, build, inputs, paper)
        return build

    return add


def images(height: int, channels: int = 3, width: int | None = None) -> Inputs:
    """Normal noise ``[N, channels, height, width]``."""
    return lambda batch: (torch.randn(batch, channels, height, width or height),)


def rows(features: int) -> Inputs:
    """Normal noise ``[N, features]``."""
    return lambda batch: (torch.randn(batch, features),)


def tokens(vocabulary: int, *lengths: int) -> Inputs:
    """Random token numbers ``[N, length]``, a tensor for each length."""
    return lambda batch: tuple(torch.randint(vocabulary, (batch, length)) for length in lengths)


def list() -> list_of[str]:
    """The names of all networks, in alphabetical order."""
    return sorted(_ENTRIES)


def entry(name: str) -> Entry:
    """What is known of a network. Raises ValueError for a name that there is none of."""
    if name not in _ENTRIES:
        near = difflib.get_close_matches(str(name), _ENTRIES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "pyops.models.list() has all names"
        raise ValueError(f"models: name: there is no network {name!r}; {hint}")
    return _ENTRIES[name]


def create(name: str, **options: Any) -> nn.Module:
    """A new network with random weights.

    Args:
        name: one of `list()`.
        options: of the function of that name in pyops.models, such as ``num_classes``.

    Raises ValueError for an unknown name, and the function's own errors.
    """
    return entry(name).build(**options)
