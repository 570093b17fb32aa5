"""Attention's ops against their float64 reference: every bias and its gradient, dropout, spans, cuts of the work, and what they refuse."""

import itertools

import pytest
import torch

import pyops
from pyops import _library
from pyops.ops import _attention_reference as reference
from pyops.ops import _philox
from pyops.testing import poison, relative_error, within_gate

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))

OPS = torch.ops.pyops
KINDS = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
every_kind = pytest.mark.parametrize("dtype", KINDS, ids=["float32", "bfloat16", "float16"])


def draw(B=2, H=4, N=45, D=24, M=70, G=2, dtype=torch.float32, **change):
    """The arguments of `attention_into` up to the outputs, by name."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    given = dict(
        query=rand(B, H, N, D), key=rand(B, G, M, D), value=rand(B, G, M, D), bias=None, slopes=None, spans=None, seed=None,
        scale=D**-0.5, left=-1, right=-1, softcap=0.0, dropout_p=0.0,
    )  # fmt: skip
    return given | change


def empty(query, *_, **__):
    poison(query.numel() * query.element_size(), query.numel() // query.shape[3] * 4)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def forward(call):
    output, lse = empty(**call)
    OPS.attention_into(*call.values(), output, lse)
    return output, lse


def backward(call, grad, grad_lse, found, needs_bias=False):
    tensors, options = list(call.values())[:7], list(call.values())[7:]
    grads = [torch.full_like(t, float("nan")) for t in tensors[:3]]
    grads.append(torch.full(call["bias"].shape, float("nan")) if needs_bias else None)
    OPS.attention_grad_into(grad, grad_lse, *tensors, *found, *options, *grads)
    return [g for g in grads if g is not None]


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def expected_of(call, grad, grad_lse, needs_bias=False):
    tensors, options = [wide(t) for t in list(call.values())[:7]], reference.Options(*list(call.values())[7:])
    found = reference.backward(wide(grad), wide(grad_lse), *tensors, options, needs_bias)
    return reference.forward(*tensors, options), [g for g in found if g is not None]


def check(call, dtype=torch.float32, needs_bias=False):
    """Forward and backward within a few roundings of the reference."""
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(call["query"].shape, generator=generator).to(dtype)
    grad_lse = torch.randn(call["query"].shape[:3], generator=generator)
    outputs, grads = expected_of(call, grad, grad_lse, needs_bias)
    found = forward(call)
    for index, pair in enumerate(zip((*found, *backward(call, grad, grad_lse, found, needs_bias)), (*outputs, *grads), strict=True)):
        assert relative_error([pair]) <= BOUNDS[dtype], index
    return found


SIZES = list(itertools.product((1, 2), (1, 4), (1, 45), (1, 70)))


@pytest.mark.parametrize("size", SIZES, ids=["x".join(map(str, s)) for s in SIZES])
def test_every_broadcast_of_a_bias(size):
    bias = torch.randn(size, generator=torch.Generator().manual_seed(3))
    for change in ({}, {"softcap": 2.0, "right": 0}, {"G": 4}, {"left": 9, "right": 30}):
        check(draw(bias=bias, **change), needs_bias=True)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_layouts_and_types_of_a_bias(kind):
    whole = torch.randn(2, 4, 90, 140, generator=torch.Generator().manual_seed(3))
    whole = whole > -0.5 if kind == torch.bool else whole.to(kind)
    layouts = {
        "slice": whole[..., 20:65, 30:100],
        "every_other": whole[..., ::2, ::2],
        "transposed": whole.transpose(2, 3)[:, :, 50:95, :70],
        "expanded": whole[:1, :1, :1, :70].expand(2, 4, 45, 70),
        "larger": whole,
    }
    for name, bias in layouts.items():
        plain = bias[..., :45, :70].contiguous()
        expected, found = forward(draw(bias=plain)), forward(draw(bias=bias))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name
        check(draw(bias=bias), needs_bias=kind != torch.bool)


@every_kind
@pytest.mark.parametrize("D", [1, 7, 16, 33, 64, 72, 200, 256])
def test_head_sizes(D, dtype):
    check(draw(1, 2, 13, D, 21, dtype=dtype, right=0), dtype)
    check(draw(1, 2, 13, D, 21, dtype=dtype, bias=torch.randn(1, 2, 1, 21)), dtype, needs_bias=True)


@every_kind
def test_long_keys(dtype):
    """Several blocks of keys, forward and backward, and rows that begin to see in a later one."""
    for change in ({}, {"left": 300, "right": 20}, {"right": 0}, {"left": 0}):
        check(draw(1, 2, 700, 16, 1300, 1, dtype, **change), dtype)
    check(draw(1, 2, 300, 128, 1100, 1, dtype, softcap=3.0), dtype)
    check(draw(1, 1, 1300, 16, 700, 1, dtype, right=0), dtype)  # the first 600 rows see nothing


@every_kind
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(rows, dtype):
    """Where keys and values are read in place."""
    for change in ({}, {"right": 0}, {"M": 1301, "left": 700}, {"softcap": 2.0, "M": 3}, {"M": 0}):
        check(draw(2, 2, rows, 64, **{"M": 1030, "G": 1} | change, dtype=dtype), dtype)
    check(
        draw(2, 2, rows, 32, 77, 2, dtype, bias=torch.randn(2, 1, rows, 77), dropout_p=0.2, seed=torch.tensor([8])), dtype, needs_bias=True
    )


def test_scores_far_apart():
    """A maximum that grows from block to block, and one in the first."""
    ramp = torch.linspace(-500, 500, 1300).view(1, 1, 1, 1300)
    for bias in (ramp, -ramp, ramp - 1e4):
        call = draw(1, 2, 9, 16, 1300, bias=bias)
        tensors, options = list(call.values())[:7], reference.Options(*list(call.values())[7:])
        truth, eager = reference.forward(*map(wide, tensors), options), reference.forward(*tensors, options)
        assert all(within_gate([each], torch.float32) is None for each in zip(forward(call), truth, eager, strict=True))


@pytest.mark.parametrize("spans", [((0, 45, 0, 70), (3, 20, 5, 33)), ((0, 0, 0, 70), (44, 1, 69, 1)), ((0, 45, 0, 0), (5, 30, 0, 1))])
def test_nan_beyond_the_spans(spans):
    spans = torch.tensor(spans, dtype=torch.int32)
    for change in ({}, {"right": 0}, {"left": 5, "right": 5, "bias": torch.randn(1, 4, 45, 70)}, {"slopes": torch.rand(2, 4)}):
        call = draw(spans=spans, **change)
        clean = forward(call)
        grad = torch.randn(call["query"].shape, generator=torch.Generator().manual_seed(1))
        grads = backward(call, grad, None, clean)
        for b, (first, rows, start, columns) in enumerate(spans.tolist()):
            for t, begin, count in ((call["query"], first, rows), (call["key"], start, columns), (call["value"], start, columns)):
                t[b, :, :begin], t[b, :, begin + count :] = float("nan"), float("nan")
            grad[b, :, :first], grad[b, :, first + rows :] = float("nan"), float("nan")
        found = forward(call)
        assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(grads, backward(call, grad, None, found), strict=True))
        for b, (first, rows, start, columns) in enumerate(spans.tolist()):
            outside = torch.ones(45, dtype=torch.bool)
            outside[first : first + rows] = False
            assert not found[0][b, :, outside].any() and (found[1][b, :, outside] == -float("inf")).all()
            inside = draw(**{k: v for k, v in change.items() if k not in ("bias", "slopes")})
            if rows and columns and not change:
                cut = {"query": slice(first, first + rows), "key": slice(start, start + columns), "value": slice(start, start + columns)}
                inside |= {name: call[name][b : b + 1, :, where] for name, where in cut.items()}
                assert relative_error([(found[0][b : b + 1, :, cut["query"]], forward(inside)[0])]) <= 1e-6


def test_wild_spans_are_clamped():
    spans = torch.tensor([[-5, 2**31 - 1, 60, 100], [40, 50, -9, -1]], dtype=torch.int32)
    tame = torch.tensor([[0, 45, 60, 10], [40, 5, 0, 0]], dtype=torch.int32)
    for a, b in zip(forward(draw(spans=spans)), forward(draw(spans=tame)), strict=True):
        assert torch.equal(a, b)
    short = torch.randn(2, 1, 20, 30)  # fewer than the sequences have
    call, tame = draw(spans=tame, bias=short), draw(spans=torch.tensor([[0, 20, 60, 10], [40, 5, 0, 0]], dtype=torch.int32), bias=short)
    assert torch.equal(forward(call)[0], forward(tame)[0])


def test_ragged_gaps():
    """Sequences in any order, with rows and keys between them that are nobody's."""
    spans = torch.tensor([[30, 9, 50, 20], [2, 11, 0, 8], [20, 0, 10, 5], [14, 5, 15, 7]], dtype=torch.int32)
    bias = torch.randn(4, 1, 11, 20, generator=torch.Generator().manual_seed(5))
    for change in ({}, {"right": 0}, {"bias": bias}, {"slopes": torch.rand(4, 4)}, {"bias": bias[:1]}):
        check(draw(B=1, spans=spans, **change), needs_bias="bias" in change)


@every_kind
def test_dropout(dtype):
    share, seed = 0.3, torch.tensor([-(2**62) + 12345])
    for change in ({}, {"right": 0, "bias": torch.randn(2, 1, 45, 1)}, {"M": 1300, "N": 20}):
        check(draw(dtype=dtype, dropout_p=share, seed=seed, **change), dtype, needs_bias="bias" in change)
    call = draw(1, 2, 64, 16, 512, 2, dropout_p=share, seed=seed)
    call["query"].zero_(), call["value"].fill_(1.0)
    kept = forward(call)[0][..., 0] * (1 - share) * 512  # how many of a row's equal weights stayed
    expected = _philox.keep(seed, share, 1, 2, 64, 512).sum(-1)
    torch.testing.assert_close(kept, expected.float(), rtol=1e-5, atol=1e-3)
    assert abs(kept.mean().item() / 512 - (1 - share)) < 0.01


def test_dropout_repeats_in_backward():
    """Finite differences along one direction: backward drops what forward did."""
    call = draw(1, 2, 9, 8, 37, 1, dropout_p=0.4, seed=torch.tensor([99]))
    generator = torch.Generator().manual_seed(2)
    grad, step = torch.randn(1, 2, 9, 8, generator=generator), 2e-3
    grads = backward(call, grad, None, forward(call))
    for name, found in zip(("query", "key", "value"), grads, strict=True):
        direction = torch.randn(call[name].shape, generator=generator)
        ends = [forward(call | {name: call[name] + sign * step * direction})[0].double() for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) * grad).sum().item() / (2 * step)
        assert slope == pytest.approx((found * direction).sum().item(), rel=2e-3, abs=2e-3), name


CUTS = (
    {},
    {"right": 0},
    {"B": 1, "G": 1, "N": 300, "M": 300, "right": 0},
    {"B": 9, "G": 4, "N": 7},
    {"B": 1, "H": 8, "G": 1, "N": 200, "left": 30},
)


@every_kind
def test_any_number_of_threads_gives_the_same_bits(dtype):
    before = torch.get_num_threads()
    try:
        for change in CUTS:
            call = draw(dtype=dtype, D=40, **change)
            (_, H, N, _), M = call["query"].shape, call["key"].shape[2]
            for bias in (None, *(torch.randn(1, h, n, M) for h in (1, H) for n in (1, N))):
                call["bias"], results = bias, []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found = forward(call)
                    results.append([*found, *backward(call, call["query"].flip(2), found[1], found, bias is not None)])
                assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_more_heads_than_a_grid_has_blocks():
    call = draw(35_000, 2, 1, 4, 3, 2)
    check(call)
    check(draw(70_000, 1, 2, 2, 1, 1, bias=torch.randn(1, 1, 2, 1)), needs_bias=True)


def test_outputs_in_any_layout():
    call = draw()
    output, lse = forward(call)
    for target in (output.new_empty(2, 45, 4, 24).transpose(1, 2), output.new_empty(2, 4, 24, 45).transpose(2, 3)):
        other = lse.new_empty(2, 45, 4).transpose(1, 2)
        OPS.attention_into(*call.values(), target, other)
        assert torch.equal(target, output) and torch.equal(other, lse)
    expected = backward(call, output, lse, (output, lse))
    tensors, options = list(call.values())[:7], list(call.values())[7:]
    grads = [t.new_empty(*t.shape[:2], t.shape[3], t.shape[2]).transpose(2, 3) for t in tensors[:3]]
    spread = output.transpose(2, 3).contiguous().transpose(2, 3)
    OPS.attention_grad_into(spread, lse, *tensors, spread, other, *options, *grads, None)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_backends_agree():
    """What the public function chooses, and PyTorch's own op."""
    query, key, value = (torch.randn(2, 3, 50, 32) for _ in range(3))
    found = [pyops.flash_attention(query, key, value, backend=name) for name in (None, "cpu", "vendor")]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-5)


def test_opcheck():
    seed, spans = torch.tensor([3]), torch.tensor([[0, 6, 0, 9], [2, 3, 1, 4]], dtype=torch.int32)
    changes = ({}, dict(bias=torch.randn(1, 4, 6, 9)), dict(spans=spans, slopes=torch.rand(1, 4)), dict(dropout_p=0.2, seed=seed))
    tests = ("test_schema", "test_faketensor")
    for change in changes:
        call = draw(2, 4, 6, 8, 9, **change)
        found = forward(call)
        torch.library.opcheck(OPS.attention_into.default, (*call.values(), *empty(**call)), test_utils=tests)
        tensors, options = list(call.values())[:7], list(call.values())[7:]
        grads = [torch.empty_like(t) for t in tensors[:3]]
        grads.append(None if call["bias"] is None else torch.empty_like(call["bias"]))
        args = (torch.ones_like(found[0]), torch.ones_like(found[1]), *tensors, *found, *options, *grads)
        torch.library.opcheck(OPS.attention_grad_into.default, args, test_utils=tests)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_differentiable_ops(packed):
    call = draw(1, 2, 5, 8, 5, 2, bias=torch.randn(1, 1, 5, 5, requires_grad=True))
    if packed:
        call |= {"query": torch.randn(1, 5, 3, 2, 8), "key": None, "value": None}
    for name in ("query", "key", "value"):
        call[name] = None if call[name] is None else call[name].requires_grad_()
    torch.library.opcheck(OPS.attention_fwd.default, tuple(call.values()))
    call = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    output, lse = OPS.attention_fwd(*call.values())
    tensors, options = list(call.values())[:7], list(call.values())[7:]
    torch.library.opcheck(OPS.attention_bwd.default, (output, lse, *tensors, output, lse, *options, True))


REFUSALS = {
    "dims": (dict(query=torch.zeros(4, 45, 24)), "query, key: expected"),
    "head_size": (dict(D=257), "heads of 1 to 256"),
    "heads": (dict(H=3), "divides query's 3"),
    "key": (dict(key=torch.zeros(2, 2, 70, 23)), "key: wrong shape"),
    "value": (dict(value=torch.zeros(2, 2, 69, 24)), "value: wrong shape"),
    "value_dtype": (dict(value=torch.zeros(2, 2, 70, 24, dtype=torch.float16)), "value: dtype differs"),
    "double": (dict(dtype=torch.float64), "query: expected float32, bfloat16 or float16"),
    "bias_heads": (dict(bias=torch.zeros(1, 2, 45, 70)), "bias: expected a shape that broadcasts"),
    "bias_rows": (dict(bias=torch.zeros(1, 1, 44, 70)), "bias: expected a shape that broadcasts"),
    "bias_columns": (dict(bias=torch.zeros(1, 1, 45, 69)), "bias: expected a shape that broadcasts"),
    "bias_dims": (dict(bias=torch.zeros(45, 70)), "bias: expected four dimensions"),
    "bias_dtype": (dict(bias=torch.zeros(1, 1, 45, 70, dtype=torch.int64)), "bias: expected a floating tensor or bool"),
    "slopes": (dict(slopes=torch.zeros(3, 4)), r"slopes: expected \[1 or S, H\]"),
    "slopes_heads": (dict(slopes=torch.zeros(1, 3)), "slopes: wrong shape"),
    "spans": (dict(spans=torch.zeros(3, 4, dtype=torch.int32)), "spans: expected int32"),
    "spans_dtype": (dict(spans=torch.zeros(2, 4, dtype=torch.int64)), "spans: expected int32"),
    "seed": (dict(dropout_p=0.5), "seed: expected one int64"),
    "share": (dict(dropout_p=1.0, seed=torch.tensor([1])), "dropout_p: expected 0 to less than 1"),
    "left": (dict(left=-2), "left, right: expected -1 or more"),
    "softcap": (dict(softcap=-1.0), "softcap: expected 0 or more"),
}


@pytest.mark.parametrize("change, match", REFUSALS.values(), ids=list(REFUSALS))
def test_refusals(change, match):
    sizes = {name: change[name] for name in ("D", "H", "dtype") if name in change}
    call = draw(**sizes) | {name: value for name, value in change.items() if name not in sizes}
    with pytest.raises(RuntimeError, match=match):
        OPS.attention_into(*call.values(), torch.empty(2, 4, 45, 24), torch.empty(2, 4, 45))


@pytest.mark.parametrize("index, wrong", [(0, "grad"), (9, "output"), (16, "grad_query"), (17, "grad_key"), (18, "grad_value")])
def test_refused_gradients(index, wrong):
    call = draw()
    tensors, options = list(call.values())[:7], list(call.values())[7:]
    args = [call["query"], None, *tensors, *empty(**call), *options, *(torch.empty_like(t) for t in tensors[:3]), None]
    args[index] = torch.zeros(2, 4, 44, 24)
    with pytest.raises(RuntimeError, match=f"{wrong}: wrong shape"):
        OPS.attention_grad_into(*args)
    args[index] = call["query"] if index < 17 else torch.zeros(2, 2, 70, 24)
    for place, value, match in (
        (1, torch.zeros(2, 4, 44), "grad_lse"),
        (10, torch.zeros(2, 4, 44), "lse"),
        (19, torch.zeros(1), "grad_bias"),
    ):
        changed = [*args[:place], value, *args[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"{match}: expected"):
            OPS.attention_grad_into(*changed)


CODE = """
import runpy, sys
import torch
t = runpy.run_path(sys.argv[1])
for dtype in t["KINDS"]:
    for change in ({}, {"right": 0, "softcap": 2.0, "bias": torch.randn(2, 1, 45, 70)}, {"M": 1300, "N": 20, "D": 33}):
        t["check"](t["draw"](dtype=dtype, dropout_p=0.2, seed=torch.tensor([5]), **change), dtype, "bias" in change)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(run_on, isa):
    run_on(isa, CODE, __file__)
