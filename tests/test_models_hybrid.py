"""Networks of convolutions and recurrent layers, beside their twins."""

import pytest
import torch

from pyops import models as zoo

from .models import Case, both, check_copies, check_inference, check_training

CASES = {"digits_hybrid": Case(lambda: (torch.randn(3, 1, 28, 28),))}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


def test_copies():
    check_copies("digits_hybrid", CASES["digits_hybrid"])


def test_options():
    case = Case(lambda: (torch.randn(2, 3, 28, 28),), dict(num_classes=7, in_channels=3))
    check_inference("digits_hybrid", case)
    assert zoo.digits_hybrid(**case.options)(*case.inputs()).shape == (2, 7)


def test_compiles():
    ours, theirs = (model.eval() for model in both("digits_hybrid", CASES["digits_hybrid"]))
    inputs = CASES["digits_hybrid"].inputs()
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        found = torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(found, theirs(*inputs), rtol=1e-4, atol=1e-5)
