"""What the registry does not say about routing between capsules: opcheck, the torch ops' own checks, layouts, autocast, threads."""

import pytest
import torch

import pyops
from pyops import _library
from pyops.ops.capsule_routing import _unsupported

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))
OPS = torch.ops.pyops


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * 0.2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
@pytest.mark.parametrize("by_input", [False, True])
def test_opcheck(by_input):
    u, g = draw(3, 3, 4, 7), draw(3, 4, 7)
    torch.library.opcheck(OPS.capsule_run.default, (u, by_input, 3))
    sums = OPS.capsule_run(u, by_input, 3)[1]
    torch.library.opcheck(OPS.capsule_grad.default, (g, u, by_input, sums, False))
    votes = u.transpose(0, 1) if by_input else u
    torch.library.opcheck(OPS.capsule_fwd.default, (votes.requires_grad_(), 2, True))


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: OPS.capsule_run(draw(3, 4, 7), False, 3), r"predictions: expected \[N, I, J, D\]"),
        (lambda: OPS.capsule_run(draw(3, 0, 4, 7), False, 3), "expected capsules on either side"),
        (lambda: OPS.capsule_run(draw(3, 5, 4, 7), False, 0), "num_iterations: expected 1 or more, got 0"),
        (lambda: OPS.capsule_grad(draw(3, 4, 8), draw(3, 5, 4, 7), False, draw(3, 3, 4, 7), False), "grad: wrong shape"),
        (lambda: OPS.capsule_grad(draw(3, 4, 7), draw(3, 5, 4, 7), False, draw(3, 3, 4, 8), False), "sums: wrong shape"),
        (lambda: OPS.capsule_grad(draw(3, 4, 7), draw(3, 5, 4, 7), False, draw(3, 4, 7), False), r"sums: expected \[N, T, J, D\]"),
    ],
)
def test_the_torch_ops_check_for_themselves(call, match):
    with pytest.raises(RuntimeError, match=match):
        call()


def test_the_gradient_has_the_predictions_layout():
    for u in (draw(3, 5, 4, 7), draw(5, 3, 4, 7).transpose(0, 1)):
        leaf = u.detach().requires_grad_()
        (grad,) = torch.autograd.grad(pyops.capsule_routing(leaf, backend="cpu").sum(), leaf)
        assert grad.stride() == u.stride()


@pytest.mark.parametrize("N", [1, 3, 9])
def test_any_number_of_threads_gives_the_same_bits(N):
    """Samples that threads share, and samples of their own."""
    u, g = draw(N, 400, 6, 16).requires_grad_(), draw(N, 6, 16, seed=1)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            v = pyops.capsule_routing(u, backend="cpu")
            runs.append((v, *torch.autograd.grad(v, u, g)))
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_autocast_changes_nothing(backend):
    u = draw(2, 9, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = pyops.capsule_routing(u, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, pyops.capsule_routing(u, backend=backend))


def test_constant_couplings():
    """What the gradient of the last iteration's sum is, couplings given."""
    u = draw(2, 9, 4, 8).double().requires_grad_()
    v = pyops.capsule_routing(u, 2, backend="eager").detach()
    s = torch.einsum("nij,nijd->njd", (u * pyops.capsule_routing(u, 1)[:, None]).sum(-1).softmax(2).detach(), u)
    wanted = pyops.models.squash(s)
    torch.testing.assert_close(wanted, v)
    (grad,) = torch.autograd.grad(wanted.sum(), u)
    single = u.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(pyops.capsule_routing(single, 2, stop_gradient=True, backend="cpu").sum(), single)
    torch.testing.assert_close(found.double(), grad, rtol=1e-4, atol=1e-6)


def test_transforms_and_second_derivatives():
    u = draw(2, 3, 9, 4, 8)
    each = torch.stack([pyops.capsule_routing(part) for part in u])
    torch.testing.assert_close(torch.func.vmap(pyops.capsule_routing)(u), each)
    leaf = u[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(pyops.capsule_routing(leaf, backend="eager").sum(), leaf, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), leaf)[0].isfinite().all()
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        torch.autograd.grad(pyops.capsule_routing(leaf, backend="cpu").sum(), leaf, create_graph=True)


def test_what_a_gpu_does_not_take(monkeypatch):
    monkeypatch.setattr("pyops.ops._conv_call.unsupported", lambda *_: None)
    empty = lambda J, D: torch.empty(1, 2, J, D)  # noqa: E731
    assert _unsupported(empty(10, 16), 3, "cuda") is None and _unsupported(empty(10, 16), 3, "triton") is None
    assert "multiply to 4096 at most, these 129 and 17 to more" in _unsupported(empty(129, 17), 3, "triton")
    for J, D, T in ((257, 8, 1), (4, 33, 1), (200, 32, 3)):
        assert f"got {J}, {D} and {T} iterations" in _unsupported(empty(J, D), T, "cuda")
        assert _unsupported(empty(J, D), T, "cpu") is None
