"""The fused MLP on a CPU against the layers it stands for; the GPU's is in tests/host_execution and tests/gpu."""

import pytest
import torch
import torch.nn.functional as F

from pyops import _library
from pyops.ops import _activations, _mlp_ops
from pyops.testing import poison, within_gate

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

EPS = 1e-6
SHAPES = ((100, 96, 384, 96), (7, 5, 13, 3), (1, 1, 1, 1), (49, 200, 300, 70), (50, 33, 70, 129), (97, 64, 64, 64))


def draw(M, C, H, O, dtype=torch.float32, seed=0, residual=True):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = (rand(M, C) * 1.5 + 0.3).to(dtype)
    weights = (rand(H, C) * C**-0.5).to(dtype), rand(H).to(dtype), (rand(O, H) * H**-0.5).to(dtype), rand(O).to(dtype)
    return x, weights, rand(M, O).to(dtype) if residual else None


def infer(x, weights, residual, norm=True, activation="gelu"):
    first, first_bias, second, second_bias = weights
    kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    packed = torch.ops.pyops.mlp_pack(first.to(kind), first_bias.float(), second.to(kind), second_bias.float())
    number = _activations.NAMES.index(activation)
    return torch.ops.pyops.mlp_infer(x, packed, residual, first.shape[0], second.shape[0], norm, EPS, number, 0.01)


def layers(x, weights, residual, norm=True, activation="gelu"):
    first, first_bias, second, second_bias = weights
    x = F.layer_norm(x, x.shape[1:], None, None, EPS) if norm else x
    y = F.linear(_activations.REFERENCE[activation](F.linear(x, first, first_bias), 0.01), second, second_bias)
    return y if residual is None else y + residual


def double(x, weights, residual):
    return x.double(), tuple(t.double() for t in weights), None if residual is None else residual.double()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_error(shape, dtype, norm):
    draws = []
    for seed in range(8):
        given = draw(*shape, dtype, seed, residual=seed % 2 == 0)
        truth = layers(*double(*given), norm)
        poison(truth.numel() * torch.finfo(dtype).bits // 8)
        draws.append((infer(*given, norm), truth, layers(*given, norm)))
    assert within_gate(draws, dtype) is None


@pytest.mark.parametrize("activation", _activations.NAMES)
def test_activations(activation):
    draws = []
    for seed in range(4):
        given = draw(20, 24, 40, 17, seed=seed)
        draws.append(
            (
                infer(*given, activation=activation),
                layers(*double(*given), activation=activation),
                layers(*given, activation=activation),
            )
        )
    assert within_gate(draws, torch.float32) is None


def test_same_bits_whatever_the_threads():
    given = draw(130, 48, 100, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = infer(*given)
        assert torch.equal(infer(*given), expected)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(infer(*given), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_no_rows_and_strided_rows():
    x, weights, residual = draw(12, 20, 30, 16)
    assert infer(x[:0], weights, residual[:0]).shape == (0, 16)
    assert torch.equal(infer(x[::2], weights, residual[::2]), infer(x[::2].contiguous(), weights, residual[::2].contiguous()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    x, (first, first_bias, second, second_bias), residual = draw(6, 5, 18, 4)
    packed = torch.ops.pyops.mlp_pack(first, first_bias, second, second_bias)
    torch.library.opcheck(torch.ops.pyops.mlp_infer.default, (x, packed, residual, 18, 4, True, EPS, 5, 0.0))
    torch.library.opcheck(torch.ops.pyops.mlp_run.default, (x, first, first_bias, second, second_bias, residual, True, EPS, 5, 0.0))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(packed=torch.zeros(7)), "packed: not from mlp_pack for these sizes"),
        (dict(hidden=19), "packed: not from mlp_pack for these sizes"),
        (dict(hidden=0), "hidden, outputs: expected 1 or more"),
        (dict(residual=torch.zeros(6, 5)), "residual"),
        (dict(x=torch.zeros(6, 5, 1)), r"input: expected a CPU tensor \[rows, inputs\]"),
        (dict(x=torch.zeros(6, 5).double()), "input: expected float32, bfloat16 or float16"),
        (dict(activation=77), "activation: expected 0..9"),
    ],
)
def test_refusals(change, match):
    x, (first, first_bias, second, second_bias), residual = draw(6, 5, 33, 4)
    packed = torch.ops.pyops.mlp_pack(first, first_bias, second, second_bias)
    given = dict(x=x, packed=packed, residual=residual, hidden=33, activation=5) | change
    with pytest.raises(RuntimeError, match=match):
        torch.ops.pyops.mlp_infer(given["x"], given["packed"], given["residual"], given["hidden"], 4, True, EPS, given["activation"], 0.0)
    with pytest.raises(RuntimeError, match="second: expected first's dtype"):
        torch.ops.pyops.mlp_pack(first, first_bias, second[:, :-1], second_bias)


def test_what_the_gpu_takes():
    most, switch = _mlp_ops.MOST, torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for precision, taken in (("tf32", True), ("ieee", False)):
            switch.fp32_precision = precision
            assert _mlp_ops.cuda_takes(most, most, torch.float32) is taken
            assert _mlp_ops.cuda_takes(most, 1, torch.bfloat16) and _mlp_ops.cuda_takes(1, most, torch.float16)
            assert not _mlp_ops.cuda_takes(most + 1, 8, torch.bfloat16) and not _mlp_ops.cuda_takes(8, most + 1, torch.bfloat16)
            assert not _mlp_ops.cuda_takes(8, 8, torch.float64)
    finally:
        switch.fp32_precision = before


CODE = """
import runpy, sys
import torch
from pyops.testing import relative_error
globals().update(runpy.run_path(sys.argv[1]))
for dtype, bound in ((torch.float32, 5e-7), (torch.bfloat16, 6e-3), (torch.float16, 6e-4)):
    for shape in SHAPES:
        given = draw(*shape, dtype)
        found = relative_error([(infer(*given), layers(*double(*given)))])
        assert found <= bound, (dtype, shape, found)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)
