"""Drop-in modules: torch's own constructors, parameter names and errors, pyops' kernels."""

from pyops.nn.attention import Attention, DecoderCache, KeyValueCache, MultiheadAttention
from pyops.nn.chain import Sequential
from pyops.nn.conv import ConvBNAct, DropPath, SqueezeExcitation, UpsampleConvBNAct
from pyops.nn.convnext import ConvNeXtBlock
from pyops.nn.densenet import DenseBlock, DenseLayer, DenseTransition
from pyops.nn.linear import LinearAct
from pyops.nn.mbconv import FusedMBConv, MBConv
from pyops.nn.norm import LayerNorm2d, LocalResponseNorm
from pyops.nn.resnet import BasicBlock, Bottleneck
from pyops.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from pyops.nn.swin import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
    WindowAttention,
)
from pyops.nn.transformer import Transformer, TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "GRU", "LSTM", "RNN", "Attention", "BasicBlock", "Bottleneck", "ConvBNAct", "ConvNeXtBlock", "DecoderCache", "DenseBlock",
    "DenseLayer", "DenseTransition",
    "DropPath", "FusedMBConv", "GRUCell", "KeyValueCache", "LSTMCell", "LayerNorm2d", "LinearAct", "LocalResponseNorm", "MBConv",
    "MultiheadAttention", "PatchMerging", "PatchMergingV2", "RNNCell", "Sequential", "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2", "SqueezeExcitation", "SwinTransformerBlock", "SwinTransformerBlockV2", "Transformer", "TransformerDecoder",
    "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer", "UpsampleConvBNAct", "WindowAttention",
]  # fmt: skip
