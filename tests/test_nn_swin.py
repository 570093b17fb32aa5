"""Swin's parts against a plain PyTorch twin and against torchvision's classes, and what they keep between calls."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyops
from pyops.nn import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
    WindowAttention,
)
from pyops.nn.linear import BlockLinear

from .conftest import assert_gate

BLOCKS = {1: SwinTransformerBlock, 2: SwinTransformerBlockV2}
ATTENTIONS = {1: ShiftedWindowAttention, 2: ShiftedWindowAttentionV2}
VERSIONS = pytest.mark.parametrize("version", [1, 2])
MAPS = {  # height, width, window, shift
    "plain": (8, 12, (4, 4), (0, 0)),
    "shifted": (8, 12, (4, 4), (2, 2)),
    "padded": (9, 13, (4, 5), (2, 1)),
    "one_window": (5, 6, (7, 7), (3, 3)),
    "one_row": (3, 20, (4, 6), (2, 3)),
}
DIM, HEADS = 24, 3


def attention_twin(layer, x):
    """The layer's attention with the map padded, rolled and cut into windows."""
    (_, H, W, C), heads = x.shape, layer.num_heads
    extents = [-(-size // side) * side for size, side in zip((H, W), layer.window_size, strict=True)]
    shifts = [by if extent > side else 0 for by, side, extent in zip(layer.shift_size, layer.window_size, extents, strict=True)]

    def windows(t):  # [B, P, Q, C] -> [B, windows, tokens, C]
        t = t.roll([-by for by in shifts], (1, 2))
        t = t.unflatten(2, (-1, layer.window_size[1])).unflatten(1, (-1, layer.window_size[0]))
        return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    bias = layer.qkv.bias
    cosine = hasattr(layer, "logit_scale")
    if cosine and bias is not None:
        bias = bias * torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype).repeat_interleave(C)
    padded = F.pad(x, (0, 0, 0, extents[1] - W, 0, extents[0] - H))
    q, k, v = F.linear(windows(padded), layer.qkv.weight, bias).unflatten(3, (3, heads, C // heads)).permute(3, 0, 1, 4, 2, 5)
    if cosine:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = scores * layer.logit_scale.clamp(max=torch.tensor(100.0).log().item()).exp()
        table = 16 * layer.cpb_mlp(layer.relative_coords_table).flatten(0, 2).sigmoid()
    else:
        scores = q @ k.transpose(-1, -2) / (C // heads) ** 0.5
        table = layer.relative_position_bias_table
    tokens = q.shape[-2]
    scores = scores + table[layer.relative_position_index].view(tokens, tokens, heads).permute(2, 0, 1)
    for axis, by in enumerate(shifts):  # what the roll brought around is apart from what it did not
        around = torch.arange(extents[axis]) < by
        around = around.view((1, -1, 1, 1) if axis == 0 else (1, 1, -1, 1)).expand(1, *extents, 1)
        own = windows(around)[0, :, :, 0]
        scores = scores - 100.0 * (own[:, :, None] != own[:, None])[:, None].to(x.dtype)
    rows = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
    rows = F.linear(rows, layer.proj.weight, layer.proj.bias)
    wh, ww = layer.window_size
    back = rows.unflatten(1, (extents[0] // wh, -1)).unflatten(3, (wh, ww)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return back.roll(shifts, (1, 2))[:, :H, :W]


def block_twin(block, x):
    if isinstance(block, SwinTransformerBlockV2):
        x = x + block.stochastic_depth(block.norm1(attention_twin(block.attn, x)))
        return x + block.stochastic_depth(block.norm2(block.mlp(x)))
    x = x + block.stochastic_depth(attention_twin(block.attn, block.norm1(x)))
    return x + block.stochastic_depth(block.mlp(block.norm2(x)))


def build(version, window=(4, 4), shift=(2, 2), seed=0, kind=BLOCKS, **options):
    torch.manual_seed(seed)
    place = (DIM, HEADS, window, shift) if kind is BLOCKS else (DIM, window, shift, HEADS)
    return scatter(kind[version](*place, **options), seed)


def scatter(module, seed=0):
    """Parameters that are no longer zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return module


def feature_map(H=8, W=12, B=2, seed=0):
    return torch.randn(B, H, W, DIM, generator=torch.Generator().manual_seed(seed))


def observed(call, module, x):
    """The output in training and gradients for a fixed cotangent."""
    x = x.detach().to(next(module.parameters()).dtype).requires_grad_()
    y = call(module, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], cotangent)]


def assert_training(draw):
    """Holds `observed`'s results, ours, the truth and eager's, to the gate."""
    draw = cache(draw)
    assert_gate(lambda seed: [results[:1] for results in draw(seed)], torch.float32)
    assert_gate(lambda seed: [results[1:] for results in draw(seed)], torch.float32, gradient=True)


def call(module, x):
    return module(x)


def quiet(call, *args):
    with torch.no_grad():
        return call(*args)


@VERSIONS
@pytest.mark.parametrize("place", MAPS)
def test_training(version, place):
    H, W, window, shift = MAPS[place]

    def draw(seed):
        block, x = build(version, window, shift, seed).train(), feature_map(H, W, seed=seed)
        return observed(call, block, x), observed(block_twin, copy.deepcopy(block).double(), x), observed(block_twin, block, x)

    assert_training(draw)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["shifted", "padded", "one_window"])
def test_inference(version, place, dtype):
    H, W, window, shift = MAPS[place]

    def draw(seed):
        block, x = build(version, window, shift, seed).eval().to(dtype), feature_map(H, W, seed=seed).to(dtype)
        found = quiet(block, x)
        assert found.dtype == dtype and torch.equal(found, quiet(block, x))
        return [found], [quiet(block_twin, copy.deepcopy(block).double(), x.double())], [quiet(block_twin, block, x)]

    assert_gate(draw, dtype)


@pytest.mark.parametrize("biases", [(False, True), (True, False)], ids=str)
@VERSIONS
def test_without_a_bias(version, biases):
    layer = build(version, (4, 5), (2, 1), kind=ATTENTIONS, qkv_bias=biases[0], proj_bias=biases[1]).eval()
    x = feature_map(9, 13)
    assert ((layer.qkv.bias is not None), (layer.proj.bias is not None)) == biases
    torch.testing.assert_close(quiet(layer, x), quiet(attention_twin, layer, x), rtol=1e-4, atol=1e-5)


def test_names():
    attention = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_index"]
    first, second = (build(version) for version in (1, 2))
    outside = [f"{part}.{name}" for part in ("norm1", "norm2", "mlp.0", "mlp.3") for name in ("weight", "bias")]
    own = [*attention, "relative_position_bias_table"]
    assert sorted(first.state_dict()) == sorted([*outside, *(f"attn.{name}" for name in own)])
    own = [*attention, "relative_coords_table", "logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
    assert sorted(second.state_dict()) == sorted([*outside, *(f"attn.{name}" for name in own)])
    assert first.attn.relative_position_bias_table.shape == (49, HEADS) and second.attn.logit_scale.shape == (HEADS, 1, 1)
    assert second.attn.relative_coords_table.shape == (1, 7, 7, 2)
    assert WindowAttention is ShiftedWindowAttention
    assert "window_size=(4, 4), shift_size=(2, 2), num_heads=3" in repr(first)
    for block in (first, second):
        bias = block.attn.get_relative_position_bias()
        assert bias.shape == (1, HEADS, 16, 16)
        torch.testing.assert_close(bias[0, :, 0, 5], block.attn._table()[(0 - 1 + 3) * 7 + 0 - 1 + 3])


# ------------------------------------------------------------------------------------------------------------------- torchvision


PAIRS = (
    "ShiftedWindowAttention", "ShiftedWindowAttentionV2", "SwinTransformerBlock", "SwinTransformerBlockV2", "PatchMerging",
    "PatchMergingV2",
)  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("place", ["padded", "one_window", "one_row"])
def test_torchvisions_twin(name, place):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    H, W, *(window, shift) = MAPS[place]
    window, shift = list(window), list(shift)
    arguments = (DIM,) if name.startswith("Patch") else (DIM, HEADS, window, shift) if "Block" in name else (DIM, window, shift, HEADS)
    theirs, ours = (getattr(home, name) for home in (swin, pyops.nn))

    def draw(seed):
        modules = []
        for kind in (theirs, ours):
            torch.manual_seed(seed)
            modules.append(kind(*arguments))
        begun = [module.state_dict() for module in modules]
        assert list(begun[0]) == list(begun[1])
        assert all(torch.equal(begun[0][key], begun[1][key]) for key in begun[0])  # the same numbers from one seed
        scatter(modules[0], seed)
        modules[1].load_state_dict(modules[0].state_dict(), strict=True)
        modules[0].load_state_dict(modules[1].state_dict(), strict=True)
        x = feature_map(H, W, seed=seed)
        return [observed(call, module, x) for module in (modules[1], copy.deepcopy(modules[0]).double(), modules[0])]

    assert_training(draw)


@VERSIONS
def test_within_torchvisions_network(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    networks = []
    for home in (swin, pyops.nn):
        suffix = "V2" if version == 2 else ""
        parts = dict(block=getattr(home, f"SwinTransformerBlock{suffix}"), downsample_layer=getattr(home, f"PatchMerging{suffix}"))
        torch.manual_seed(0)
        networks.append(swin.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.5, num_classes=5, **parts))
    networks[1].load_state_dict(networks[0].state_dict(), strict=True)
    images = torch.randn(3, 3, 40, 52)
    results = []
    for network in networks:
        torch.manual_seed(3)  # of stochastic depth: the same draws
        results.append((network.train()(images).detach(), quiet(network.eval(), images)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------- dropouts


@VERSIONS
def test_dropouts(version):
    x = feature_map()
    layer = build(version, kind=ATTENTIONS, dropout=0.4)
    torch.manual_seed(5)
    found = layer.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(found, F.dropout(attention_twin(layer, x), 0.4), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quiet(layer.eval(), x), quiet(attention_twin, layer, x), rtol=1e-4, atol=1e-5)

    layer = build(version, kind=ATTENTIONS, attention_dropout=0.4)
    torch.testing.assert_close(quiet(layer.eval(), x), quiet(attention_twin, layer, x), rtol=1e-4, atol=1e-5)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(quiet(layer.train(), x))
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2], atol=1e-2)
    torch.manual_seed(0)
    mean = torch.stack([quiet(layer, x) for _ in range(30)]).mean(0)
    expected = quiet(attention_twin, layer, x)
    assert (mean - expected).abs().mean() < 0.3 * (draws[0] - expected).abs().mean()


@VERSIONS
def test_stochastic_depth(version):
    block, x = build(version, stochastic_depth_prob=0.5).train(), feature_map(B=6)
    results = []
    for run in (call, block_twin):
        torch.manual_seed(1)
        results.append(observed(run, block, x))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(quiet(block, x), quiet(block.eval(), x))


# ------------------------------------------------------------------------------------------------------------------ what is kept


def check(block, x):
    torch.testing.assert_close(quiet(block, x), quiet(block_twin, block, x), rtol=1e-4, atol=1e-4)


@VERSIONS
def test_keeps_nothing_stale(version):
    block, x = build(version).eval(), feature_map()
    check(block, x)
    for weight in block.parameters():
        with torch.no_grad():
            weight.mul_(1.3)
        check(block, x)
    block.load_state_dict(build(version, seed=3).state_dict())
    check(block, x)
    for weight in block.parameters():
        weight.data.mul_(0.7)  # bumps no version: train() and eval() make it forget
    check(block.train().eval(), x)
    block.norm2.eps = 0.1
    check(block, x)
    block.mlp[1] = nn.ReLU()  # none of the kernel's: the layers run one by one
    check(block, x)
    block.norm2 = nn.Identity()
    check(block, x)
    copied = copy.deepcopy(block)
    torch.testing.assert_close(quiet(copied, x), quiet(block, x))


@VERSIONS
def test_parts_in_training_and_hooks(version):
    block, x = build(version, dropout=0.5).eval(), feature_map()
    expected = quiet(block, x)
    block.mlp[2].train()
    assert not torch.allclose(quiet(block, x), expected, atol=1e-3)
    block.eval()
    seen = []
    parts = [block.norm1, block.attn, block.attn.proj, block.norm2, block.mlp, block.mlp[1], block.stochastic_depth]
    parts += [block.attn.cpb_mlp, block.attn.cpb_mlp[0]] if version == 2 else [block.attn.qkv]
    for part in parts:
        count = len(seen)
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        for _ in range(2):
            torch.testing.assert_close(quiet(block, x), expected, rtol=1e-4, atol=1e-4)
        assert len(seen) >= count + 2, part
        handle.remove()


def test_keys_without_bias():
    """v2 reads k's bias as zeros: its values change nothing and get no gradient."""
    layer, x = build(2, kind=ATTENTIONS), feature_map(9, 13)
    assert ShiftedWindowAttentionV2(DIM, 4, 2, HEADS).qkv.bias[DIM : 2 * DIM].eq(0).all()
    before = quiet(layer.eval(), x)
    with torch.no_grad():
        layer.qkv.bias[DIM : 2 * DIM] += 7
    torch.testing.assert_close(quiet(layer, x), before, rtol=0, atol=0)
    layer(x).square().sum().backward()
    q, k, v = layer.qkv.bias.grad.chunk(3)
    assert k.eq(0).all() and q.ne(0).any() and v.ne(0).all()


@VERSIONS
def test_replaced_layers(version):
    block, x = build(version).eval(), feature_map()
    for name in ("qkv", "proj"):
        old = getattr(block.attn, name)
        plain = nn.Linear(old.in_features, old.out_features)
        plain.load_state_dict(old.state_dict())
        setattr(block.attn, name, plain)
    check(block, x)


# ------------------------------------------------------------------------------------------------------------------- surroundings


@VERSIONS
def test_autocast_compile_and_empty_batches(version):
    def draw(seed):
        block, x = build(version, seed=seed).eval(), feature_map(9, 13, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, eager = quiet(block, x), quiet(block_twin, block, x)
        assert found.dtype == eager.dtype
        return [found], [quiet(block_twin, block.double(), x.double())], [eager]

    assert_gate(draw, torch.bfloat16)
    block, x = build(version).eval(), feature_map()
    assert quiet(block, x[:0]).shape == (0, 8, 12, DIM)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(quiet(compiled, x), quiet(block, x), rtol=1e-4, atol=1e-4)
    for found, expected in zip(observed(call, compiled, x), observed(call, block, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@VERSIONS
def test_backends_by_name(version):
    x = feature_map()
    expected = quiet(build(version).eval(), x)
    block = build(version, backend="eager").eval()
    assert block.attn.backend == block.attn.qkv.backend == "eager"
    torch.testing.assert_close(quiet(block, x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="window_attention: backend 'vendor' cannot run this call"):
        build(version, backend="vendor")(x)
    with pyops.backend("vendor"):  # which has linear layers of its own
        torch.testing.assert_close(BlockLinear(DIM, 5)(x).shape, (2, 8, 12, 5))


@pytest.mark.parametrize("kind", [PatchMerging, PatchMergingV2])
@pytest.mark.parametrize("shape", [(2, 8, 6), (7, 5), (2, 3, 1, 4)], ids=str)
def test_patch_merging(kind, shape):
    layer, x = scatter(kind(DIM)).eval(), torch.randn(*shape, DIM)
    H, W = shape[-2:]
    padded = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    squares = padded.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # [..., H / 2, 2, W / 2, 2, C]
    rows = squares.transpose(-4, -3).transpose(-3, -2).flatten(-3)
    expected = layer.reduction(layer.norm(rows)) if kind is PatchMerging else layer.norm(layer.reduction(rows))
    torch.testing.assert_close(quiet(layer, x), expected, rtol=1e-4, atol=1e-5)


def test_refusals():
    for change, message in (
        (dict(num_heads=5), "dim, num_heads: expected a multiple of the heads, got 24 and 5"),
        (dict(shift_size=4), "window_size, shift_size: expected 0 <= shift < window, got 4 and 4"),
        (dict(window_size=0), "expected 0 <= shift < window"),
        (dict(attention_dropout=1.0), "attention_dropout: expected 0 to less than 1, got 1.0"),
        (dict(dropout=-0.1), "dropout: expected 0 to 1, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            ShiftedWindowAttention(**(dict(dim=DIM, window_size=4, shift_size=2, num_heads=HEADS) | change))
    with pytest.raises(TypeError, match="ShiftedWindowAttention: window_size: expected an int or two, got \\[4\\]"):
        ShiftedWindowAttention(DIM, [4], [2, 2], HEADS)
    with pytest.raises(ValueError, match="ShiftedWindowAttentionV2: window_size: expected 2 or more"):
        ShiftedWindowAttentionV2(DIM, (4, 1), 0, HEADS)
    with pytest.raises(RuntimeError):
        build(1)(torch.zeros(1, 8, 8, DIM + 1))
