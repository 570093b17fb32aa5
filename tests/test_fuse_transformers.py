"""pyops.fuse on Hugging Face transformers: random weights, small sizes, every family's attention, caches, files."""

import copy
import inspect
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import pyops
from pyops._fusion import transformers_blocks

from .fused import check_inference, check_training, fused

transformers = pytest.importorskip("transformers")

WORDS = 67
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT = dict(vocab_size=WORDS, max_position_embeddings=40)
ENDS = dict(bos_token_id=1, eos_token_id=2)


def bert(**options):
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT, **options))


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, **TEXT))


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=WORDS, max_position_embeddings=40, n_layers=2, n_heads=4, dim=32, hidden_dim=48)
    return transformers.DistilBertModel(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=40, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, **ENDS)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2, pad_token_id=0, **ENDS))


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4))


def swin():
    config = transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return transformers.SwinModel(config)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
    return transformers.ConvNextForImageClassification(config)


def resnet():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 1]))


def whisper():
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    widths = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2, num_mel_bins=8)
    lengths = dict(vocab_size=WORDS, max_source_positions=16, max_target_positions=20)
    config = transformers.WhisperConfig(**heads, **widths, **lengths, pad_token_id=0, decoder_start_token_id=1, **ENDS)
    return transformers.WhisperModel(config)


def clip():
    sizes = SIZES | dict(num_hidden_layers=1)
    text, vision = dict(**sizes, **TEXT, eos_token_id=2), dict(**sizes, image_size=16, patch_size=4)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def tokens(**more):
    return dict(input_ids=torch.randint(3, WORDS, (2, 11)), **more)


def image(size):
    return dict(pixel_values=torch.randn(2, 3, size, size))


def speech():
    return dict(input_features=torch.randn(2, 8, 32), decoder_input_ids=torch.randint(3, WORDS, (2, 7)), use_cache=False)


def pair():
    return dict(tokens(), **image(16))


INPUTS = {
    bert: tokens, roberta: tokens, distilbert: tokens, gpt2: lambda: tokens(use_cache=False), llama: lambda: tokens(use_cache=False),
    t5: lambda: tokens(decoder_input_ids=torch.randint(3, WORDS, (2, 7)), use_cache=False), vit: lambda: image(16),
    swin: lambda: image(32), convnext: lambda: image(64), resnet: lambda: image(32), whisper: speech, clip: pair,
}  # fmt: skip
TEXTS = (bert, roberta, distilbert, gpt2, llama, t5, clip)
FOUND = {  # how many modules become what: attention and layers by their own rewritten forward (""), the others by pyops' or torch's class
    bert: {"GELU": 2}, roberta: {"GELU": 2}, distilbert: {"GELU": 2}, gpt2: {}, llama: {"GatedMLP": 2, "SiLU": 2}, t5: {},
    vit: {"GELU": 2}, swin: {"GELU": 4}, convnext: {"ConvNextLayer": 5, "ChannelNorm": 4, "GELU": 5}, resnet: {"ResidualLayer": 3},
    whisper: {"GELU": 4}, clip: {},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The options of flash_attention's calls from fused models, the smallest too."""
    found = []
    monkeypatch.setattr(transformers_blocks, "PRODUCTS_FROM", 0)
    run = transformers_blocks.flash_attention
    monkeypatch.setattr(transformers_blocks, "flash_attention", lambda *args, **options: found.append(options) or run(*args, **options))
    return found


def name_of(value):
    return value.__name__


def padded(inputs, left):
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(4) if left else slice(-4, None)] = 0
    return dict(inputs, attention_mask=mask)


@pytest.mark.parametrize("make", INPUTS, ids=name_of)
def test_inference(make, calls):
    torch.manual_seed(0)
    found = check_inference(make(), INPUTS[make]())
    assert found["" if make is not convnext else "ConvNextLayer"] > 2 and {name: n for name, n in found.items() if name} == FOUND[make]
    assert bool(calls) == (make not in (convnext, resnet))


@pytest.mark.parametrize("make", TEXTS, ids=name_of)
def test_padding(make, calls):
    torch.manual_seed(0)
    check_inference(make(), padded(INPUTS[make](), left=make in (gpt2, llama, t5)))
    assert any(options["attn_bias"] is not None for options in calls)


@pytest.mark.parametrize("make", [bert, llama, t5, convnext, resnet], ids=name_of)
def test_training(make, calls):
    torch.manual_seed(0)
    inputs = INPUTS[make]()
    check_training(make(), padded(inputs, left=True) if "input_ids" in inputs else inputs)
    assert bool(calls) == ("input_ids" in inputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [gpt2, llama, t5], ids=name_of)
def test_generate(make, cache, calls):
    torch.manual_seed(0)
    model, inputs = make().eval(), padded(tokens(), left=True)
    options = dict(do_sample=False, max_new_tokens=9, min_new_tokens=9, cache_implementation=cache)
    expected = model.generate(**inputs, **options)
    fused(model)
    assert torch.equal(model.generate(**inputs, **options), expected) and calls


SHAPES = {  # B, H, key heads, N, M, D
    "self": (2, 4, 4, 9, 9, 8), "cross": (2, 4, 4, 5, 9, 8), "grouped": (2, 4, 2, 9, 9, 8), "one row": (2, 4, 2, 1, 9, 8),
    "written": (1, 2, 2, 4, 10, 8), "few keys": (1, 2, 2, 10, 4, 8),
}  # fmt: skip


def sdpa():
    return pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward


def heads(shape):
    B, H, G, N, M, D = shape
    return (torch.randn(B, H, N, D), *(torch.randn(B, G, M, D) for _ in range(2)))


def mask_of(kind, shape):
    B, H, _, N, M, _ = shape
    seen = torch.rand(B, 1, N, M) < 0.7
    seen[0, :, 0] = False  # a row that sees nothing
    least = torch.finfo(torch.float32).min
    return {"none": None, "bool": seen, "float": torch.where(seen, 0.0, least), "bias": torch.randn(1, H, N, M)}[kind]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(shape, calls):
    """The function that stands for transformers' own, on what models call it with."""
    torch.manual_seed(0)
    known = 0
    for mask, bias, causal in itertools.product(("none", "bool", "float", "bias"), ("none", "bias"), (None, False, True)):
        module = SimpleNamespace(num_key_value_groups=shape[1] // shape[2], is_causal=True)
        query, key, value = heads(shape)
        attention_mask, position_bias = mask_of(mask, shape), mask_of(bias, shape)
        options = dict(scaling=0.3, is_causal=causal, position_bias=position_bias, sliding_window=None)
        found, weights = transformers_blocks.attention(sdpa())(module, query, key, value, attention_mask, **options)
        expected, _ = sdpa()(module, query, key, value, attention_mask, **options)
        assert weights is None and found.is_contiguous() and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        known += 1
    refused = 4 if shape == SHAPES["few keys"] else 0  # causal ones, whose first query sees the first key alone
    assert len(calls) == known - refused


def test_attention_left_to_transformers(calls):
    module, shape = SimpleNamespace(num_key_value_groups=1, is_causal=False), SHAPES["self"]
    query, key, value = heads(shape)
    attend = transformers_blocks.attention(sdpa())

    def same(*tensors, mask=None, **options):
        expected = sdpa()(module, *tensors, mask, **options)[0]
        torch.testing.assert_close(attend(module, *tensors, mask, **options)[0], expected, rtol=0, atol=0)

    same(query, key, value[..., :4])  # heads of two sizes
    same(query, key, value, mask=torch.ones(9, 9, dtype=torch.bool))
    same(query, key, value, output_attentions=True)
    with pytest.raises(ValueError, match="softcap"):
        attend(module, query, key, value, None, softcap=5.0)
    with pytest.raises(RuntimeError):
        attend(module, query, key, value, torch.ones(2, 1, 9, 8, dtype=torch.bool))
    assert not calls
    for other in (len, transformers.models.bert.modeling_bert.eager_attention_forward):
        assert transformers_blocks.attention(other) is other
    slopes = [torch.func.grad(lambda q, f=f: f(module, q, key, value, None)[0].square().sum())(query) for f in (attend, sdpa())]
    torch.testing.assert_close(*slopes, rtol=0, atol=0)
    assert not calls
    same(query.double(), key.double(), value.double())  # PyTorch's op, by another way
    assert len(calls) == 1


def test_small_attention_is_pytorchs(calls, monkeypatch):
    monkeypatch.undo()
    model, inputs = bert().eval(), tokens()
    with torch.no_grad():
        expected = model(**inputs).pooler_output
        fused(model)
        torch.testing.assert_close(model(**inputs).pooler_output, expected)
    assert not calls


def test_attention_that_was_chosen(calls):
    """With weights to be returned, and another function registered by the user."""
    torch.manual_seed(0)
    model, inputs = bert(attn_implementation="eager").eval(), tokens(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        expected = model(**inputs)
        found = fused(model) or model(**inputs)
    assert not calls and len(found.attentions) == 2 and len(found.hidden_states) == 3
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens(), output_hidden_states=True).hidden_states[0].shape, expected.hidden_states[0].shape)
    assert calls


def test_dropout_is_drawn(calls):
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3).train()
    fused(model)
    inputs = tokens()

    def run(seed):
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1)) and all(options["dropout_p"] == 0.3 for options in calls)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [llama, whisper, convnext], ids=name_of)
def test_gradient_checkpointing_hooks_and_autocast(make, calls):
    torch.manual_seed(0)
    model, inputs = make().eval(), INPUTS[make]()
    twin, seen = copy.deepcopy(model), []
    fused(model)
    part = next(part for part in model.modules() if type(part).__name__ in ("SiLUActivation", "GELUActivation"))
    part.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**inputs)[0], twin(**inputs)[0], rtol=0.05, atol=0.05)
    assert seen
    if make is convnext:
        return
    for one in (model, twin):
        one.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        one(**inputs)[0].square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which the tracer reads
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [vit, convnext], ids=name_of)
def test_compiled_and_traced(make, calls):
    torch.manual_seed(0)
    model, inputs = make().eval(), INPUTS[make]()
    with torch.no_grad():
        expected = model(**inputs).logits
        fused(model)
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert not calls
        traced = torch.jit.trace(model, inputs["pixel_values"], strict=False)
        torch.testing.assert_close(traced(inputs["pixel_values"])["logits"], expected, rtol=1e-4, atol=1e-5)
    assert "aten::" in str(traced.inlined_graph) and "pyops::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("make", [convnext, resnet], ids=name_of)
def test_replaced_layers_and_hooks(make):
    """What was put in the place of a layer is what runs, and who watches one sees it."""
    torch.manual_seed(0)
    model, x, seen = make().eval(), INPUTS[make](), []
    fused(model)
    with torch.no_grad():
        before = model(**x).logits
        layer = next(part for part in model.modules() if type(part).__name__ in ("ConvNextLayer", "ResNetBottleNeckLayer"))
        if make is convnext:
            layer.act, layer.drop_path = torch.nn.Tanh(), torch.nn.Hardtanh(-0.1, 0.1)
            layer.layer_scale_parameter = torch.nn.Parameter(torch.full_like(layer.layer_scale_parameter, 2.0))
        else:
            layer.layer[-1].activation, layer.activation = torch.nn.Tanh(), torch.nn.Softplus()
        found = model(**x).logits
        assert not torch.allclose(found, before, rtol=1e-3)
        (layer.pwconv2 if make is convnext else layer.layer[-1].normalization).register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(**x).logits, found, rtol=1e-4, atol=1e-5)
        pyops.unfuse(model)
        torch.testing.assert_close(found, model(**x).logits, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


@pytest.mark.parametrize("make", [bert, llama, convnext, resnet], ids=name_of)
def test_files_and_config(make, tmp_path):
    model, plain = make().eval(), type(make())
    config, signature = copy.deepcopy(model.config.to_dict()), inspect.signature(model.forward)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fused(model)
    assert model.config.to_dict() == config and inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [plain.__name__]
    loaded = plain.from_pretrained(tmp_path)
    assert type(loaded) is plain and not any("_fused_attributes" in part.__dict__ for part in loaded.modules())
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items()) and len(loaded.state_dict()) == len(
        weights
    )
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and type(pyops.unfuse(copied)) is plain
