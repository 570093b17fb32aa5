"""Window attention's kernels against their reference in float64, in every dtype and combination, what they promise at the edges, and
torchvision's `shifted_window_attention`."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pyops import _library
from pyops.ops import _window_attention_ops as contract
from pyops.ops.window_attention import window_attention
from pyops.testing import relative_error, within_gate

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

OPS = torch.ops.pyops
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("output", "lse", "grad_qkv", "grad_qkv_bias", "grad_table", "grad_logit_scale")


def draw(B, H, W, heads, D, window, shift=(0, 0), *, cosine=False, table=True, bias=True, dropout=0.0, dtype=torch.float32, seed=0):
    """(arguments of window_attention_into, grad)"""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    C = heads * D
    qkv, grad = rand(B, H, W, 3 * C).to(dtype), rand(B, H, W, C).to(dtype)
    vectors = (rand(3 * C), rand((2 * window[0] - 1) * (2 * window[1] - 1), heads), (rand(heads) * 0.5 + 2).exp())
    wanted = (t if want else None for t, want in zip(vectors, (bias, table, cosine), strict=True))
    drawn = torch.tensor([-123456789012345]) if dropout else None
    return (qkv, *wanted, drawn, heads, list(window), list(shift), 1 / math.sqrt(D), dropout), grad


def empty_results(arguments, grad):
    """NaN everywhere: what a kernel forgets to write shows."""
    qkv, bias, table, logits, _, heads, window, shift = arguments[:8]
    windows = contract.Windows.of(qkv.shape[1:3], window, shift)
    lse = torch.empty(qkv.shape[0] * windows.total, heads, windows.tokens)
    return [t if t is None else torch.full_like(t, math.nan) for t in (grad, lse, qkv, bias, table, logits)]


def run(arguments, grad):
    """Everything the two ops write, in the order of NAMES."""
    results = empty_results(arguments, grad)
    OPS.window_attention_into(*arguments, *results[:2])
    OPS.window_attention_grad_into(grad, *arguments[:5], results[1], *arguments[5:], *results[2:])
    return results


def eager(arguments, grad):
    return (*contract.forward(*arguments), *contract.backward(grad, *arguments))


def truth(arguments, grad):
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    if wide[1] is not None:  # what stands beyond the map is of qkv's dtype
        wide[1] = arguments[1].to(arguments[0].dtype).double()
    return eager(wide, grad.double())


def missed(calls):
    """What of NAMES misses the gate of gradients over all the calls together, and by how much."""
    each = [list(zip(run(*call), truth(*call), eager(*call), strict=True)) for call in calls]
    found = {name: list(draws) for name, draws in zip(NAMES, zip(*each, strict=True), strict=True) if draws[0][0] is not None}
    reasons = {name: within_gate(draws, calls[0][1].dtype, gradient=True) for name, draws in found.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def assert_close(*shape, **options):
    if missed([draw(*shape, **options)]):  # it may be unlucky: then many draws decide
        assert not missed([draw(*shape, **options, seed=seed) for seed in range(12)])


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("cosine, table, bias", list(itertools.product((False, True), repeat=3)))
def test_combinations(cosine, table, bias, shift):
    for size, dropout in itertools.product(((10, 8), (11, 6)), (0.0, 0.3)):
        assert_close(2, *size, 2, 16, (5, 4), shift, cosine=cosine, table=table, bias=bias, dropout=dropout)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("cosine, dropout", [(False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3)])
def test_narrow_types(cosine, dropout, dtype):
    assert_close(2, 11, 6, 2, 16, (5, 4), (2, 1), cosine=cosine, dropout=dropout, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 7, 17, 33, 48, 100, 256])
def test_head_sizes(D, dtype):
    for cosine in (False, True):
        assert_close(1, 7, 9, 2, D, (3, 5), (1, 2), cosine=cosine and D > 1, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(1, 1), (1, 2), (3, 1), (1, 17), (7, 7), (8, 8), (5, 13), (9, 15), (12, 16), (24, 24)])
def test_windows(window, dtype):
    """From one token to more than a table spread out for all heads takes."""
    shift = [side // 2 for side in window]
    dropout = 0.2 if window == (5, 13) else 0.0
    size = [2 * side - side // 3 for side in window]
    assert_close(1, *size, 7, 8, window, shift, dropout=dropout, dtype=dtype)
    assert_close(1, *window, 1, 8, window, cosine=True, dtype=dtype)


def test_window_larger_than_the_map():
    for dtype in DTYPES:
        for shift in ((0, 0), (3, 2)):
            assert_close(2, 3, 4, 2, 8, (7, 6), shift, dtype=dtype)


def test_large_scores_and_zero_rows():
    arguments, grad = draw(1, 8, 8, 2, 16, (4, 4), (2, 2))
    for factor in (1e-4, 30.0):
        assert not missed([((arguments[0] * factor, *arguments[1:]), grad)])
    arguments, grad = draw(1, 8, 8, 2, 16, (4, 4), (2, 2), cosine=True)
    arguments[0][0, 2, 3] = 0.0
    arguments[0][0, 5, 5] *= 1e-15  # below the least norm
    assert all(t.isfinite().all() for t in run(arguments, grad))
    assert not missed([(arguments, grad)])


def test_dropout_keeps_its_share():
    arguments, grad = draw(4, 32, 32, 2, 8, (8, 8), dropout=0.25)
    qkv = arguments[0]
    qkv[..., :32] = 0.0  # the same weight for all keys
    qkv[..., 32:] = 1.0
    output = run((qkv, None, None, *arguments[3:]), grad)[0]
    assert abs(output.mean().item() - 1) < 5e-3 and output.std().item() > 0.01


def test_tokens_beyond_the_map():
    """A padded call is the call on the padded map whose last tokens are the bias, and those have no gradient of an output."""
    for cosine in (False, True):
        arguments, grad = draw(2, 10, 9, 3, 8, (4, 5), (1, 2), cosine=cosine)
        windows = contract.Windows.of((10, 9), (4, 5), (1, 2))
        output, _, grad_qkv, grad_bias, *sums = run(arguments, grad)
        padded = F.pad(grad, (0, 0, 0, windows.padded[1] - 9, 0, windows.padded[0] - 10))
        whole = run((contract.pad(arguments[0], arguments[1], windows), None, *arguments[2:]), padded)
        crop = lambda t: t[:, :10, :9]  # noqa: E731
        assert torch.equal(crop(whole[0]), output) and torch.equal(crop(whole[2]), grad_qkv)
        beyond = whole[2].double().masked_fill(contract.inside(windows, "cpu"), 0.0).sum((0, 1, 2))
        assert relative_error([(grad_bias, beyond)]) <= 1e-6
        assert (grad_bias[:24] == 0).all()
        assert all(a is None or torch.equal(a, b) for a, b in zip(sums, whole[4:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    calls = [
        draw(9, 20, 18, 3, 16, (7, 7), (3, 3), dtype=dtype),
        draw(2, 17, 30, 5, 8, (9, 15), (4, 0), cosine=True, dropout=0.1, dtype=dtype),
    ]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append([t for call in calls for t in run(*call) if t is not None])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_only_what_is_asked_for():
    arguments, grad = draw(2, 11, 9, 2, 8, (4, 4), (2, 1), cosine=True)
    full = run(arguments, grad)
    for kept in itertools.product((False, True), repeat=3):
        found = empty_results(arguments, grad)[2:]
        found[1:] = [t if keep else None for t, keep in zip(found[1:], kept, strict=True)]
        OPS.window_attention_grad_into(grad, *arguments[:5], full[1], *arguments[5:], *found)
        assert all(t is None or torch.equal(t, expected) for t, expected in zip(found, full[2:], strict=True))


def test_no_images_and_other_layouts():
    arguments, grad = draw(0, 8, 8, 2, 8, (4, 4), cosine=True)
    found = run(arguments, grad)
    assert all((t == 0).all() for t in found[3:])
    arguments, grad = draw(2, 8, 9, 2, 8, (4, 4), (1, 1))
    expected = run(arguments, grad)
    turned = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    results = empty_results(arguments, grad)
    OPS.window_attention_into(turned(arguments[0]), *arguments[1:], *results[:2])
    OPS.window_attention_grad_into(turned(grad), turned(arguments[0]), *arguments[1:5], results[1], *arguments[5:], *results[2:])
    assert all(a is None or torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("cosine, dropout", [(False, 0.0), (True, 0.2)])
def test_opcheck(cosine, dropout):
    arguments, grad = draw(1, 7, 8, 2, 8, (4, 4), (2, 1), cosine=cosine, dropout=dropout)
    results = empty_results(arguments, grad)
    torch.library.opcheck(OPS.window_attention_into.default, (*arguments, *results[:2]))
    results = run(arguments, grad)
    torch.library.opcheck(OPS.window_attention_grad_into.default, (grad, *arguments[:5], results[1], *arguments[5:], *results[2:]))
    live = tuple(t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments)
    torch.library.opcheck(OPS.window_attention_fwd.default, live)
    torch.library.opcheck(OPS.window_attention_bwd.default, (grad, *arguments[:5], results[1], *arguments[5:], [True, True, cosine]))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(qkv=torch.zeros(8, 8, 48)), r"qkv: expected \[B, H, W, 3C\]"),
        (dict(qkv=torch.zeros(1, 8, 8, 48).double()), "qkv: expected float32, bfloat16 or float16"),
        (dict(heads=5), "heads: expected qkv's channels to be a multiple of 3 \\* heads"),
        (dict(heads=0), "heads"),
        (dict(window=[4]), "window, shift: expected two numbers each"),
        (dict(window=[0, 4]), "window: expected 1 to 65536, got 0"),
        (dict(window=[4, 2**40]), "window: expected 1 to 65536"),
        (dict(shift=[4, 0]), "shift: expected 0 or more and less than the window, got 4"),
        (dict(shift=[0, -1]), "shift: expected 0 or more and less than the window, got -1"),
        (dict(bias=torch.zeros(47)), "qkv_bias: wrong shape"),
        (dict(bias=torch.zeros(48).double()), "qkv_bias: expected float32"),
        (dict(table=torch.zeros(48, 2)), "table: wrong shape"),
        (dict(logits=torch.zeros(3)), "logit_scale: wrong shape"),
        (dict(dropout=0.5), "seed: expected one int64"),
        (dict(dropout=0.5, seed=torch.zeros(1)), "seed: expected one int64"),
        (dict(dropout=1.0), "dropout_p: expected 0 to 1, and less than 1"),
        (dict(output=torch.zeros(1, 8, 8, 48)), "output: wrong shape"),
        (dict(output=torch.zeros(1, 8, 16, 8).transpose(2, 3)), "output: expected a contiguous tensor"),
        (dict(output=torch.zeros(1, 8, 8, 16).bfloat16()), "output: dtype differs"),
        (dict(lse=torch.zeros(4, 2, 15)), "lse: wrong shape"),
        (dict(lse=torch.zeros(4, 16, 2).transpose(1, 2)), "lse: expected a contiguous tensor"),
        (dict(grad=torch.zeros(1, 8, 8, 15)), "grad: wrong shape"),
        (dict(grad_qkv=torch.zeros(1, 8, 8, 16)), "grad_qkv: wrong shape"),
        (dict(grad_bias=torch.zeros(16)), "grad_qkv_bias: wrong shape"),
        (dict(grad_table=torch.zeros(2, 49).t()), "grad_table: expected a contiguous tensor"),
        (dict(grad_logits=torch.zeros(2)), "grad_logit_scale: expected logit_scale with it"),
        (dict(qkv=torch.zeros(1, 8, 8, 3 * 2 * 257), bias=None), "qkv: expected heads of 256 or less, got 257"),
    ],
)
def test_refusals(change, match):
    zeros = torch.zeros
    given = dict(
        qkv=zeros(1, 8, 8, 48), bias=zeros(48), table=zeros(49, 2), logits=None, seed=None, heads=2, window=[4, 4], shift=[1, 1],
        dropout=0.0, output=zeros(1, 8, 8, 16), lse=zeros(4, 2, 16), grad=zeros(1, 8, 8, 16), grad_qkv=zeros(1, 8, 8, 48),
        grad_bias=zeros(48), grad_table=zeros(49, 2), grad_logits=None,
    ) | change  # fmt: skip
    g = type("Given", (), given)
    tensors, options = (g.qkv, g.bias, g.table, g.logits, g.seed), (g.heads, g.window, g.shift, 1.0, g.dropout)
    with pytest.raises(RuntimeError, match=match):
        OPS.window_attention_into(*tensors, *options, g.output, g.lse)
        OPS.window_attention_grad_into(g.grad, *tensors, g.lse, *options, g.grad_qkv, g.grad_bias, g.grad_table, g.grad_logits)


CODE = """
import runpy, sys
import torch
globals().update(runpy.run_path(sys.argv[1]))
for dtype in DTYPES:
    for cosine, dropout in ((False, 0.0), (True, 0.0), (True, 0.3)):
        assert_close(2, 11, 13, 3, 20, (5, 4), (2, 1), cosine=cosine, dropout=dropout, dtype=dtype)
        assert_close(1, 10, 12, 2, 33, (9, 8), (4, 4), cosine=cosine, dropout=dropout, dtype=dtype)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size, window, shift", [((14, 14), 7, 3), ((14, 14), 7, 0), ((12, 17), 5, 2), ((5, 6), 7, 3), ((4, 15), 6, 3)])
def test_as_torchvision(version, size, window, shift):
    """Its whole layer in float64 against linear layers around ours, gradients of everything learnt included."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    heads, C, sides = 3, 24, [window, window]
    index = contract.relative_index((window, window), "cpu").flatten()

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        drawn = [rand(2, *size, C), rand(3 * C, C) / 3, rand(C, C) / 3, rand((2 * window - 1) ** 2, heads), rand(3 * C), rand(C)]
        return rand(2, *size, C), drawn + [rand(heads, 1, 1) + 4] * (version == 2)  # on both sides of the clamp

    def theirs(x, weight, proj, table, bias, proj_bias, logits=None):
        spread = swin._get_relative_position_bias(table, index, sides)
        return swin.shifted_window_attention(
            x, weight, proj, spread, sides, heads, [shift, shift], qkv_bias=bias, proj_bias=proj_bias, logit_scale=logits
        )

    def ours(x, weight, proj, table, bias, proj_bias, logits=None):
        if logits is not None:  # its keys have no bias
            bias = bias * torch.ones(3 * C).index_fill(0, torch.arange(C, 2 * C), 0.0)
        y = window_attention(F.linear(x, weight, bias), heads, window, shift, table, bias, logit_scale=logits, backend="cpu")
        return F.linear(y, proj, proj_bias)

    def results(layer, dtype, seed):
        grad, drawn = inputs(seed)
        drawn = [t.to(dtype).requires_grad_() for t in drawn]
        y = layer(*drawn)
        return [y, *torch.autograd.grad(y, drawn, grad.to(dtype))]

    calls = ((ours, torch.float32), (theirs, torch.float64), (theirs, torch.float32))
    each = [list(zip(*(results(*call, seed) for call in calls), strict=True)) for seed in range(4)]
    for draws in zip(*each, strict=True):
        assert within_gate(list(draws), torch.float32, gradient=True) is None
