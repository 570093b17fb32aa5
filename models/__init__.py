"""Whole networks, built from pyops.nn: ``pyops.models.list()`` names them, ``pyops.models.create("resnet18", num_classes=10)`` makes one.

Where torchvision has the same network, names, options and the state_dict's keys are torchvision's.
"""

if __name__ != "pyops.models":
    raise ImportError(
        f"this folder is the package pyops.models, not {__name__!r}: install the project (pip install -e .) and import it by its full name"
    )

from ._registry import Entry, create, entry, list
from .lenet import LeNet, lenet, lenet5

__all__ = [  # noqa: RUF022  (by network)
    "Entry", "create", "entry", "list",
    "LeNet", "lenet", "lenet5",
]  # fmt: skip
