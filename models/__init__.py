"""Whole networks, built from pyops.nn: ``pyops.models.list()`` names them, ``pyops.models.create("resnet18", num_classes=10)`` makes one.

Where torchvision has the same network, names, options and the state_dict's keys are torchvision's.
"""

if __name__ != "pyops.models":
    raise ImportError(
        f"this folder is the package pyops.models, not {__name__!r}: install the project (pip install -e .) and import it by its full name"
    )

from ._registry import Entry, create, entry, list
from .alexnet import AlexNet, alexnet, alexnet_groups, alexnet_lrn
from .autoencoder import (
    Autoencoder,
    ConvolutionalAutoencoder,
    VariationalAutoencoder,
    convolutional_autoencoder,
    denoising_autoencoder,
    stacked_autoencoder,
    variational_autoencoder,
)
from .capsnet import CapsNet, DigitCapsules, capsnet, margin_loss, reconstruction_loss, squash
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
from .hybrid import DigitsHybrid, digits_hybrid
from .inception import Inception3, InceptionOutputs, inception_v3
from .lenet import LeNet, lenet, lenet5
from .mlp import MLP, Regression, linear_regression, logistic_regression, mlp, softmax_regression
from .mobilenet import MobileNetV2, mobilenet_v2
from .resnet import ResNet, resnet18, resnet18_no_bn, resnet34, resnet50, resnet101, resnet152
from .seq2seq import AdditiveAttention, Seq2Seq, seq2seq
from .sequence import LanguageModel, TimeSeries, language_model, time_series
from .swin import SwinTransformer, swin_b, swin_s, swin_t, swin_v2_b, swin_v2_s, swin_v2_t
from .transformer import TranslationTransformer, transformer
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn, vgg_compact
from .vit import VisionTransformer, vit_b_16, vit_b_32, vit_l_16

__all__ = [  # noqa: RUF022  (by network)
    "Entry", "create", "entry", "list",
    "AlexNet", "alexnet", "alexnet_groups", "alexnet_lrn",
    "Autoencoder", "ConvolutionalAutoencoder", "VariationalAutoencoder", "convolutional_autoencoder", "denoising_autoencoder",
    "stacked_autoencoder", "variational_autoencoder",
    "CapsNet", "DigitCapsules", "capsnet", "margin_loss", "reconstruction_loss", "squash",
    "ConvNeXt", "convnext_base", "convnext_small", "convnext_tiny",
    "DenseNet", "densenet121", "densenet161", "densenet169", "densenet201",
    "EfficientNet", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7",
    "DigitsHybrid", "digits_hybrid",
    "Inception3", "InceptionOutputs", "inception_v3",
    "LeNet", "lenet", "lenet5",
    "MLP", "Regression", "linear_regression", "logistic_regression", "mlp", "softmax_regression",
    "MobileNetV2", "mobilenet_v2",
    "ResNet", "resnet101", "resnet152", "resnet18", "resnet18_no_bn", "resnet34", "resnet50",
    "AdditiveAttention", "Seq2Seq", "seq2seq",
    "LanguageModel", "TimeSeries", "language_model", "time_series",
    "SwinTransformer", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "TranslationTransformer", "transformer",
    "VGG", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vgg_compact",
    "VisionTransformer", "vit_b_16", "vit_b_32", "vit_l_16",
]  # fmt: skip
