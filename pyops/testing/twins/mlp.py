"""Regressions and the multilayer perceptron in plain torch.nn."""

from torch import nn

from pyops.testing.twins import twin_of


@twin_of("linear_regression")
class LinearRegression(nn.Module):
    def __init__(self, in_features: int = 16, num_classes: int = 1):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, x):
        return self.linear(x)


@twin_of("logistic_regression")
class LogisticRegression(LinearRegression):
    def forward(self, x):
        return self.linear(x).sigmoid()


@twin_of("softmax_regression")
class SoftmaxRegression(LinearRegression):
    def __init__(self, in_features: int = 784, num_classes: int = 10):
        super().__init__(in_features, num_classes)

    def forward(self, x):
        return nn.functional.log_softmax(self.linear(x), dim=-1)


@twin_of("mlp")
class MLP(nn.Module):
    def __init__(self, in_features: int = 768, hidden=(512, 256), num_classes: int = 10):
        super().__init__()
        sizes = (in_features, *hidden, num_classes)
        layers = []
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return self.layers(x)
