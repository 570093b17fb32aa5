"""pyops.nn's transformers against torch.nn's: results, gradients, state dicts, masks, errors; decoding with a cache."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyops.nn as ours

from .test_nn_attention import assert_parity, layer_by_layer, twins  # noqa: F401  (a fixture)

B, L, S, E, H, HIDDEN = 3, 5, 7, 16, 4, 24
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDING = torch.arange(L) >= torch.tensor([L, 4, 2])[:, None]
MEMORY_PADDING = torch.arange(S) >= torch.tensor([S, 3, 5])[:, None]


def layers(kind, seed=0, **options):
    name = f"Transformer{kind}Layer"
    theirs, own = twins(E, H, HIDDEN, 0.0, ours=getattr(ours, name), theirs=getattr(nn, name), seed=seed, **options)
    return theirs, own


def stacks(kind, seed=0, **options):
    built = []
    for module, layer in zip((nn, ours), layers(kind, seed, **options), strict=True):
        extra = dict(enable_nested_tensor=False) if kind == "Encoder" else {}
        torch.manual_seed(seed)
        built.append(getattr(module, f"Transformer{kind}")(layer, 2, nn.LayerNorm(E), **extra))
    built[1].load_state_dict(built[0].state_dict(), strict=True)
    built[0].load_state_dict(built[1].state_dict(), strict=True)
    return tuple(built)


def sequence(options, length):
    return torch.randn((B, length, E) if options.get("batch_first") else (length, B, E))


OPTIONS = {
    "plain": dict(),
    "norm_first": dict(norm_first=True, batch_first=True),
    "gelu": dict(activation="gelu", batch_first=True),
    "gelu module": dict(activation=nn.GELU(approximate="tanh"), norm_first=True),
    "callable": dict(activation=F.silu, batch_first=True),
    "no bias": dict(bias=False, layer_norm_eps=1e-3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_encoder_layer(options):
    for masks in ((None, None), (CAUSAL, None), (None, PADDING), (-torch.inf == CAUSAL, PADDING)):

        def make(seed, masks=masks):
            return *layers("Encoder", seed, **options), [sequence(options, L), *masks]

        assert_parity(make, lambda module, t: [module(*t)], gradients=masks[0] is None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoder_layer(options):
    for masks in ((None, None, None, None), (CAUSAL, None, None, MEMORY_PADDING), (None, torch.randn(L, S), PADDING, None)):

        def make(seed, masks=masks):
            return *layers("Decoder", seed, **options), [sequence(options, L), sequence(options, S), *masks]

        assert_parity(make, lambda module, t: [module(*t)], gradients=masks[0] is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["norm_first"]], ids=["plain", "norm_first"])
def test_stacks(options, dtype):
    def encoders(seed):
        return *stacks("Encoder", seed, **options), [sequence(options, L), -torch.inf == CAUSAL, PADDING]

    def decoders(seed):
        return *stacks("Decoder", seed, **options), [sequence(options, L), sequence(options, S), CAUSAL, MEMORY_PADDING]

    assert_parity(encoders, lambda module, t: [module(*t)], dtype)
    assert_parity(decoders, lambda module, t: [module(t[0], t[1], t[2], memory_key_padding_mask=t[3])], dtype)


def whole(encoders=2, decoders=2, **options):
    return twins(E, H, encoders, decoders, HIDDEN, 0.0, ours=ours.Transformer, theirs=nn.Transformer, **options)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first):
    options = dict(batch_first=batch_first)

    def make(seed):
        return *whole(seed=seed, **options), [sequence(options, S), sequence(options, L), CAUSAL, MEMORY_PADDING]

    def call(module, t):
        return [module(t[0], t[1], tgt_mask=t[2], src_key_padding_mask=t[3], memory_key_padding_mask=t[3])]

    assert_parity(make, call)
    with torch.no_grad():  # torch's fast path as well, of rows that are no padding
        torch.backends.mha.set_fastpath_enabled(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, own, tensors = make(0)
            results = [call(module.eval(), tensors)[0] for module in (theirs, own)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_initial_values_types_and_names():
    built = []
    for kind in (nn.Transformer, ours.Transformer):
        torch.manual_seed(0)
        built.append(kind(E, H, 1, 2, HIDDEN))
    first, second = (module.state_dict() for module in built)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    assert all(isinstance(b, type(a)) for a, b in zip(built[0].modules(), built[1].modules(), strict=True))
    custom = ours.Transformer(E, H, custom_encoder=nn.Identity(), num_decoder_layers=1, dim_feedforward=HIDDEN)
    assert isinstance(custom.encoder, nn.Identity) and len(custom.decoder.layers) == 1
    found = [module.backend for module in ours.Transformer(E, H, 1, 1, HIDDEN, backend="eager").modules() if hasattr(module, "backend")]
    assert found == ["eager"] * 3


def test_stacks_take_layers_of_any_kind_and_warn_of_nothing():
    x = torch.randn(L, B, E)
    layer = nn.TransformerEncoderLayer(E, H, HIDDEN, 0.0)
    torch.testing.assert_close(ours.TransformerEncoder(layer, 1)(x), layer(x))
    assert ours.TransformerEncoder(ours.TransformerEncoderLayer(E, H), 1).enable_nested_tensor


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_errors_are_torchs():
    cases = [
        (layers("Encoder"), (torch.randn(L, B, E), torch.zeros(L, L + 1))),
        (layers("Encoder"), (torch.randn(L, B, E), None, torch.zeros(B, L + 1, dtype=torch.bool))),
        (stacks("Encoder"), (torch.randn(L, B, E), None, None, True)),
        (layers("Decoder"), (torch.randn(L, B, E), torch.randn(S, B, E), torch.zeros(L + 1, L))),
        (stacks("Decoder"), (torch.randn(L, B, E), torch.randn(S, B, E), None, torch.zeros(L, S + 1))),
        (whole(), (torch.randn(S, B, E), torch.randn(L, B + 1, E))),
        (whole(batch_first=True), (torch.randn(B, S, E + 1), torch.randn(B, L, E))),
    ]
    for modules, arguments in cases:
        found = []
        for module in modules:
            with pytest.raises((RuntimeError, AssertionError)) as error:
                module(*arguments)
            found.append((type(error.value), str(error.value)))
        assert found[0] == found[1]
    for kind in (nn.TransformerEncoderLayer, ours.TransformerEncoderLayer):
        with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
            kind(E, H, activation="swish")


def test_the_causal_mask_is_recognised(monkeypatch):
    """Without a hint, as torch's stacks do; a mask that only looks like it is none."""
    seen = []
    attend = ours.MultiheadAttention.forward

    def forward(self, *args, **kwargs):
        seen.append(kwargs["is_causal"])
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(ours.MultiheadAttention, "forward", forward)
    encoder, x = stacks("Encoder")[1], torch.randn(L, B, E)
    for mask, hint, expected in (
        (CAUSAL, None, True),
        (-torch.inf == CAUSAL, None, True),
        (CAUSAL.clamp(-9), None, False),
        (CAUSAL, False, False),
        (None, None, False),
        (CAUSAL.expand(B * H, L, L), None, False),
    ):
        seen.clear()
        encoder(x, mask, is_causal=hint)
        assert seen == [expected, expected]


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inference_keeps_nothing_stale(kind, norm_first):
    theirs, own = (module.eval() for module in layers(kind, norm_first=norm_first, activation="gelu"))
    inputs = (torch.randn(L, B, E),) if kind == "Encoder" else (torch.randn(L, B, E), torch.randn(S, B, E))

    def check():
        with torch.no_grad():
            torch.testing.assert_close(own(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)

    check()
    with torch.no_grad():
        for module in (theirs, own):
            module.linear1.weight.mul_(2), module.linear2.bias.add_(1)
    check()
    for module in (theirs, own):
        module.train()
        module.linear2.weight.data.mul_(2)  # bumps no version: train() and eval() make it forget
        module.eval()
    check()
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        with torch.no_grad():
            torch.testing.assert_close(copied(*inputs), own(*inputs))
    seen = []
    for name, part in own.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    check()
    assert sorted(seen) == sorted(name for name, _ in own.named_modules())
    own.half()
    assert not own._kept


def test_training_draws_from_torchs_generator():
    layer, x = ours.TransformerEncoderLayer(E, H, HIDDEN, 0.5), torch.randn(L, B, E)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_compile_and_autocast():
    theirs, own = (module.eval() for module in whole(1, 1, batch_first=True, norm_first=True))
    inputs = torch.randn(B, S, E), torch.randn(B, L, E)
    options = dict(tgt_mask=CAUSAL, src_key_padding_mask=MEMORY_PADDING, memory_key_padding_mask=MEMORY_PADDING)
    torch._dynamo.reset()
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = theirs(*inputs, **options)
        torch.testing.assert_close(compiled(*inputs, **options), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = (module(*inputs, **options) for module in (own, theirs))
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    layer = own.encoder.layers[0].train()
    calls = (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    first, second = (torch.autograd.grad(call(inputs[0]).square().sum(), list(layer.parameters())) for call in calls)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_torchs_own():
    torch.backends.mha.set_fastpath_enabled(True)
    theirs, own = (module.eval() for module in stacks("Encoder", batch_first=True))
    with torch.no_grad():
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)])
        found, expected = (module(x).to_padded_tensor(0.0) for module in (own, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def decoder(**options):
    theirs, own = stacks("Decoder", **options)
    at = 1 if options.get("batch_first") else 0
    return theirs.eval(), own.eval(), sequence(options, L), sequence(options, S), at


@pytest.mark.parametrize("steps", [[1] * L, [3, 1, 1], [L]], ids=str)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["norm_first"]], ids=["plain", "norm_first"])
def test_decoding_equals_the_masked_forward(options, steps):
    def make(seed):
        return *stacks("Decoder", seed, **options), [sequence(options, L), sequence(options, S)]

    def call(module, t):
        if not isinstance(module, ours.TransformerDecoder):
            return [module(*t, tgt_mask=CAUSAL.to(t[0].dtype), memory_key_padding_mask=MEMORY_PADDING)]
        cache, found, at = module.new_cache(B, L), [], 1 if options.get("batch_first") else 0
        for index, x in enumerate(t[0].split(steps, at)):
            found.append(module(x, t[1] if index == 0 else None, memory_key_padding_mask=MEMORY_PADDING, cache=cache))
        assert cache.length == L
        return [torch.cat(found, at)]

    assert_parity(make, call, gradients=False)


def test_decoding_of_wide_layers():
    """Wide enough for the kernel of a few rows, where there is one."""
    size, x, memory = 256, torch.randn(B, L, 256), torch.randn(B, S, 256)

    def make(seed):
        options = dict(ours=ours.TransformerDecoderLayer, theirs=nn.TransformerDecoderLayer, seed=seed)
        return *twins(size, H, size, 0.0, batch_first=True, **options), [x, memory]

    def call(module, t):
        if not isinstance(module, ours.TransformerDecoderLayer):
            return [module(*t, tgt_mask=CAUSAL.to(t[0].dtype))]
        cache = module.new_cache(B, L)
        return [torch.cat([module(step, t[1], cache=cache) for step in t[0].split(1, 1)], 1)]

    assert_parity(make, call, gradients=False)


def test_decoding_after_reset_and_reordering():
    """Beam search: at every step the rows are other hypotheses; what was decoded for them moves along."""
    theirs, own, x, memory, _ = decoder(batch_first=True)
    cache = own.new_cache(B, L + 1)
    with torch.no_grad():
        own(x, memory, cache=cache)
        cache.reset()
        memory = memory.flip(0)
        history, rows = x[:, :0], torch.arange(B)
        for step in range(L):
            history = torch.cat([history, x[rows, step : step + 1] + step], 1)
            found = own(history[:, -1:], memory if step == 0 else None, cache=cache)
            mask = nn.Transformer.generate_square_subsequent_mask(step + 1)
            torch.testing.assert_close(found, theirs(history, memory, tgt_mask=mask)[:, -1:], rtol=1e-4, atol=1e-5)
            rows = torch.randint(B, (B,))
            cache.reorder(rows)
            history, memory = history[rows], memory[rows]
        cache.reorder(rows, memory=False)  # rows of one source: what is kept of it stays where it is
        with pytest.raises(ValueError, match="index: expected 3 rows, as many as the memory that stays, got 2"):
            cache.reorder(rows[:2], memory=False)
        history = torch.cat([history[rows], x[:, :1]], 1)
        found = own(history[:, -1:], None, cache=cache)
        mask = nn.Transformer.generate_square_subsequent_mask(L + 1)
        torch.testing.assert_close(found, theirs(history, memory, tgt_mask=mask)[:, -1:], rtol=1e-4, atol=1e-5)


def test_decoding_on_a_layer_compiled_and_refusals():
    _, own, x, memory, _ = decoder(batch_first=True)
    layer = own.layers[0]
    with torch.no_grad():
        cache, expected = layer.new_cache(B, L), layer(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
        found = torch.cat([layer(step, memory, cache=cache) for step in x.split(1, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        compiled, cache = torch.compile(layer, fullgraph=True, backend="aot_eager"), own.new_cache(B, L)
        found = torch.cat([compiled(step, memory, cache=cache[0]) for step in x.split(1, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="more than max_length 5"):
            own(x[:, :1], memory, cache=cache)
        with pytest.raises(ValueError, match="expected one for 2 layers, got 1"):
            own(x, memory, cache=cache[:1])
        with pytest.raises(ValueError, match="keeps no memory yet"):
            own(x, None, cache=own.new_cache(B, L))
        copied = copy.deepcopy(cache)
        copied.reset()
        assert cache.length == L and copied.length == 0 and len(copied) == 2 and copied[0].key.data_ptr() != cache[0].key.data_ptr()
    with pytest.raises(RuntimeError, match="carries no gradients"):
        own(x, memory, cache=own.new_cache(B, L))
