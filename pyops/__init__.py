"""Kernels for PyTorch: hand-written CUDA, Triton and C++, as functions, drop-in modules and custom ops.

Importing touches no CUDA runtime, no Triton and starts nothing.
"""

import importlib

from pyops import nn
from pyops._backends import backend
from pyops.fuse import explain, fuse, unfuse
from pyops.ops.batch_norm_act import batch_norm_act
from pyops.ops.capsule_routing import capsule_routing
from pyops.ops.conv_bn_act import conv_bn_act, conv_transpose_bn_act
from pyops.ops.depthwise_conv import depthwise_conv_bn_act
from pyops.ops.flash_attention import flash_attention
from pyops.ops.gaussian_sample import gaussian_sample
from pyops.ops.gru import fused_gru, gru_cell
from pyops.ops.layer_norm_2d import layer_norm_2d
from pyops.ops.linear_act import linear_act
from pyops.ops.linear_cross_entropy import linear_cross_entropy
from pyops.ops.local_response_norm import local_response_norm
from pyops.ops.lstm import fused_lstm, lstm_cell
from pyops.ops.pointwise_conv import pointwise_conv
from pyops.ops.rnn import fused_rnn, rnn_cell
from pyops.ops.squeeze_excite import squeeze_excite
from pyops.ops.window_attention import window_attention

__version__ = "0.1.0"


def __getattr__(name: str):
    """The zoo is imported when it is first spoken of."""
    if name == "models":
        return importlib.import_module("pyops.models")
    raise AttributeError(f"module 'pyops' has no attribute {name!r}")


__all__ = [
    "backend",
    "batch_norm_act",
    "capsule_routing",
    "conv_bn_act",
    "conv_transpose_bn_act",
    "depthwise_conv_bn_act",
    "explain",
    "flash_attention",
    "fuse",
    "fused_gru",
    "fused_lstm",
    "fused_rnn",
    "gaussian_sample",
    "gru_cell",
    "layer_norm_2d",
    "linear_act",
    "linear_cross_entropy",
    "local_response_norm",
    "lstm_cell",
    "nn",
    "pointwise_conv",
    "rnn_cell",
    "squeeze_excite",
    "unfuse",
    "window_attention",
]
