"""The zoo's list, and what holds of every network in it."""

import importlib
import inspect
from pathlib import Path

import pytest

from pyops import models as zoo


def test_every_network_has_a_case():
    """One that no test compares with its twin fails here."""
    files = [path.stem for path in Path(__file__).parent.glob("test_models_*.py")]
    cases = [name for file in files for name in importlib.import_module(f".{file}", __package__).CASES]
    assert sorted(cases) == zoo.list()


@pytest.mark.parametrize("name", zoo.list())
def test_every_network_is_described(name):
    found = zoo.entry(name)
    assert found.build.__doc__ and found.paper
    assert getattr(zoo, name) is found.build
    parameters = inspect.signature(found.build).parameters.values()
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters), "create(name) has to work without options"


def test_unknown_names():
    with pytest.raises(ValueError, match="no network 'lenet-5'; did you mean"):
        zoo.create("lenet-5")
    with pytest.raises(ValueError, match=r"pyops.models.list\(\) has all names"):
        zoo.create("qqqqqq")
