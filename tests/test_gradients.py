"""Gradients of every op x backend x dtype x sample, gradcheck, double backward, partial gradients."""

import pytest
import torch

from pyops.testing import poison

from .conftest import arguments, assert_gate, cases, cotangents, double, leaves, with_grad


def gradients(spec, args, kwargs, backend):
    args, kwargs = with_grad(args), with_grad(kwargs)
    outputs = [y for y in leaves(spec.public(*args, **kwargs, backend=backend)) if y.requires_grad]
    inputs = leaves((args, kwargs))
    grads = torch.autograd.grad(outputs, inputs, cotangents(outputs), allow_unused=True)
    return [g if g is not None else torch.zeros_like(t) for g, t in zip(grads, inputs, strict=True)]


@pytest.mark.parametrize("spec, backend, dtype, sample", cases())
def test_gradients(spec, backend, dtype, sample):
    def draw(seed):
        args, kwargs = arguments(spec, backend, dtype, sample, seed)
        truth = gradients(spec, double(args), double(kwargs), "eager")
        eager = gradients(spec, args, kwargs, "eager")
        poison(*(g.numel() * g.element_size() for g in eager))
        found = gradients(spec, args, kwargs, backend)
        assert all(g.dtype == g_eager.dtype for g, g_eager in zip(found, eager, strict=True))
        return found, truth, eager

    assert_gate(draw, dtype, gradient=True)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(ids=("plain", "odd", "lengths_reverse", "many_rows")))
def test_same_gradient_bits_twice(spec, backend, dtype, sample):
    args, kwargs = arguments(spec, backend, dtype, sample)
    first = gradients(spec, args, kwargs, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(spec, args, kwargs, backend), strict=True))


SMALL = ("plain", "lengths_reverse", "batch_first", "no_bias", "reset_before_plain", "relu_plain", "sigmoid_plain")


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(("cpu",), (torch.float64,), SMALL))
def test_gradcheck(spec, backend, dtype, sample):
    args, kwargs = arguments(spec, backend, dtype, sample)
    flat = leaves(with_grad(args))

    def call(*values):
        values = iter(values)
        fill = lambda v: next(values) if isinstance(v, torch.Tensor) else tuple(map(fill, v)) if isinstance(v, tuple) else v  # noqa: E731
        return tuple(leaves(spec.public(*fill(args), **kwargs, backend=backend)))

    assert torch.autograd.gradcheck(call, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(("cpu",), (torch.float32,), ("plain", "residual")))
def test_partial_gradients(spec, backend, dtype, sample):
    """What does not ask for a gradient gets none, and what does gets the same one."""
    args, kwargs = arguments(spec, backend, dtype, sample)
    full = gradients(spec, args, kwargs, backend)
    for chosen in range(len(full)):
        live_args, live_kwargs = with_grad(args), with_grad(kwargs)
        live = leaves((live_args, live_kwargs))
        for index, t in enumerate(live):
            t.requires_grad_(index == chosen)
        outputs = leaves(spec.public(*live_args, **live_kwargs, backend=backend))
        torch.autograd.backward(outputs, cotangents(outputs))
        assert torch.equal(live[chosen].grad, full[chosen])
        assert all(t.grad is None for index, t in enumerate(live) if index != chosen)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(("cpu",), (torch.float32,), ("plain",)))
def test_nothing_is_kept_without_grad(spec, backend, dtype, sample):
    args, kwargs = arguments(spec, backend, dtype, sample)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved a tensor"), lambda t: t):
        results = leaves(spec.public(*with_grad(args), **kwargs, backend=backend))
    assert not any(y.requires_grad for y in results)
