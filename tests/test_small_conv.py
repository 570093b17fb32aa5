"""The convolution of small images: every edge of its tiles, its errors, who chooses it."""

import pytest
import torch
import torch.nn.functional as F

from pyops import _library
from pyops.nn.chain import ConvChain
from pyops.ops import _activations, _small_conv_ops
from pyops.testing import poison, relative_error

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

RUN = torch.ops.pyops.small_conv.default
SHAPES = (  # N, C, H, W, O, kernel, stride, padding
    (1, 1, 32, 32, 6, (5, 5), (1, 1), (0, 0)),
    (1, 6, 14, 14, 16, (5, 5), (1, 1), (0, 0)),
    (2, 3, 13, 9, 20, (3, 3), (2, 1), (1, 2)),
    (3, 17, 5, 7, 37, (1, 3), (1, 2), (0, 1)),
    (1, 150, 4, 4, 18, (3, 3), (1, 1), (1, 1)),
    (2, 40, 6, 5, 33, (1, 1), (2, 2), (0, 0)),
    (1, 1, 2, 2, 1, (2, 2), (1, 1), (1, 1)),
    (0, 3, 8, 8, 4, (3, 3), (1, 1), (1, 1)),
)


def draw(N, C, H, W, O, kernel, stride, padding, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    image = rand(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    return image, rand(O, C, *kernel) * (C * kernel[0] * kernel[1]) ** -0.5, rand(O), stride, padding


def infer(x, weight, bias, stride, padding, activation="none", pool=0):
    packed = _small_conv_ops.pack(weight)
    return RUN(x, packed, bias, len(weight), stride, padding, _activations.NAMES.index(activation), 0.01, pool)


def eager(x, weight, bias, stride, padding, activation="none", pool=0):
    y = F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)
    y = _activations.REFERENCE[activation](y, 0.01)
    return (None, F.max_pool2d, F.avg_pool2d)[pool](y, 2) if pool else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:5])))
def test_errors(shape, dtype):
    ours, theirs = [], []
    for seed in range(8):
        for pool in (0, 1, 2):
            x, *rest = draw(*shape, dtype, seed)
            truth = eager(x.double(), *rest, activation="relu", pool=pool)
            poison(truth.numel() * dtype.itemsize)
            y = infer(x, *rest, activation="relu", pool=pool)
            assert y.shape == truth.shape and y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            ours.append((y, truth))
            theirs.append((eager(x, *rest, activation="relu", pool=pool), truth))
    factor = 1.25 if dtype == torch.float32 else 2.0
    assert relative_error(ours) <= factor * relative_error(theirs) or shape[0] == 0


@pytest.mark.parametrize("activation", _activations.NAMES)
def test_activations_no_bias_and_layouts(activation):
    x, weight, _, stride, padding = draw(*SHAPES[2])
    y = infer(x, weight, None, stride, padding, activation)
    torch.testing.assert_close(y, eager(x, weight, None, stride, padding, activation), rtol=1e-5, atol=1e-5)
    assert torch.equal(infer(x.contiguous(), weight, None, stride, padding, activation), y)


def test_whole_numbers_are_exact_and_nan_stays():
    x, weight = torch.randint(-4, 5, (2, 9, 7, 6)).float(), torch.randint(-4, 5, (19, 9, 3, 3)).float()
    arguments = (weight, torch.arange(19.0), (1, 1), (1, 1))
    assert torch.equal(infer(x, *arguments), eager(x, *arguments))
    x[0, 3, 2, 2] = float("nan")
    for pool in (0, 1, 2):
        assert torch.equal(infer(x, *arguments, pool=pool).isnan(), eager(x, *arguments, pool=pool).isnan())


def test_opcheck_and_reference():
    x, weight, bias, stride, padding = draw(*SHAPES[2])
    packed = _small_conv_ops.pack(weight)
    arguments = (x, packed, bias, len(weight), list(stride), list(padding), 1, 0.01, 2)
    torch.library.opcheck(RUN, arguments)
    torch.testing.assert_close(_small_conv_ops._reference(*arguments), RUN(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(3, 3, 2, 32)}, r"weight: expected float32 \[KH, KW, 3, 32\]"),
        ({2: torch.zeros(19)}, "bias: wrong shape"),
        ({4: [0, 1]}, "stride: expected two, from 1"),
        ({5: [-1, 0]}, "padding: expected two, from 0"),
        ({0: torch.zeros(1, 3, 1, 1), 5: [0, 0]}, "input: too small"),
        ({0: torch.zeros(1, 3, 3, 3), 5: [0, 0]}, "pool: needs 2 rows"),
        ({8: 3}, "pool: expected 0, 1 or 2"),
    ],
)
def test_refusals(change, message):
    x, weight, bias, stride, padding = draw(*SHAPES[2])
    arguments = [x, _small_conv_ops.pack(weight), bias, len(weight), list(stride), list(padding), 1, 0.01, 2]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        RUN(*arguments)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pool", [None, torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(3, 1)], ids=str)
def test_chains_choose_it(pool, residual, monkeypatch):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Tanh(), *([] if pool is None else [pool])]
    chain = ConvChain(layers, 1 if residual else None).eval()
    x = torch.randn(2, 3, 9, 8)
    calls = []
    monkeypatch.setattr(torch.ops.pyops.small_conv, "default", lambda *args: calls.append(args) or RUN(*args))
    with torch.no_grad():
        y = chain(x, x if residual else None)
        expected = layers[1](layers[0](x) + (x if residual else 0))
        torch.testing.assert_close(y, expected if pool is None else pool(expected))
        assert len(calls) == 1
        big = torch.randn(1, 3, 300, 301)
        chain(big, big if residual else None)
        assert len(calls) == 1


CODE = """
import runpy, sys
import torch
globals().update(runpy.run_path(sys.argv[1]))
for shape in SHAPES[:-1]:
    for pool in (0, 1, 2):
        x, *rest = draw(*shape)
        assert relative_error([(infer(x, *rest, "relu", pool), eager(x.double(), *rest, "relu", pool))]) <= 1e-6, shape
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)
