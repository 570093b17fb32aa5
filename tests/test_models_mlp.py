"""Regressions and the multilayer perceptron, beside their twins."""

import pytest
import torch

from pyops import models as zoo

from .models import Case, check_copies, check_inference, check_training


def rows(features: int, batch: int = 6):
    return lambda: (torch.randn(batch, features),)


CASES = {
    "linear_regression": Case(rows(5), dict(in_features=5, num_classes=3)),
    "logistic_regression": Case(rows(5), dict(in_features=5)),
    "softmax_regression": Case(rows(40), dict(in_features=40)),
    "mlp": Case(rows(24), dict(in_features=24, hidden=(32, 20), num_classes=7)),
}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_copies(name):
    check_copies(name, CASES[name])


@pytest.mark.parametrize("name", ["softmax_regression", "mlp"])
def test_compile(name):
    model, case = zoo.create(name, **CASES[name].options), CASES[name]
    torch._dynamo.reset()
    (x,) = case.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_sizes():
    assert sum(p.numel() for p in zoo.create("mlp").parameters()) == 527_626
    assert zoo.create("mlp", hidden=(), in_features=4, num_classes=2)(torch.zeros(3, 4)).shape == (3, 2)
    answers = zoo.create("softmax_regression")(torch.randn(3, 784))
    torch.testing.assert_close(answers.exp().sum(1), torch.ones(3))
