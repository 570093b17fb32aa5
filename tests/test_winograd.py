"""The Winograd convolution: its error bound, every edge of a tile, the switch, who chooses it, and modules that keep its filters."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import pyops
from pyops import _library
from pyops.ops import _activations, _machine, _winograd_ops
from pyops.testing import poison, relative_error

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

BOUND = 5e-6  # of F(4x4, 3x3) in float32: relative L2 distance to float64
SMALL_TILE = 1.5  # of F(2x2, 3x3) in float32, in units of eager's own error: 1.34 was found at 400 channels, less elsewhere


def draw(N, C, H, W, O, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    image = rand(N, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    return image, rand(O, C, 3, 3) * (9 * C) ** -0.5, rand(O)


def infer(x, weight, bias, m, padding=(1, 1), activation="none", residual=None, residual_last=False, pool=0, upsample=0):
    points = torch.ops.pyops.winograd_pack(weight, m)
    options = (_activations.NAMES.index(activation), 0.01, residual_last, pool, upsample)
    return torch.ops.pyops.winograd_infer(x, points, bias, residual, weight.shape[0], *padding, *options)


def truth(x, weight, bias, padding=(1, 1), activation="none", residual=None, residual_last=False, pool=0, upsample=0):
    x = F.interpolate(x.double(), scale_factor=2, mode=(None, "nearest", "bilinear")[upsample]) if upsample else x
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 1, padding)
    y = y if residual is None or residual_last else y + residual.double()
    y = _activations.REFERENCE[activation](y, 0.01)
    y = y + residual.double() if residual is not None and residual_last else y
    return (None, F.max_pool2d, F.avg_pool2d)[pool](y, 2) if pool else y


SHAPES = (
    (1, 64, 28, 28, 64),
    (2, 3, 13, 9, 20),
    (3, 17, 5, 6, 37),
    (1, 256, 14, 14, 80),
    (1, 400, 7, 7, 33),
    (5, 16, 4, 3, 16),
    (1, 1, 1, 1, 1),
)


@pytest.mark.parametrize("m", [4, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_error(shape, m):
    draws = []
    for seed in range(12):
        x, weight, bias = draw(*shape, seed=seed)
        y64 = truth(x, weight, bias)
        poison(4 * y64.numel())
        draws.append((infer(x, weight, bias, m), y64, F.conv2d(x, weight, bias, 1, 1)))
        assert relative_error([draws[-1][:2]]) <= BOUND
    ours, eager = (relative_error((d[i], d[1]) for d in draws) for i in (0, 2))
    assert m == 4 or ours <= max(SMALL_TILE * eager, 2**-23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [4, 2])
def test_narrow_images_round_once(m, dtype):
    x, weight, bias = draw(2, 40, 11, 10, 50, dtype)
    y64 = truth(x, weight, bias)
    found, rounded = infer(x, weight, bias, m), y64.to(dtype)
    assert relative_error([(found, y64)]) <= 1.01 * relative_error([(rounded, y64)])


@pytest.mark.parametrize("m", [4, 2])
@pytest.mark.parametrize("size", range(1, 10))
def test_every_edge_of_a_tile(size, m):
    """Sizes and paddings of every remainder; what lies beyond an image is no part of it."""
    for padding in ((0, 1), (1, 0), (2, 1), (3, 3)):
        if min(size + 2 * padding[0], 7 + 2 * padding[1]) < 3:
            continue
        x, weight, bias = draw(2, 5, size, 7, 18, seed=size)
        assert relative_error([(infer(x, weight, bias, m, padding), truth(x, weight, bias, padding))]) <= BOUND


@pytest.mark.parametrize("m", [4, 2])
@pytest.mark.parametrize("activation", _activations.NAMES)
def test_epilogue(activation, m):
    x, weight, bias = draw(2, 20, 9, 10, 24)
    residual = torch.randn(2, 24, 9, 10).contiguous(memory_format=torch.channels_last)
    ways = (dict(residual=residual), dict(residual=residual, residual_last=True), {})
    for options in (*ways, *(dict(way, pool=1 + i % 2) for i, way in enumerate(ways))):
        found, y64 = (call(x, weight, bias, *n, activation=activation, **options) for call, n in ((infer, (m,)), (truth, ())))
        assert found.shape == y64.shape and found.is_contiguous(memory_format=torch.channels_last)
        assert relative_error([(found, y64)]) <= BOUND
    assert relative_error([(infer(x, weight, None, m), truth(x, weight, None))]) <= BOUND


@pytest.mark.parametrize("dtype, bound", [(torch.float32, BOUND), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("upsample", [1, 2], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("m", [4, 2])
def test_enlarged_input(m, upsample, dtype, bound):
    for (H, W), padding, pool in (((7, 9), (1, 1), 0), ((4, 3), (0, 2), 2), ((1, 2), (2, 1), 1), ((8, 16), (1, 0), 1), ((5, 5), (9, 7), 0)):
        x, weight, bias = draw(2, 20, H, W, 33, dtype)
        found, y64 = (call(x, weight, bias, *n, padding, pool=pool, upsample=upsample) for call, n in ((infer, (m,)), (truth, ())))
        assert found.shape == y64.shape and relative_error([(found, y64)]) <= bound


def test_enlarged_infinities_are_torchs():
    x, weight, bias = draw(1, 16, 5, 5, 16)
    weight = torch.zeros_like(weight)
    weight[:, :, 1, 1] = 1.0
    x[0, 3, 2, 2] = float("inf")
    found, y64 = infer(x, weight, bias, 2, upsample=2), truth(x, weight, bias, upsample=2)
    assert not found[y64.isfinite()].isposinf().any() and not found[y64.isposinf()].isfinite().any()


@pytest.mark.parametrize("m", [4, 2])
def test_into_a_slice(m):
    x, weight, bias = draw(2, 20, 7, 9, 18)
    wide = torch.full((2, 40, 7, 9), 7.0).contiguous(memory_format=torch.channels_last)
    points = torch.ops.pyops.winograd_pack(weight, m)
    torch.ops.pyops.winograd_into(wide[:, 11:29], x, points, bias, 1, 1, 1, 0.0)
    assert torch.equal(wide[:, 11:29], infer(x, weight, bias, m, activation="relu"))
    assert (wide[:, :11] == 7).all() and (wide[:, 29:] == 7).all()
    for out in (wide[:, :17], wide[:, :18, :6], torch.zeros(2, 18, 7, 9), wide[:, :18].double()):
        with pytest.raises(RuntimeError, match=r"out|bias"):
            torch.ops.pyops.winograd_into(out, x, points, bias, 1, 1, 1, 0.0)


def test_nan_stays_where_it_is():
    """A NaN reaches the 3x3 outputs around it, and some of the same tile; never another tile. Pooling keeps it."""
    x, weight, bias = draw(1, 16, 16, 16, 16)
    x[0, 3, 9, 9] = float("nan")
    bad = infer(x, weight, bias, 4).isnan().any(1)[0]
    assert bad[8:11, 8:11].all() and not bad[:8].any() and not bad[:, :8].any() and not bad[12:].any()
    assert infer(x, weight, bias, 4, pool=1).isnan().any(1)[0, 4:6, 4:6].all()


def test_same_bits_and_any_thread_count():
    x, weight, bias = draw(1, 64, 26, 25, 70)
    before = torch.get_num_threads()
    try:
        for m in (4, 2):
            torch.set_num_threads(2)
            expected = infer(x, weight, bias, m)
            assert torch.equal(expected, infer(x, weight, bias, m))
            for threads in (1, 3):
                torch.set_num_threads(threads)
                torch.testing.assert_close(infer(x, weight, bias, m), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_layouts():
    x, weight, bias = draw(2, 16, 12, 12, 16)
    expected = infer(x, weight, bias, 4)
    assert torch.equal(infer(x.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3), bias, 4), expected)
    assert infer(x[:0], weight, bias, 4).shape == (0, 16, 12, 12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    x, weight, bias = draw(2, 5, 6, 7, 18)
    torch.library.opcheck(torch.ops.pyops.winograd_pack.default, (weight, 4))
    points = torch.ops.pyops.winograd_pack(weight, 2)
    for pool, upsample in ((0, 0), (1, 0), (2, 2)):
        torch.library.opcheck(torch.ops.pyops.winograd_infer.default, (x, points, bias, None, 18, 1, 1, 1, 0.0, False, pool, upsample))
    torch.library.opcheck(
        torch.ops.pyops.winograd_into.default, (torch.zeros_like(infer(x, weight, bias, 2)), x, points, bias, 1, 1, 1, 0.0)
    )


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(points=torch.zeros(2, 36, 4, 16)), "packed: not from winograd_pack for 5 input and 18"),
        (dict(bias=torch.zeros(17)), "bias"),
        (dict(pad=-1), "padding: expected 0 or more"),
        (dict(activation=99), "activation: expected 0..9"),
        (dict(x=torch.zeros(2, 5, 1, 7), pad=0), "too small for a 3x3 filter"),
        (dict(residual=torch.zeros(2, 18, 6, 6)), "residual"),
        (dict(pool=3), "pool: expected 0, 1 or 2"),
    ],
)
def test_refusals(change, match):
    x, weight, bias = draw(2, 5, 6, 7, 18)
    given = dict(x=x, points=torch.ops.pyops.winograd_pack(weight, 4), bias=bias, residual=None, pad=1, activation=0, pool=False) | change
    with pytest.raises(RuntimeError, match=match):
        torch.ops.pyops.winograd_infer(
            given["x"], given["points"], given["bias"], given["residual"], 18, given["pad"], given["pad"], given["activation"], 0.0, False,
            given["pool"],
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- who chooses it


@pytest.fixture
def ieee():
    with torch.backends.flags(fp32_precision="ieee"):
        yield


LARGE = (1, 64, 56, 56, 64)


def test_chosen_where_it_is_faster():
    x, weight, bias = draw(*LARGE)
    assert "Winograd F(4x4, 3x3)" in str(pyops.explain("conv_bn_act", x, weight, bias, padding=1))
    found, y64 = pyops.conv_bn_act(x, weight, bias, padding=1), truth(x, weight, bias)
    assert torch.equal(found, infer(x, weight, bias, 4)) and relative_error([(found, y64)]) <= BOUND
    for options in (dict(stride=2), dict(dilation=2), dict(padding="valid", backend="vendor")):
        direct = pyops.conv_bn_act(x, weight, bias, **options)
        torch.testing.assert_close(direct, pyops.conv_bn_act(x, weight, bias, **options | dict(backend="eager")), rtol=1e-4, atol=1e-5)
    small = draw(1, 8, 6, 6, 8)
    assert "Winograd" not in str(pyops.explain("conv_bn_act", *small, padding=1))


def test_switch(ieee):
    x, weight, bias = draw(*LARGE)
    assert "Winograd" not in str(pyops.explain("conv_bn_act", x, weight, bias, padding=1))
    y64, found = truth(x, weight, bias), pyops.conv_bn_act(x, weight, bias, padding=1)
    assert relative_error([(found, y64)]) <= 1.25 * relative_error([(F.conv2d(x, weight, bias, 1, 1), y64)])


def test_gradients():
    """Forward and the input's gradient by Winograd, the filter's gradient direct."""
    x, weight, bias = draw(*LARGE)
    transposed = weight.transpose(0, 1).contiguous()
    for call, w in ((pyops.conv_bn_act, weight), (pyops.conv_transpose_bn_act, transposed)):
        results = []
        for kind, backend in ((torch.float32, "cpu"), (torch.float64, "eager")):
            inputs = [t.to(kind).clone().requires_grad_() for t in (x, w, bias)]
            y = call(*inputs, padding=1, backend=backend)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(kind)
            results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
        for found, expected in zip(*results, strict=True):
            assert relative_error([(found, expected)]) <= BOUND


def test_modules_remember_so_many_shapes():
    from pyops.ops._conv_run import MOST_PLANS

    block = pyops.nn.ConvBNAct(16, 16, 3).eval()
    with torch.no_grad():
        for size in range(5, 5 + 2 * MOST_PLANS):
            block(torch.randn(1, 16, size, 4))
    assert len(block.folded().kept["plans"]) <= MOST_PLANS


@pytest.mark.parametrize("mode", [None, "nearest", "bilinear"])
@pytest.mark.parametrize("pool", [None, torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2), torch.nn.MaxPool2d(3, 2, 1)], ids=str)
def test_blocks_around_the_convolution(mode, pool, monkeypatch):
    torch.manual_seed(0)
    options = dict(pool=pool)
    block = pyops.nn.ConvBNAct(64, 64, **options) if mode is None else pyops.nn.UpsampleConvBNAct(64, 64, mode=mode, **options)
    x = draw(1, 64, 28, 28, 64)[0]
    calls = []
    run = torch.ops.pyops.winograd_infer.default
    monkeypatch.setattr(torch.ops.pyops.winograd_infer, "default", lambda *args: calls.append(args) or run(*args))
    with torch.no_grad():
        found = block.eval()(x)
        expected = torch.nn.Sequential.forward(block.double(), x.double())
    assert found.shape == expected.shape and relative_error([(found, expected)]) <= BOUND
    assert len(calls) == 1 and calls[0][0].shape == x.shape  # nothing was enlarged before


def test_modules_keep_the_filters(monkeypatch):
    torch.manual_seed(0)
    block = pyops.nn.ConvBNAct(64, 64, 3).eval()
    x = draw(*LARGE)[0]
    packed = []
    pack = torch.ops.pyops.winograd_pack.default
    monkeypatch.setattr(torch.ops.pyops.winograd_pack, "default", lambda *args: packed.append(args) or pack(*args))

    def check(times):
        with torch.no_grad():
            found = block(x)
            expected = block.double()[1](block[0](x.double())).relu()
            block.float()
        assert len(packed) == times and relative_error([(found, expected)]) <= BOUND

    check(1)
    with torch.no_grad():
        block(x), block(x)
        assert len(packed) == 2  # .float() dropped them, and the second call found them
        block[0].weight.mul_(2.0)
    check(3)
    assert not any("kept" in name or "folded" in name for name in block.state_dict())


CODE = """
import runpy, sys
import torch
from pyops.testing import relative_error
globals().update(runpy.run_path(sys.argv[1]))
for m in (4, 2):
    for shape in SHAPES:
        x, weight, bias = draw(*shape)
        assert relative_error([(infer(x, weight, bias, m), truth(x, weight, bias))]) <= BOUND, (m, shape)
x, weight, bias = draw(2, 40, 11, 10, 50, torch.bfloat16)
assert relative_error([(infer(x, weight, bias, 4, pool=1), truth(x, weight, bias, pool=1))]) <= 4e-3
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)


def test_size_of_tile_is_none_of_other_convolutions():
    weight = torch.empty(64, 64, 3, 3, device="meta")
    size = lambda shape=(8, 64, 56, 56), w=weight, s=(1, 1), p=(1, 1), d=(1, 1), g=1: _winograd_ops.size_of_tile(shape, w, s, p, d, g, True)  # noqa: E731
    assert size() == 4
    assert size(s=(2, 1)) == size(d=(2, 2)) == size(g=2) == size(shape=(0, 64, 56, 56)) == size(shape=(8, 64, 1, 1), p=(0, 0)) == 0
    assert size(w=weight[:, :, :2]) == size(w=weight[:8]) == 0
    assert size(shape=(1, 64, 1, 1)) == 0  # one pixel: the points of the filters outweigh it


def test_tiles_are_smaller_where_reading_is_slow(monkeypatch):
    """14x14 positions of 256 channels: the larger tiles multiply less, and read 36 points of each filter in place of 16."""
    weight, chosen = torch.empty(256, 256, 3, 3, device="meta"), []
    for reading in (90.0, 20.0, 1.0):
        monkeypatch.setattr(_machine, "rates", lambda dtype, reading=reading: _machine.Rates(220.0, reading, reading))
        chosen.append(_winograd_ops.size_of_tile((1, 256, 14, 14), weight, (1, 1), (1, 1), (1, 1), 1, True))
    assert chosen == [4, 2, 0]


def test_rates_are_measured_once_and_only_where_one_may(monkeypatch):
    monkeypatch.setattr(_machine, "MEASURES", True)
    measured = _machine.rates(torch.float32)
    assert all(1 < rate < 1e6 for rate in measured) and _machine.rates(torch.float16) == measured  # 1 TB/s, 1 PFLOP/s: a clock gone wrong
    monkeypatch.setattr(_machine, "_best", None)  # would raise
    assert _machine.rates(torch.float32) == measured
    with FakeTensorMode():
        assert _machine.rates(torch.float32) == _machine.FIXED[torch.float32]
    torch.use_deterministic_algorithms(True)
    try:
        assert _machine.rates(torch.bfloat16) == _machine.FIXED[torch.bfloat16]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_fastest_call_counts(monkeypatch):
    clock = iter([0.0, *(t for start, end in ((0, 3), (3, 5), (5, 9), (9, 12), (12, 13)) for t in (start, end)), 13.0])
    monkeypatch.setattr(_machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls = []
    assert _machine._best(lambda: calls.append(0)) == 1.0 and len(calls) == 1 + _machine.FEWEST
