"""Drop-in modules: torch's own constructors, parameter names and errors, pyops' kernels."""

from pyops.nn.conv import ConvBNAct, DropPath, MBConv, SqueezeExcitation
from pyops.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "ConvBNAct", "DropPath", "GRUCell", "LSTMCell", "MBConv", "RNNCell", "SqueezeExcitation"]
