"""Whole networks, built from pyops.nn: ``pyops.models.list()`` names them, ``pyops.models.create("resnet18", num_classes=10)`` makes one.

Where torchvision has the same network, names, options and the state_dict's keys are torchvision's.
"""

if __name__ != "pyops.models":
    raise ImportError(
        f"this folder is the package pyops.models, not {__name__!r}: install the project (pip install -e .) and import it by its full name"
    )

from ._registry import Entry, create, entry, list
from .alexnet import AlexNet, alexnet, alexnet_groups, alexnet_lrn
from .convnext import ConvNeXt, convnext_base, convnext_small, convnext_tiny
from .densenet import DenseNet, densenet121, densenet161, densenet169, densenet201
from .efficientnet import (
    EfficientNet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
)
from .inception import Inception3, InceptionOutputs, inception_v3
from .capsnet import CapsNet, DigitCapsules, capsnet, margin_loss, reconstruction_loss, squash
from .lenet import LeNet, lenet, lenet5
from .mobilenet import MobileNetV2, mobilenet_v2
from .resnet import ResNet, resnet18, resnet18_no_bn, resnet34, resnet50, resnet101, resnet152
from .sequence import LanguageModel, TimeSeries, language_model, time_series
from .swin import SwinTransformer, swin_b, swin_s, swin_t, swin_v2_b, swin_v2_s, swin_v2_t
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn, vgg_compact
from .vit import VisionTransformer, vit_b_16, vit_b_32, vit_l_16

__all__ = [  # noqa: RUF022  (by network)
    "Entry", "create", "entry", "list",
    "AlexNet", "alexnet", "alexnet_groups", "alexnet_lrn",
    "CapsNet", "DigitCapsules", "capsnet", "margin_loss", "reconstruction_loss", "squash",
    "LeNet", "lenet", "lenet5",
    "ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet18_no_bn",
    "VGG", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg_compact",
    "DenseNet", "densenet121", "densenet161", "densenet169", "densenet201",
    "Inception3", "InceptionOutputs", "inception_v3",
    "MobileNetV2", "mobilenet_v2",
    "EfficientNet", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "ConvNeXt", "convnext_tiny", "convnext_small", "convnext_base",
    "VisionTransformer", "vit_b_16", "vit_b_32", "vit_l_16",
    "SwinTransformer", "swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b",
    "LanguageModel", "TimeSeries", "language_model", "time_series",
from .autoencoder import (
    Autoencoder,
    ConvolutionalAutoencoder,
    VariationalAutoencoder,
    convolutional_autoencoder,
    denoising_autoencoder,
    stacked_autoencoder,
    variational_autoencoder,
)
from .mlp import MLP, Regression, linear_regression, logistic_regression, mlp, softmax_regression

    "Autoencoder", "ConvolutionalAutoencoder", "VariationalAutoencoder",
    "convolutional_autoencoder", "denoising_autoencoder", "stacked_autoencoder", "variational_autoencoder",
    "MLP", "Regression", "linear_regression", "logistic_regression", "mlp", "softmax_regression",
]  # fmt: skip
