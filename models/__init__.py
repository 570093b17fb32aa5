"""Whole networks, built from pyops.nn: ``pyops.models.list()`` names them, ``pyops.models.create("resnet18", num_classes=10)`` makes one.

Where torchvision has the same network, names, options and the state_dict's keys are torchvision's.
"""

if __name__ != "pyops.models":
    raise ImportError(
        f"this folder is the package pyops.models, not {__name__!r}: install the project (pip install -e .) and import it by its full name"
    )

from ._registry import Entry, create, entry, list
from .alexnet import AlexNet, alexnet, alexnet_groups, alexnet_lrn
from .lenet import LeNet, lenet, lenet5
from .resnet import ResNet, resnet18, resnet18_no_bn, resnet34, resnet50, resnet101, resnet152
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn, vgg_compact

__all__ = [  # noqa: RUF022  (by network)
    "Entry", "create", "entry", "list",
    "AlexNet", "alexnet", "alexnet_groups", "alexnet_lrn",
    "LeNet", "lenet", "lenet5",
    "ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet18_no_bn",
    "VGG", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg_compact",
]  # fmt: skip
