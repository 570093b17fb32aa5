"""Forward of every op x backend x dtype x sample: the numerics gate, poisoned memory, repeatability, exact integers, errors."""

import pytest
import torch

from pyops.testing import SPECS, poison

from .conftest import arguments, assert_gate, cases, double, leaves


@pytest.mark.parametrize("spec, backend, dtype, sample", cases())
def test_forward(spec, backend, dtype, sample):
    def draw(seed):
        args, kwargs = arguments(spec, backend, dtype, sample, seed)
        truth = leaves(spec.public(*double(args), **double(kwargs), backend="eager"))
        eager = leaves(spec.public(*args, **kwargs, backend="eager"))
        poison(*(y.numel() * y.element_size() for y in eager))
        found = leaves(spec.public(*args, **kwargs, backend=backend))
        assert all(y.dtype == y_eager.dtype and y.device == y_eager.device for y, y_eager in zip(found, eager, strict=True))
        return found, truth, eager

    assert_gate(draw, dtype)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(ids=("plain", "odd", "lengths_reverse", "many_rows", "wide")))
def test_same_bits_twice(spec, backend, dtype, sample):
    args, kwargs = arguments(spec, backend, dtype, sample)
    first = [y.clone() for y in leaves(spec.public(*args, **kwargs, backend=backend))]
    for _ in range(3):
        again = leaves(spec.public(*args, **kwargs, backend=backend))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spec, backend, dtype, sample", cases(("cpu",), (torch.float32,), ("odd", "wide", "lengths", "many_rows")))
def test_any_thread_count(spec, backend, dtype, sample, threads):
    args, kwargs = arguments(spec, backend, dtype, sample)
    expected = leaves(spec.public(*args, **kwargs, backend=backend))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = leaves(spec.public(*args, **kwargs, backend=backend))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(ids=("relu_plain", "relu_odd", "relu_lengths_reverse")))
def test_integers_are_exact(spec, backend, dtype, sample):
    """Integer values through relu stay small enough to be exact in every dtype, so nothing may be lost on the way."""
    args, kwargs = arguments(spec, backend, dtype, sample)
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh = args
    H = weight_hh.shape[1]
    shift = torch.eye(H, dtype=dtype, device=x.device).roll(1, 0)  # each unit reads its neighbour: sums cannot grow
    args = (x.round().clamp(-2, 2), h0.round(), weight_ih.sign(), shift, bias_ih.sign(), -bias_hh.sign())
    truth = leaves(spec.public(*double(args), **kwargs, backend="eager"))
    found = leaves(spec.public(*args, **kwargs, backend=backend))
    for y, y64 in zip(found, truth, strict=True):
        assert torch.equal(y.cpu().double(), y64)


ERRORS = [pytest.param(spec, case, id=f"{spec.name}-{case.id}") for spec in SPECS.values() for case in spec.errors]


@pytest.mark.parametrize("warm", [False, True], ids=["first", "settled"])
@pytest.mark.parametrize("spec, case", ERRORS)
def test_errors(spec, case, warm):
    """Bad input is refused by name, on the first call and once the plain path has settled on a backend."""
    if warm:
        args, kwargs = spec.samples[0].make(torch.float32, "cpu")
        spec.public(*args, **kwargs)
    args, kwargs = case.make()
    with pytest.raises(case.error, match=case.match):
        spec.public(*args, **kwargs)


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_unknown_environment_value_is_refused(spec, monkeypatch):
    from pyops import _backends

    monkeypatch.setattr(_backends, "_environment", "fastest")
    args, kwargs = spec.samples[0].make(torch.float32, "cpu")
    with pytest.raises(ValueError, match="PYOPS_BACKEND: expected one of auto"):
        spec.public(*args, **kwargs)
