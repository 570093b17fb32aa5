"""torch.nn's layers that pyops.nn has a twin of."""

from __future__ import annotations

import torch

from pyops import nn
from pyops._fusion.rules import Change, rule
from pyops.nn._derived import own_class
from pyops.nn.chain import ConvChain, grouped


@rule("torch.nn.modules.rnn.LSTM")
@rule("torch.nn.modules.rnn.GRU")
@rule("torch.nn.modules.rnn.RNN")
@rule("torch.nn.modules.rnn.LSTMCell")
@rule("torch.nn.modules.rnn.GRUCell")
@rule("torch.nn.modules.rnn.RNNCell")
@rule("torch.nn.modules.activation.MultiheadAttention")
@rule("torch.nn.modules.transformer.TransformerEncoderLayer")
@rule("torch.nn.modules.transformer.TransformerDecoderLayer")
def twin(module: torch.nn.Module) -> Change:
    return Change(getattr(nn, own_class(module).__name__), whole=False)


@rule("torch.nn.modules.normalization.LocalResponseNorm")
def local_response_norm(module: torch.nn.LocalResponseNorm) -> Change:
    return Change(nn.LocalResponseNorm, {"activation": "none", "backend": None})


def sequential(module: torch.nn.Sequential) -> Change | str:
    """Of any class that runs its layers as `torch.nn.Sequential` does."""
    layers = list(module)
    steps = grouped(layers)
    if len(steps) == len(layers) and not any(isinstance(step, ConvChain) for step, _ in steps):
        return "no layers in it that run as one"
    return Change(nn.Sequential, whole=False)
