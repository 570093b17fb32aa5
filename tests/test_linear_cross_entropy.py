"""Cross entropy of a linear layer: several chunks, bounded memory, the op of rows alone, targets out of range, who is chosen."""

import subprocess
import sys

import pytest
import torch

import pyops
from pyops import _library
from pyops.ops import _cross_entropy_ops, _cross_entropy_train, linear_cross_entropy
from pyops.testing.samples.cross_entropy import EVERYTHING, arguments

from .conftest import assert_gate, double
from .test_gradients import gradients

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))
SPEC = pyops.testing.SPECS["linear_cross_entropy"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks(dtype, reduction, monkeypatch):
    """Of 4 and 3 rows; the gradients by weight and bias are sums over them."""
    monkeypatch.setattr(_cross_entropy_train, "CHUNK_BYTES", 4 * 65 * dtype.itemsize)

    def draw(seed):
        args, kwargs = arguments((5, 7), 24, 65, dtype, "cpu", seed, reduction=reduction, **EVERYTHING)
        calls = ((args, kwargs, "cpu"), (double(args), double(kwargs), "eager"), (args, kwargs, "eager"))
        return [[SPEC.public(*a, **k, backend=b), *gradients(SPEC, a, k, b)] for a, k, b in calls]

    assert_gate(lambda seed: [results[:1] for results in draw(seed)], dtype)
    assert_gate(lambda seed: [results[1:] for results in draw(seed)], dtype, gradient=True)


def test_chunks_are_even_and_bounded():
    bound = _cross_entropy_train.CHUNK_BYTES
    for M, V, itemsize in ((4096, 50257, 4), (1000, 32000, 2), (7, 10, 4), (1, 10**8, 4), (0, 10, 4)):
        rows, most = _cross_entropy_train.chunk_rows(M, V, itemsize), max(1, bound // (V * itemsize))
        assert min(M, 1) <= rows <= min(M, most)
        assert M == 0 or -(-M // rows) == -(-M // most)  # no chunk more than the bound asks for


PEAK = r"""
import re, torch, pyops
from pyops.ops import _cross_entropy_train
M, C, V = 1024, 8, 20000  # logits: 78 MiB
_cross_entropy_train.CHUNK_BYTES = 4 << 20
def step(rows, backend, reduction):
    x, w = torch.randn(rows, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    pyops.linear_cross_entropy(x, w, torch.randint(V, (rows,)), reduction=reduction, backend=backend).sum().backward()
    with open('/proc/self/status') as status:  # getrusage would begin with what the parent held
        return int(re.search(r'VmHWM:\s+(\d+)', status.read())[1]) >> 10
start = step(16, "cpu", "mean")
for backend, reduction in (("cpu", "mean"), ("cpu", "none"), ("eager", "mean")):
    print(step(M, backend, reduction) - start)
"""


def test_peak_memory_is_a_chunks():
    """Of a training step beyond what a step of few rows takes, MiB: the chunk; PyTorch's takes the logits and their gradient."""
    child = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    mean, none, eager = map(int, child.stdout.split())
    assert mean <= none < 30 and eager > 150


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 3, 16, 64, 77, 300])
def test_rows(V, dtype):
    """The op itself against its reference: ignored rows, targets out of range, strange logits; without scale nothing is written."""

    def draw(seed, softcap=2.0):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(7, V, generator=generator) * 3).to(dtype)
        target, scale = torch.randint(V, (7,), generator=generator), torch.rand(7, generator=generator)
        target[1], target[2], target[3] = -5, V, -1
        logits[4, 0] = float("inf")
        results = []
        for kind, run in ((None, torch.ops.pyops.cross_entropy_rows_), (torch.float64, _cross_entropy_ops._reference), (None, _reference)):
            z, s = (logits.clone(), scale) if kind is None else (logits.to(kind), scale.to(kind))
            kept = z.clone()
            losses = run(z, target, None, -5, 0.1, softcap)
            assert torch.equal(z, kept) and torch.equal(losses.nan_to_num(9.0), run(z, target, s, -5, 0.1, softcap).nan_to_num(9.0))
            assert losses[1] == 0 and not z[1].any() and losses[2:4].isnan().all() and z[2:4].isnan().all()
            results.append((losses, z))
        return results

    for index in (0, 1):
        assert_gate(lambda seed, index=index: [[result[index]] for result in draw(seed)], dtype if index else torch.float32, bool(index))


def _reference(*args):
    return _cross_entropy_ops._reference(*args)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
def test_opcheck():
    (x, w, target, b), _ = arguments((6,), 20, 17, torch.float32, "cpu", bias=True)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    for reduction in range(3):
        options = (-100, 0.1, 2.0, reduction, [True, True, True])
        torch.library.opcheck(torch.ops.pyops.linear_cross_entropy_fwd.default, (x, w, target, b, *options))
        grad = torch.ones(6 if reduction == 0 else ())
        plain = [t.detach() for t in (x, w)] + [target, b.detach()]
        torch.library.opcheck(torch.ops.pyops.linear_cross_entropy_bwd.default, (grad, *plain, *options))
    logits, scale = torch.randn(6, 17), torch.rand(6)
    torch.library.opcheck(torch.ops.pyops.cross_entropy_rows_.default, (logits, target, scale, -100, 0.1, 2.0))


@pytest.mark.parametrize("wrong", [-1, 17])
def test_target_out_of_range(wrong):
    (x, w, target, _), _ = arguments((6,), 20, 17, torch.float32, "cpu")
    target[3] = wrong
    with pytest.raises(IndexError, match=rf"target: expected 0 to 16 or ignore_index -100, got {wrong}"):
        pyops.linear_cross_entropy(x, w, target, backend="cpu")
    assert pyops.linear_cross_entropy(x, w, target, ignore_index=wrong, backend="cpu").isfinite()


def test_second_backward_and_factors():
    """The gradients formed ahead are multiplied, not used up; those of gradients there are none."""
    (x, w, target, _), _ = arguments((6,), 20, 17, torch.float32, "cpu")
    w.requires_grad_()
    loss = pyops.linear_cross_entropy(x, w, target, backend="cpu")
    (once,) = torch.autograd.grad(loss, w, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, w, retain_graph=True)
    assert torch.equal(thrice, 3 * once)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        torch.autograd.grad(loss, w, create_graph=True)


def test_small_float16_gradients_are_kept():
    """A loss scaled as float16 training scales it: the factor comes before the rounding."""
    (x, w, target, _), _ = arguments((64,), 16, 200, torch.float16, "cpu")
    grads = []
    for backend in ("cpu", "eager"):
        leaf = x.clone().requires_grad_()
        (pyops.linear_cross_entropy(leaf, w * 0.1, target, backend=backend) * 2.0**-12).backward(torch.tensor(2.0**20))
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-3)


def test_autocast():
    (x, w, target, b), _ = arguments((2, 6), 20, 17, torch.float32, "cpu", bias=True)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (pyops.linear_cross_entropy(x, w, target, b, backend=backend) for backend in ("cpu", "eager"))
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_choice():
    def chosen(M, V, **options):
        x, w, target = torch.zeros(M, 8, requires_grad=True), torch.zeros(V, 8), torch.zeros(M, dtype=torch.int64)
        return pyops.explain("linear_cross_entropy", x, w, target, **options).chosen

    assert chosen(4, 100) == "eager" and chosen(1024, 1000) == "cpu"
    assert chosen(1024, 1000, reduction="none") == "eager" and chosen(1024, 100000, reduction="none") == "cpu"
    x, w, target = torch.randn(1024, 8), torch.randn(1000, 8), torch.zeros(1024, dtype=torch.int64)
    _, tangent = torch.func.jvp(lambda x: linear_cross_entropy.linear_cross_entropy(x, w, target), (x,), (x,))  # PyTorch's ops know how
    assert tangent.isfinite()
