"""pyops.fuse on Hugging Face transformers: random weights, small sizes, every family's attention, caches, files."""

import copy

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
    text, vision = dict(**SIZES, **TEXT, eos_token_id=2), dict(**SIZES, image_size=16, patch_size=4)
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
    bert: {"GELU": 2}, roberta: {"GELU": 2}, distilbert: {"GELU": 2}, gpt2: {}, llama: {"GatedMLP": 2, "SiLU": 2}, t5: {}, vit: {"GELU": 2},
    swin: {"GELU": 4}, convnext: {"ConvNextLayer": 5, "ChannelNorm": 4, "GELU": 5}, resnet: {}, whisper: {"GELU": 4}, clip: {},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The options of flash_attention's calls from fused models."""
    found = []
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


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("make", TEXTS, ids=name_of)
def test_padding(make, left, calls):
    torch.manual_seed(0)
    check_inference(make(), padded(INPUTS[make](), left))
    assert any(options["attn_bias"] is not None for options in calls)


@pytest.mark.parametrize("make", [bert, llama, t5, convnext], ids=name_of)
def test_training(make, calls):
    torch.manual_seed(0)
    inputs = INPUTS[make]()
    check_training(make(), inputs if make is convnext else padded(inputs, True))
    assert bool(calls) == (make is not convnext)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [gpt2, llama, t5], ids=name_of)
def test_generate(make, cache, calls):
    torch.manual_seed(0)
    model, inputs = make().eval(), padded(tokens(), True)
    options = dict(do_sample=False, max_new_tokens=9, min_new_tokens=9, cache_implementation=cache)
    expected = model.generate(**inputs, **options)
    fused(model)
    assert torch.equal(model.generate(**inputs, **options), expected) and calls
