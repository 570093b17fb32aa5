"""Networks of linear layers alone: regressions, and the multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyops.nn import LinearAct, Sequential

from ._registry import register, rows


class Regression(nn.Module):
    """``[N, in_features] -> [N, num_classes]``: one linear layer and its link."""

    def __init__(self, in_features: int, num_classes: int, activation: str = "none", log_softmax: bool = False):
        super().__init__()
        self.linear = LinearAct(in_features, num_classes, activation=activation)
        self.log_softmax = log_softmax

    def forward(self, input: Tensor) -> Tensor:
        y = self.linear(input)
        return y.log_softmax(-1) if self.log_softmax else y


@register(rows(16), "Legendre, 1805")
def linear_regression(in_features: int = 16, num_classes: int = 1) -> Regression:
    """A linear layer: `num_classes` values that are predicted by least squares."""
    return Regression(in_features, num_classes)


@register(rows(16), "Cox, 1958")
def logistic_regression(in_features: int = 16, num_classes: int = 1) -> Regression:
    """A linear layer and a sigmoid: the probabilities of `num_classes` answers, each yes or no on its own."""
    return Regression(in_features, num_classes, "sigmoid")


@register(rows(784), "Cox, 1966")
def softmax_regression(in_features: int = 784, num_classes: int = 10) -> Regression:
    """A linear layer and the logarithm of softmax, for `torch.nn.functional.nll_loss`: one of `num_classes` answers."""
    return Regression(in_features, num_classes, log_softmax=True)


class MLP(nn.Module):
    """``[N, in_features] -> [N, num_classes]``: ``layers``, linear with ReLU between them.

    Source: Rumelhart et al., 1986; Glorot et al., 2011 (ReLU).
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = Sequential(*layers[:-1])

    def forward(self, input: Tensor) -> Tensor:
        return self.layers(input)


@register(rows(768), "Rumelhart et al., 1986")
def mlp(in_features: int = 768, hidden: Sequence[int] = (512, 256), num_classes: int = 10) -> MLP:
    """768-512-256-10 with ReLU between the layers: 527,626 parameters. hidden: the sizes of the layers between input and output."""
    return MLP((in_features, *hidden, num_classes))
