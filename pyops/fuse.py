"""`pyops.fuse(model)`: torch's layers become pyops' in place; `pyops.unfuse(model)` undoes it.

The instance keeps its parameters, buffers, hooks and state_dict keys and changes class only. What is not exactly one of torch's own
classes (a subclass, a parametrised, scripted or quantised module) is left alone.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from pyops import nn

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
TWINS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in NAMES}

Model = TypeVar("Model", bound=torch.nn.Module)


def fuse(model: Model) -> Model:
    """Replaces every recurrent layer and cell of `model` (itself included) by pyops' twin, in place, and returns it.

    Raises TypeError when `model` is no torch.nn.Module. Results stay within the numerics gate of torch's own.
    """
    return _swap(model, TWINS, "fuse")


def unfuse(model: Model) -> Model:
    """Undoes `fuse`, in place, and returns the model. A layer that uses what torch's has not (reset-before, sigmoid) stays as it is."""
    return _swap(model, {twin: own for own, twin in TWINS.items()}, "unfuse")


def _swap(model: Model, classes: dict[type, type], name: str) -> Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name}: model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        extras = not getattr(module, "reset_after", True) or getattr(module, "nonlinearity", None) == "sigmoid"
        if type(module) in classes and not extras:
            module.__class__ = classes[type(module)]
    return model
