"""Drop-in modules: torch's own constructors, parameter names and errors, pyops' kernels."""

from pyops.nn.conv import ConvBNAct, DropPath, SqueezeExcitation, UpsampleConvBNAct
from pyops.nn.convnext import ConvNeXtBlock
from pyops.nn.densenet import DenseBlock, DenseLayer, DenseTransition
from pyops.nn.linear import LinearAct
from pyops.nn.mbconv import FusedMBConv, MBConv
from pyops.nn.norm import LayerNorm2d, LocalResponseNorm
from pyops.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU", "LSTM", "RNN", "ConvBNAct", "ConvNeXtBlock", "DenseBlock", "DenseLayer", "DenseTransition", "DropPath", "FusedMBConv", "GRUCell",
    "LSTMCell", "LayerNorm2d", "LinearAct", "LocalResponseNorm", "MBConv", "RNNCell", "SqueezeExcitation", "UpsampleConvBNAct",
]  # fmt: skip
