"""gaussian_sample: its random numbers, what it is differentiated by, and its torch ops."""

import math

import pytest
import torch

import pyops
from pyops import _library
from pyops.ops import _philox, _sampling_ops
from pyops.testing.samples.sampling import gaussian_arguments

from .conftest import assert_gate, double

BACKENDS = ["eager", pytest.param("cpu", marks=pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason())))]
WORD = 2**32


def philox(seed: int, counter: list[int]) -> list[int]:
    """Salmon et al.'s algorithm with Python's integers."""
    key = [seed % WORD, seed // WORD % WORD]
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [second // WORD ^ counter[1] ^ key[0], second % WORD, first // WORD ^ counter[3] ^ key[1], first % WORD]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def eps(rows: int, columns: int, **options) -> torch.Tensor:
    """Of zeros, z is eps."""
    zeros = torch.zeros(rows, columns)
    return pyops.gaussian_sample(zeros, zeros, **options)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_box_mullers_of_philoxs(backend):
    seed, found = 0x123456789ABCDEF0, eps(3, 10, seed=0x123456789ABCDEF0, backend=backend)
    for row in range(3):
        for column in range(10):
            words = philox(seed, [column // 4, row, 0, 0xFFFFFFFF])
            first, second = words[column % 4 // 2 * 2 :][:2]
            angle, radius = 2 * math.pi * second / WORD, math.sqrt(-2 * math.log((first + 0.5) / WORD))
            assert found[row, column].item() == pytest.approx(radius * (math.sin if column % 2 else math.cos)(angle), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_normal(backend):
    x = eps(2000, 500, seed=11, backend=backend).double()
    count = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / count), power
    for bound in (-3.5, -1.0, 0.25, 2.0):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert abs((x < bound).double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / count), bound
    others = {"columns": (x[:, :-1], x[:, 1:]), "four columns": (x[:, :-4], x[:, 4:]), "rows": (x[:-1], x[1:])}
    for name, (a, b) in others.items():
        assert abs((a * b).mean().item()) < 4 / math.sqrt(a.numel()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_depend_on_seed_and_place_alone(backend):
    whole = eps(9, 50, seed=5, backend=backend)
    assert torch.equal(eps(4, 50, seed=5, backend=backend), whole[:4]) and torch.equal(eps(9, 23, seed=5, backend=backend), whole[:, :23])
    assert torch.equal(eps(9, 50, seed=torch.tensor([5]), backend=backend), whole)
    for seed in (6, 5 + 2**32, -5):
        assert (eps(9, 50, seed=seed, backend=backend) != whole).float().mean() > 0.99
    zeros = torch.zeros(9, 50, dtype=torch.bfloat16)
    torch.testing.assert_close(pyops.gaussian_sample(zeros, zeros, seed=5, backend=backend)[0], whole.bfloat16(), rtol=2**-7, atol=1e-6)


def test_where_the_seed_comes_from():
    def draws(*generators):
        return [eps(2, 6, generator=generator) for generator in generators]

    torch.manual_seed(3)
    first = draws(None, None)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(None, None), strict=True)) and not torch.equal(*first)
    own = [torch.Generator().manual_seed(1) for _ in range(2)]
    state = torch.random.get_rng_state()
    assert torch.equal(*draws(*own)) and torch.equal(torch.random.get_rng_state(), state)


def test_one_seed_may_serve_attention_as_well():
    """Dropout of row, head and sequence 0 reads none of the first row's words."""
    kept = _philox.keep(torch.tensor([5]), 0.5, 1, 1, 64, 64)[0, 0].double() * 2 - 1
    assert abs((kept * eps(64, 64, seed=5).double().sign()).mean().item()) < 4 / 64


def test_a_small_divergence_keeps_its_digits():
    log_var = torch.full((1, 8), 1e-3)
    kl = pyops.gaussian_sample(torch.zeros(1, 8), log_var)[1]
    v = log_var[0, 0].double().item()
    assert kl.item() == pytest.approx(4 * (math.expm1(v) - v), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    """Infinite and enormous log-variances, NaN: as the formula has it."""
    log_var = torch.tensor([[-math.inf, -250.0, -160.0, 80.0, 100.0, 170.0, math.nan, 0.0]])
    mean = torch.arange(8.0)[None]
    z, kl = pyops.gaussian_sample(mean, log_var, seed=2, backend=backend)
    e = eps(1, 8, seed=2, backend=backend)
    torch.testing.assert_close(z, mean + (log_var / 2).exp() * e, rtol=1e-5, atol=0.0, equal_nan=True)
    assert z[0, 0] == 0 and z[0, 1] == 1 and z[0, 6].isnan() and kl.isnan().all()
    assert pyops.gaussian_sample(mean[:, :2], log_var[:, :2], backend=backend)[1].isposinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["z", "kl"])
def test_gradients_of_one_result(backend, of):
    def grads(dtype, backend, seed):
        (mean, log_var), options = gaussian_arguments((5, 39), dtype, "cpu", seed)
        live = [t.requires_grad_() for t in (mean, log_var)]
        result = pyops.gaussian_sample(*live, **options, backend=backend)[of == "kl"]
        return torch.autograd.grad((result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)).sum(), live)

    kinds = ((torch.float32, backend), (torch.float64, "eager"), (torch.float32, "eager"))
    assert_gate(lambda seed: [grads(dtype, name, seed) for dtype, name in kinds], torch.float32, gradient=True)


def test_nothing_but_the_seed_is_saved():
    (mean, log_var), _ = gaussian_arguments((3, 8), torch.float32, "cpu")
    live, saved = [t.requires_grad_() for t in (mean, log_var)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyops.gaussian_sample(*live, backend="cpu")
    assert [t.numel() for t in saved] == [24, 24, 1]
    assert [t.data_ptr() for t in saved[:2]] == [t.data_ptr() for t in live]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
def test_opcheck():
    (mean, log_var), _ = gaussian_arguments((6, 24), torch.float32, "cpu", layout="halves")
    seed = torch.tensor([7])
    live = [t.detach().requires_grad_() for t in (mean, log_var)]
    torch.library.opcheck(torch.ops.pyops.gaussian_run.default, (mean, log_var, seed))
    torch.library.opcheck(torch.ops.pyops.gaussian_fwd.default, (*live, seed))
    for op in (torch.ops.pyops.gaussian_grad.default, torch.ops.pyops.gaussian_bwd.default):
        for grads in ((torch.ones_like(mean), torch.ones(6)), (None, torch.ones(6)), (torch.ones_like(mean), None)):
            torch.library.opcheck(op, (mean, log_var, seed, *grads))


def test_a_seed_is_drawn_within_a_compiled_graph():
    torch._dynamo.reset()
    compiled = torch.compile(pyops.gaussian_sample, fullgraph=True, backend="aot_eager")
    (mean, log_var), _ = gaussian_arguments((3, 8), torch.float32, "cpu")
    torch.manual_seed(3)
    first = [compiled(mean, log_var)[0] for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(first[0], pyops.gaussian_sample(mean, log_var)[0]) and not torch.equal(*first)


def test_batches_of_functions_go_through_torchs_ops():
    (mean, log_var), options = gaussian_arguments((3, 8), torch.float32, "cpu")
    of = lambda m, v: pyops.gaussian_sample(m, v, **options)[1].sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(of)(mean, log_var), mean)


@pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))
@pytest.mark.parametrize(
    "change, match",
    [
        (dict(mean=torch.zeros(2, 3, 4)), r"mean: expected \[N, D\]"),
        (dict(mean=torch.zeros(2, 8).double()), "mean: expected float32, bfloat16 or float16"),
        (dict(log_var=torch.zeros(2, 7)), "log_var: wrong shape"),
        (dict(log_var=torch.zeros(2, 8).bfloat16()), "log_var: dtype differs"),
        (dict(seed=torch.zeros(2).long()), "seed: expected one int64"),
        (dict(seed=torch.zeros(1)), "seed: expected one int64"),
        (dict(grad=torch.zeros(2, 7)), "grad: wrong shape"),
        (dict(grad_kl=torch.zeros(3)), "grad_kl: wrong shape"),
        (dict(grad_kl=torch.zeros(2).bfloat16()), "grad_kl: expected float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_direct_call_is_checked(change, match):
    call = dict(mean=torch.zeros(2, 8), log_var=torch.zeros(2, 8), seed=torch.tensor([1]), grad=torch.zeros(2, 8), grad_kl=torch.zeros(2))
    with pytest.raises(RuntimeError, match=match):
        torch.ops.pyops.gaussian_grad(*(call | change).values())


@pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))
@pytest.mark.parametrize("columns", [4095, 4096, 4097, 12_300])
def test_rows_of_several_segments(columns):
    def draw(seed):
        (mean, log_var), options = gaussian_arguments((3, columns), torch.float32, "cpu", seed)
        number = torch.tensor([options["seed"]])
        truth = _sampling_ops._run(*double((mean, log_var)), number)
        return torch.ops.pyops.gaussian_run(mean, log_var, number), truth, _sampling_ops._run(mean, log_var, number)

    assert_gate(draw, torch.float32)
