"""pyops.nn's MultiheadAttention against torch.nn's, Attention against its layers one by one, and decoding with a cache."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pyops
from pyops.nn import Attention, KeyValueCache, MultiheadAttention

from .conftest import assert_gate, cotangents

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def layer_by_layer():
    """torch's modules without their C++ fast path, whose rows of padding are zeros."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def twins(*args, seed=0, ours=MultiheadAttention, theirs=nn.MultiheadAttention, **kwargs):
    """torch's module and ours with the same parameters, each loaded from the other's state dict."""
    torch.manual_seed(seed)
    a, b = theirs(*args, **kwargs), ours(*args, **kwargs)
    with torch.no_grad():
        for name, parameter in a.named_parameters():
            if name.endswith("bias"):  # which torch sets to zero
                parameter.normal_()
    b.load_state_dict(a.state_dict(), strict=True)
    a.load_state_dict(b.state_dict(), strict=True)
    return a, b


def assert_parity(make, call, dtype=torch.float32, gradients=True):
    """Ours within the gate of torch's. make(seed) -> (theirs, ours, tensors); call(module, tensors) -> outputs."""

    def draw(seed, gradient):
        theirs, ours, tensors = make(seed)
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        results = []
        for module, kind in ((ours, dtype), (copy.deepcopy(theirs).double(), torch.float64), (theirs, dtype)):
            own = [
                t if t is None else t.detach().to(dtype, copy=True).to(kind).requires_grad_(gradient) if t.is_floating_point() else t
                for t in tensors
            ]  # rounded to the dtype, then perhaps made exact
            with torch.set_grad_enabled(gradient):
                outputs = [y for y in call(module, own) if y is not None]
            if gradient:
                torch.autograd.backward(outputs, [t.to(y.dtype) for t, y in zip(cotangents(outputs), outputs, strict=True)])
                leaves = [t for t in (*own, *module.parameters()) if t is not None and t.grad is not None]
                outputs = [t.grad for t in leaves]
            results.append(outputs)
        return results

    assert_gate(lambda seed: draw(seed, False), dtype)
    if gradients:
        assert_gate(lambda seed: draw(seed, True), dtype, gradient=True)


B, L, S, E, H = 3, 5, 7, 16, 4


def sequence(batch_first, batched, length, size):
    return torch.randn((B, length, size) if batch_first else (length, B, size)) if batched else torch.randn(length, size)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


RIGHT = torch.arange(S) >= torch.tensor([S, 4, 2])[:, None]
LEFT = torch.arange(S) < torch.tensor([0, 2, 3])[:, None]


def hidden(*shape):
    return (torch.rand(shape) > 0.6).index_fill(-1, torch.tensor([3]), False)  # nobody sees nothing


MASKS = {  # (key_padding_mask, attn_mask) for so many sequences
    "none": lambda n: (None, None),
    "no padding": lambda n: (torch.zeros(n, S, dtype=torch.bool), None),
    "padding right": lambda n: (RIGHT[:n], None),
    "padding left": lambda n: (LEFT[:n], None),
    "padding added": lambda n: (torch.randn(n, S), None),
    "mask": lambda n: (None, hidden(L, S)),
    "mask of each head": lambda n: (None, hidden(n * H, L, S)),
    "bias of each head": lambda n: (None, torch.randn(n * H, L, S)),
    "mask and padding": lambda n: (LEFT[:n], hidden(L, S)),
    "bias and added padding": lambda n: (additive(RIGHT[:n].index_fill(1, torch.tensor([3]), False)), torch.randn(L, S)),
    "bias and padding right": lambda n: (RIGHT[:n], torch.randn(L, S)),
}
OPTIONS = {
    "plain": dict(),
    "batch first": dict(batch_first=True),
    "no bias": dict(bias=False, batch_first=True),
    "own sizes": dict(kdim=12, vdim=20),
    "own sizes, no bias": dict(kdim=12, bias=False, batch_first=True),
    "bias_kv": dict(add_bias_kv=True),
    "zero": dict(add_zero_attn=True, batch_first=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True, vdim=20),
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_options_and_masks(options, need_weights):
    for index, mask in enumerate(MASKS):
        if need_weights and (index + len(options)) % 2:  # plain operations: half of the pairs will do
            continue
        batched = index % 3 != 2

        def make(seed, mask=mask, batched=batched):
            theirs, ours = twins(E, H, seed=seed, **options)
            first = options.get("batch_first", False)
            padding, attn_mask = MASKS[mask](B if batched else 1)
            padding = padding if batched or padding is None else padding[0]
            sizes = ((L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E)))
            return theirs, ours, [*(sequence(first, batched, *size) for size in sizes), padding, attn_mask]

        def call(module, t, index=index):
            options = dict(key_padding_mask=t[3], attn_mask=t[4], need_weights=need_weights, average_attn_weights=index % 2 == 0)
            return module(*t[:3], **options)

        assert_parity(make, call, gradients=index % 3 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention(batch_first, dtype):
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    for batched in (True, False):
        for mask, hint, padding in (
            (None, False, None),
            (causal, True, None),
            (causal, False, None),
            (causal == -torch.inf, True, RIGHT),
            (causal == -torch.inf, True, None),
            (None, False, RIGHT),
        ):

            def make(seed, mask=mask, padding=padding, batched=batched):
                padding = padding if batched or padding is None else padding[1]
                return *twins(E, H, seed=seed, batch_first=batch_first), [sequence(batch_first, batched, S, E), padding, mask]

            def call(module, t, hint=hint):
                return module(t[0], t[0], t[0], t[1], attn_mask=t[2], is_causal=hint, need_weights=False)

            assert_parity(make, call, dtype, gradients=batched)


def test_key_is_value():
    def make(seed):
        return *twins(E, H, seed=seed), [sequence(False, True, L, E), sequence(False, True, S, E), RIGHT]

    assert_parity(make, lambda module, t: module(t[0], t[1], t[1], t[2], need_weights=False))


WIDE = 256  # a weight of 2**16 elements, from which on layouts are kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_of_wide_layers(dtype):
    """Self-attention, one memory for keys and values, and three tensors, each twice: with weights laid out and with weights kept."""

    def make(seed):
        return *twins(WIDE, H, batch_first=True, seed=seed), [sequence(True, True, n, WIDE) for n in (L, S, S)]

    def call(module, t):
        return [module(*args, need_weights=False)[0] for args in ((t[0],) * 3, (t[0], t[1], t[1]), t) for _ in range(2)]

    assert_parity(make, call, dtype)


def test_kept_weights_follow_the_module():
    theirs, ours = twins(WIDE, H, batch_first=True)
    x = sequence(True, True, S, WIDE)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0])

    check()
    kept = ours._kept.get(ours, dict)
    assert set(kept) == {"qkv", "out"} and all(kept.values())
    for module in (theirs, ours):
        with torch.no_grad():
            module.in_proj_weight.mul_(-0.5)
            module.out_proj.weight[0] = 1.0
    check()
    for module in (theirs, ours):
        module.in_proj_weight = nn.Parameter(torch.linspace(-1, 1, 3 * WIDE * WIDE).view(3 * WIDE, WIDE) ** 3)
    check()
    copy.deepcopy(ours).double()(*[x.double()] * 3)
    ours.load_state_dict(twins(WIDE, H, seed=1)[0].state_dict())
    theirs.load_state_dict(ours.state_dict())
    check()
    assert pickle.loads(pickle.dumps(ours)).state_dict().keys() == theirs.state_dict().keys()


def test_outputs_are_contiguous_and_rows_that_see_nothing_are_zeros():
    for first in (False, True):
        _, ours = twins(E, H, batch_first=first)
        nn.init.zeros_(ours.out_proj.bias)
        x = sequence(first, True, S, E)
        padding = torch.ones(B, S, dtype=torch.bool)
        for need_weights in (False, True):
            y, weights = ours(x, x, x, padding, need_weights=need_weights)
            assert y.is_contiguous() and not y.any() and (weights is None or not weights.any())


def test_dropout_draws_from_torchs_generator():
    theirs, ours = twins(E, H, dropout=0.5, batch_first=True)
    x = sequence(True, True, S, E)

    def run(module, seed, **options):
        torch.manual_seed(seed)
        return module(x, x, x, **options)

    for a, b in zip(run(ours, 3), run(theirs, 3), strict=True):  # weights asked for: torch's own numbers
        torch.testing.assert_close(a, b)
    first = run(ours, 3, need_weights=False)[0]
    assert torch.equal(first, run(ours, 3, need_weights=False)[0])
    assert not torch.allclose(first, run(ours, 4, need_weights=False)[0])
    torch.testing.assert_close(run(ours.eval(), 3)[0], run(theirs.eval(), 3)[0])
    everything = MultiheadAttention(E, H, dropout=1.0, bias=False)
    assert not everything(x, x, x, need_weights=False)[0].any()


MISTAKES = {
    "padding": dict(key_padding_mask=torch.zeros(B, S + 1, dtype=torch.bool)),
    "padding of ints": dict(key_padding_mask=torch.zeros(B, S, dtype=torch.int64)),
    "mask": dict(attn_mask=torch.zeros(L, S + 1)),
    "mask of heads": dict(attn_mask=torch.zeros(B, L, S)),
    "mask of four dimensions": dict(attn_mask=torch.zeros(1, 1, L, S)),
    "hint without a mask": dict(is_causal=True),
    "value": dict(value=torch.zeros(S, B, E + 1)),
    "value's length": dict(value=torch.zeros(S + 1, B, E)),
    "query": dict(query=torch.zeros(L, B, E + 1)),
    "batch": dict(query=torch.zeros(L, B + 1, E)),
    "dimensions": dict(query=torch.zeros(1, L, B, E)),
    "unbatched": dict(query=torch.zeros(L, E)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_errors_are_torchs(mistake):
    arguments = dict(query=torch.zeros(L, B, E), key=torch.zeros(S, B, E), value=torch.zeros(S, B, E), need_weights=False)
    found = []
    for module in twins(E, H):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            module(**{**arguments, **mistake})
        found.append((type(error.value), str(error.value)))
    assert found[0] == found[1]


def test_constructors_errors_and_initial_values_are_torchs():
    for arguments in ((E, 5), (0, 4)):
        errors = []
        for kind in (nn.MultiheadAttention, MultiheadAttention):
            with pytest.raises((AssertionError, ValueError)) as error:
                kind(*arguments)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    built = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        built.append(kind(E, H, add_bias_kv=True).state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])
    assert isinstance(MultiheadAttention(E, H), nn.MultiheadAttention)
    assert repr(MultiheadAttention(E, H)).splitlines()[1] == repr(nn.MultiheadAttention(E, H)).splitlines()[1]


def test_copies_hooks_and_parametrisation():
    theirs, ours = twins(E, H, batch_first=True)
    x = sequence(True, True, S, E)
    expected = theirs(x, x, x, need_weights=False)[0]
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x, x, x, need_weights=False)[0], expected)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x, x, x, need_weights=False)[0], expected)
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], expected)
    assert len(seen) == 1
    doubled = {name: 2 * p for name, p in ours.named_parameters()}
    found = torch.func.functional_call(ours, doubled, (x, x, x), dict(need_weights=False))[0]
    torch.testing.assert_close(found, torch.func.functional_call(theirs, doubled, (x, x, x), dict(need_weights=False))[0])


@pytest.mark.parametrize("padding", [None, RIGHT], ids=["none", "right"])
def test_compile_and_autocast(padding):
    theirs, ours = twins(E, H, batch_first=True)
    x = sequence(True, True, S, E)
    torch._dynamo.reset()
    for need_weights in (False, True):
        call = dict(key_padding_mask=padding, need_weights=need_weights)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x, x, **call), theirs(x, x, x, **call), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [module(x, x, x, **call) for module in (ours, theirs)]
        for found, expected in zip(*results, strict=True):
            if expected is not None:
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:There is a performance drop", "ignore::torch.jit.TracerWarning")
def test_recorded_calls_run_torchs_own():
    theirs, ours = twins(E, H, batch_first=True)
    x = sequence(True, True, S, E)

    def call(module, v):
        return module(v, v, v, need_weights=False)[0]

    many = torch.randn(2, B, S, E)
    torch.testing.assert_close(torch.func.vmap(lambda v: call(ours, v))(many), torch.func.vmap(lambda v: call(theirs, v))(many))
    found, expected = (torch.func.grad(lambda v, m=module: call(m, v).sum())(x) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)
    tangent = torch.func.jvp(lambda v: ours(v, v, v)[0], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(lambda v: theirs(v, v, v)[0], (x,), (torch.ones_like(x),))[1])
    with torch.no_grad():
        names = {n.kind() for n in torch.jit.trace(ours, (x, x, x), check_trace=False).inlined_graph.nodes()}
    assert names and not any(name.startswith("pyops::") for name in names)


def test_mismatched_masks_warn_as_torchs():
    _, ours = twins(E, H, batch_first=True)
    x = sequence(True, True, S, E)
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
        ours(x, x, x, RIGHT, attn_mask=torch.zeros(S, S), need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_torchs_own():
    torch.backends.mha.set_fastpath_enabled(True)
    theirs, ours = (module.eval() for module in twins(E, H, batch_first=True))
    with torch.no_grad():
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)])
        found, expected = (module(x, x, x, need_weights=False)[0].to_padded_tensor(0.0) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_cache(batch_first):
    _, ours = twins(E, H, batch_first=batch_first)
    x = sequence(batch_first, True, S, E)
    at = 1 if batch_first else 0
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    with torch.no_grad():
        expected, weights = ours(x, x, x, attn_mask=causal)
        for steps in ([1] * S, [3, 1, 2, 1], [S]):
            cache, found = ours.new_cache(B, S), []
            for step in x.split(steps, at):
                found.append(ours(step, step, step, need_weights=False, cache=cache)[0])
            torch.testing.assert_close(torch.cat(found, at), expected, rtol=1e-4, atol=1e-5)
            assert cache.length == cache.max_length == S
        cache.reset()
        for step in x.split([4, 3], at):
            found = ours(step, step, step, cache=cache)
        torch.testing.assert_close(found[1], weights[:, 4:], rtol=1e-4, atol=1e-5)
        one = x.select(1 - at, 0)
        cache = ours.new_cache(1, S)
        found = torch.cat([ours(step, step, step, need_weights=False, cache=cache)[0] for step in one.split(1)])
        torch.testing.assert_close(found, expected.select(1 - at, 0), rtol=1e-4, atol=1e-5)


def test_cache_with_masks():
    """Sequences padded on the left, and a bias over all keys."""
    _, ours = twins(E, H, batch_first=True)
    x, bias = sequence(True, True, S, E), torch.randn(S, S)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    with torch.no_grad(), pytest.warns(UserWarning, match="mismatched"):
        expected = ours(x, x, x, LEFT, attn_mask=causal + bias, need_weights=False)[0]
        cache, found = ours.new_cache(B, 2 * S), []
        for start, step in zip((0, 4, 5), x.split([4, 1, 2], 1), strict=True):
            end = start + step.shape[1]
            masks = dict(key_padding_mask=LEFT[:, :end], attn_mask=bias[start:end, :end])
            found.append(ours(step, step, step, need_weights=False, cache=cache, **masks)[0])
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_cache_of_a_memory():
    _, ours = twins(E, H, kdim=12, vdim=12, batch_first=True)
    x, memory = sequence(True, True, L, E), sequence(True, True, S, 12)
    with torch.no_grad():
        expected = ours(x, memory, memory, RIGHT, need_weights=False)[0]
        cache = ours.new_cache(B, L)
        found = [ours(x[:, :2], memory, memory, RIGHT, need_weights=False, cache=cache)[0]]
        found.append(ours(x[:, 2:], None, None, RIGHT, need_weights=False, cache=cache)[0])
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
        assert cache.length == 0
        with pytest.raises(ValueError, match="keeps a memory of 7 positions, key has 3"):
            ours(x, memory[:, :3], memory[:, :3], cache=cache)
        cache.reset()
        with pytest.raises(ValueError, match="keeps no memory yet"):
            ours(x, None, None, cache=cache)


def test_caches_refusals():
    _, ours = twins(E, H, batch_first=True)
    x = sequence(True, True, S, E)
    for arguments, error, text in (
        ((0, H, S, 4), ValueError, "batch_size: expected 1 or more, got 0"),
        ((B, H, 1.5, 4), TypeError, "max_length: expected an int, got 1.5"),
    ):
        with pytest.raises(error, match=text):
            KeyValueCache(*arguments)
    with pytest.raises(RuntimeError, match="carries no gradients"):
        ours(x, x, x, need_weights=False, cache=ours.new_cache(B, S))
    with torch.no_grad():
        with pytest.raises(ValueError, match="7 positions after 0 are more than max_length 6"):
            ours(x, x, x, cache=ours.new_cache(B, S - 1))
        with pytest.raises(ValueError, match=r"key: expected shape \(4, 4, 7, 4\), got \(3, 4, 7, 4\)"):
            ours(x, x, x, cache=ours.new_cache(B + 1, S))
        with pytest.raises(ValueError, match="masks with 7 columns"):
            ours(x, x, x, RIGHT[:, :5], cache=ours.new_cache(B, S))
        with pytest.raises(ValueError, match="not with add_bias_kv"):
            module = MultiheadAttention(E, H, add_bias_kv=True, batch_first=True)
            module(x, x, x, cache=module.new_cache(B, S))


def test_cache_follows_the_module():
    ours = MultiheadAttention(E, H, batch_first=True).to(torch.bfloat16)
    assert ours.new_cache(2, 3).key.dtype == torch.bfloat16
    assert ours.new_cache(2, 3).key.shape == ours.new_cache(2, 3).value.shape == (2, H, 3, E // H)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours = ours.float()
        cache = ours.new_cache(B, S)
        assert cache.key.dtype == torch.bfloat16
        x = sequence(True, True, S, E)
        full = ours(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(S), is_causal=True, need_weights=False)[0]
        steps = torch.cat([ours(step, step, step, need_weights=False, cache=cache)[0] for step in x.split(1, 1)], 1)
    torch.testing.assert_close(steps, full, rtol=3e-2, atol=3e-2)


def test_reordering():
    cache = KeyValueCache(3, 2, 4, 8)
    key, value = torch.randn(2, 3, 2, 2, 8)
    cache.append(key, value)
    cache.memory = key, value
    index = torch.tensor([2, 2, 0])
    cache.reorder(index)
    keys, values = cache.append(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8))
    assert torch.equal(keys[:, :, :2], key[index]) and torch.equal(values[:, :, :2], value[index])
    assert torch.equal(cache.memory[0], key[index]) and torch.equal(cache.memory[1], value[index])
    cache.reorder(torch.arange(3).repeat_interleave(2))  # beams of each sequence
    assert cache.key.shape == (6, 2, 4, 8) and cache.length == 3 and torch.equal(cache.key[1, :, :3], keys[0])


def one_by_one(module, x, bias=None, is_causal=False):
    """timm's Attention."""
    rows, size = x.shape[:2], module.head_dim
    q, k, v = module.qkv(x).reshape(*rows, 3, module.num_heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * size**-0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    y = scores.softmax(-1) @ v
    return module.proj_drop(module.proj(y.transpose(1, 2).reshape(*rows, -1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_attention(qkv_bias, dtype):
    for bias, is_causal in ((None, False), (torch.randn(H, S, S), False), (None, True)):

        def draw(seed, gradient, bias=bias, is_causal=is_causal):
            torch.manual_seed(seed)
            module = Attention(E, H, qkv_bias=qkv_bias).to(dtype)
            x, results = torch.randn(B, S, E).to(dtype), []
            for call, kind in ((lambda m, *args: m(*args), dtype), (one_by_one, torch.float64), (one_by_one, dtype)):
                own, t = copy.deepcopy(module).to(kind), x.to(kind).requires_grad_()
                y = call(own, t, bias if bias is None else bias.to(dtype).to(kind), is_causal)
                results.append([y] if not gradient else torch.autograd.grad(y, [t, *own.parameters()], cotangents([y])))
            return results

        assert_gate(lambda seed: draw(seed, False), dtype)
        assert_gate(lambda seed: draw(seed, True), dtype, gradient=True)


def test_attention_dropout_hooks_compile_and_refusals():
    assert sorted(Attention(E, H, qkv_bias=True).state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]
    module, x, seen = Attention(E, H, attn_drop=0.5, proj_drop=0.1), torch.randn(B, S, E), []
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(x))
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])
    module.eval()
    expected = one_by_one(module, x)
    torch.testing.assert_close(torch.func.vmap(module)(x[:, None])[:, 0], expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected, rtol=1e-4, atol=1e-5)
    for part in (module.qkv, module.attn_drop, module.proj, module.proj_drop):
        part.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4
    visible = torch.rand(S, S) > 0.3
    visible[:, 0] = True
    for _ in range(2):  # with the hook, and on the kernel
        torch.testing.assert_close(module(x, visible), one_by_one(module, x, additive(~visible)), rtol=1e-4, atol=1e-5)
        module = copy.deepcopy(module)
        module.attn_drop = nn.Dropout(0.0)
    with pytest.raises(ValueError, match="Attention: dim: expected a multiple of num_heads, got 16 and 3"):
        Attention(E, 3)


def test_backends_by_name():
    for backend in ("eager", "vendor"):
        ours = MultiheadAttention(E, H, batch_first=True, backend=backend)
        x = sequence(True, True, S, E)
        torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], ours(x, x, x)[0], rtol=1e-4, atol=1e-5)
        assert f"backend='{backend}'" in repr(ours)
    with pytest.raises(ValueError, match="backend"):
        MultiheadAttention(E, H, backend="cuda")(x, x, x, need_weights=False)
    with pyops.backend("eager"):
        module = Attention(E, H)
        torch.testing.assert_close(module(x), one_by_one(module, x), rtol=1e-4, atol=1e-5)
