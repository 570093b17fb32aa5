"""timm's networks through `pyops.fuse`: a small member of each family, and what its blocks become."""

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch

import pyops
from pyops._fusion import rules
from pyops.nn import mbconv

from .fused import check_inference, check_training

timm = pytest.importorskip("timm")


class Case(NamedTuple):
    name: str
    kinds: dict[str, int] = {}  # noqa: RUF012  (never written)  some of what the parts become, and how many
    size: int = 64
    options: dict[str, Any] = {}  # noqa: RUF012


def small(**options):
    """Of networks on tokens, whose positions are as many as the image's."""
    return dict(img_size=64, **options)


TWO_STAGES = dict(depths=(2, 2), num_heads=(3, 6))
CASES = [
    Case("resnet18", {"": 10, "Sequential": 3}),
    Case("resnet26d", {"": 10, "Sequential": 5}),
    Case("seresnet18", {"SEModule": 8}),
    Case("resnext26ts"),
    Case("res2net50_26w_4s"),
    Case("regnetx_002"),
    Case("regnety_002", {"SEModule": 13}),
    Case("densenet121", {"DenseBlock": 4, "DenseLayer": 58}),
    Case("vgg11_bn", {}, 32),
    Case("efficientnet_b0", {"InvertedResidual": 15, "DepthwiseSeparableConv": 1, "SqueezeExcite": 16}),
    Case("efficientnet_lite0", {"InvertedResidual": 15, "DepthwiseSeparableConv": 1}),
    Case("efficientnetv2_rw_t"),
    Case("mobilenetv2_035", {"InvertedResidual": 16}),
    Case("mobilenetv3_small_100", {"InvertedResidual": 10, "SqueezeExcite": 9}),
    Case("mobilenetv4_conv_small"),
    Case("mnasnet_small", {"InvertedResidual": 14, "SqueezeExcite": 10}),
    Case("ghostnet_100", {"SqueezeExcite": 7, "Sequential": 69}),
    Case("hardcorenas_a", {"InvertedResidual": 10}),
    Case("inception_v3", {}, 96),
    Case("xception41p"),
    Case("convnext_atto", {"LayerNorm2d": 17, "Mlp": 12}),
    Case("convnext_tiny", {"ConvNeXtBlock": 4, "Mlp": 4}, 64, dict(depths=(1, 1, 1, 1))),
    Case("convnextv2_atto", {"LayerNorm2d": 17}),
    Case("vit_tiny_patch16_224", {"Block": 2, "Attention": 2, "Mlp": 2}, 64, small(depth=2)),
    Case("deit_tiny_patch16_224", {"Block": 2, "Attention": 2}, 64, small(depth=2)),
    Case("beit_base_patch16_224", {"Mlp": 2}, 64, small(depth=2, embed_dim=48, num_heads=3)),
    Case("swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 4, "Mlp": 4}, 64, small(window_size=4, **TWO_STAGES)),
    Case("swinv2_tiny_window8_256", {"Mlp": 4}, 64, small(window_size=4, **TWO_STAGES)),
    Case("maxvit_pico_rw_256", {"SEModule": 11, "Mlp": 22}, 64, small()),
    Case("mixer_s32_224", {"Mlp": 16}, 64, small()),
    Case("poolformer_s12", {"Mlp": 12}),
    Case("edgenext_xx_small", {"Mlp": 12}),
    Case("mobilevit_xxs", {"Block": 9, "Attention": 9}),
    Case("repvgg_a0", {}, 48),
    Case("dla34", {"Sequential": 7}),
    Case("hrnet_w18_small"),
]


def model_of(case):
    torch.manual_seed(0)
    return timm.create_model(case.name, num_classes=7, **case.options), torch.randn(2, 3, case.size, case.size)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_inference(case):
    found = check_inference(*model_of(case))
    assert {name: found[name] for name in case.kinds} == case.kinds and found.total() > 0


def se_block():
    from timm.layers import SEModule
    from timm.models.resnet import BasicBlock

    return BasicBlock(16, 16, attn_layer=SEModule)


def mobile_block(name, **options):
    from timm.models import _efficientnet_blocks as blocks

    return getattr(blocks, name)(16, 16, se_layer=blocks.SqueezeExcite, drop_path_rate=0.2, **options)


def dense_block():
    return timm.models.densenet.DenseBlock(3, 16, 4, 8)


def convnext_block(**options):
    return timm.models.convnext.ConvNeXtBlock(16, ls_init_value=0.5, drop_path=0.2, **options)


def vit_block(**options):
    return timm.models.vision_transformer.Block(32, 4, qkv_bias=True, init_values=0.5, drop_path=0.2, **options)


def swin_block(shift):
    return timm.models.swin_transformer.SwinTransformerBlock(32, (8, 8), 4, window_size=4, shift_size=shift, drop_path=0.2)


IMAGE, TOKENS, MAP = (4, 16, 10, 10), (3, 20, 32), (2, 8, 8, 32)
BLOCKS = {
    "se": (se_block, IMAGE, {"SEModule": 1}),
    "inverted": (lambda: mobile_block("InvertedResidual", exp_ratio=4, act_layer=torch.nn.SiLU), IMAGE, {"InvertedResidual": 1}),
    "separable": (
        lambda: mobile_block("DepthwiseSeparableConv", act_layer=torch.nn.Hardswish),
        IMAGE,
        {"DepthwiseSeparableConv": 1, "SqueezeExcite": 1},
    ),
    "dense": (dense_block, IMAGE, {"DenseBlock": 1, "DenseLayer": 3}),
    "convnext": (convnext_block, IMAGE, {"ConvNeXtBlock": 1}),
    "convnext-convs": (lambda: convnext_block(conv_mlp=True), IMAGE, {"LayerNorm2d": 1, "Mlp": 1}),
    "vit": (vit_block, TOKENS, {"Block": 1, "Attention": 1, "Mlp": 1}),
    "vit-norms": (lambda: vit_block(qk_norm=True), TOKENS, {"Block": 1, "Attention": 0, "Mlp": 1}),
    "swin": (lambda: swin_block(0), MAP, {"SwinTransformerBlock": 1}),
    "swin-shift": (lambda: swin_block(2), MAP, {"SwinTransformerBlock": 1}),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_training(name):
    """Outputs, gradients and running statistics of the blocks that are not merely rewritten."""
    make, shape, kinds = BLOCKS[name]
    torch.manual_seed(0)
    found = check_training(make(), torch.randn(shape))
    assert {kind: found[kind] for kind in kinds} == kinds


def pair(name):
    """(block, fused block, input) in eval mode."""
    make, shape, _ = BLOCKS[name]
    torch.manual_seed(0)
    block = make().eval()
    return block, pyops.fuse(copy.deepcopy(block)), torch.randn(shape)


def agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_whatever_is_done_to_a_fused_block(name):
    """Hooks on any part, parts that are replaced, other modes, traces, copies and files."""
    block, fused, x = pair(name)
    with torch.no_grad():
        agree(fused(x), block(x))
        seen: dict[torch.nn.Module, list[str]] = {block: [], fused: []}
        hooks = []
        for model in (block, fused):
            for path, part in model.named_modules():
                hooks.append(part.register_forward_hook(lambda *_, model=model, path=path: seen[model].append(path)))
        agree(fused(x), block(x))
        assert seen[fused] == seen[block]
        for hook in hooks:
            hook.remove()
        agree(fused(x), block(x))
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(x), fused(x)) and repr(other) == repr(fused)
        agree(torch.jit.trace(fused, x, check_trace=False)(x), block(x))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fused(x).float(), block(x).float(), rtol=5e-2, atol=5e-2)
        for model in (block, fused):
            for part in model.modules():
                for child, layer in part.named_children():
                    if isinstance(layer, (torch.nn.ReLU, torch.nn.SiLU)) or type(layer).__name__ == "GELU":
                        setattr(part, child, torch.nn.Softsign())
        agree(fused(x), block(x))
    torch.manual_seed(3)
    expected = block.train()(x)
    torch.manual_seed(3)
    agree(fused.train()(x), expected)


def test_compiled():
    block, fused, x = pair("inverted")
    with torch.no_grad():
        agree(torch.compile(fused, backend="eager", fullgraph=True)(x), block(x))


def test_inverted_residuals_run_on_their_kernels(monkeypatch):
    """Neither hooks nor another timm: one call a block in inference."""
    calls = []
    infer = mbconv.MBConv._infer
    monkeypatch.setattr(mbconv.MBConv, "_infer", lambda *args: calls.append(1) or infer(*args))
    block, fused, x = pair("inverted")
    with torch.no_grad():
        agree(fused(x), block(x))
        assert len(calls) == 1
        fused.se.gate.register_forward_hook(lambda *_: None)
        agree(fused(x), block(x))
    assert len(calls) == 1


def test_another_version_is_left_to_the_rewriting(monkeypatch):
    block, _, x = pair("inverted")
    monkeypatch.setattr(rules, "digest", lambda cls: "another")
    fused = pyops.fuse(copy.deepcopy(block))
    assert type(fused) is not type(block) and type(fused)._kind is None
    with torch.no_grad():
        agree(fused(x), block(x))
