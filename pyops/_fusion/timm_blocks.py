"""timm's layers and blocks that pyops.nn has the kernels of: rules for timm 1.0.31, and classes that view a block's layers as pyops.nn's.

A view holds the block's own layers and is made anew when one was replaced. Where the layers are not what kernels know, or someone follows
them one by one, the block runs timm's code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyops._fusion import runs
from pyops._fusion.rules import Change, alias, rule
from pyops._fusion.views import Viewed
from pyops.nn import _mlp, _training, attention, conv, convnext, densenet, norm
from pyops.nn._derived import ALIASES, Derived, has_hooks, kind_of
from pyops.nn.chain import Chained, ConvChain, runs_apart
from pyops.nn.conv import BatchNormAct, can_fold, inside, name_of
from pyops.nn.mbconv import MBConv
from pyops.ops.window_attention import window_attention

alias("timm.layers.norm_act.BatchNormAct2d", BatchNormAct, "c28f8628ce5987e5")
alias("timm.layers.norm.LayerNorm", nn.LayerNorm, "2ff0581f04a36df4")
alias("timm.layers.activations.Swish", nn.SiLU, "a8d721c27db5b2f3")
alias("timm.layers.activations.HardSwish", nn.Hardswish, "1e660c33c7c689bb")
alias("timm.layers.activations.GELU", nn.GELU, "1e43e534dfa82a99")
alias("timm.layers.activations.Sigmoid", nn.Sigmoid, "3affc091bb0ed472")
alias("timm.layers.activations.HardSigmoid", nn.Hardsigmoid, "36ece3e10f38cc29")
alias("timm.layers.activations.Tanh", nn.Tanh, "29c9664a4c3a6ba8")


def _does_nothing(*layers: Any) -> bool:
    return all(kind_of(layer) is nn.Identity and not has_hooks(layer) for layer in layers)


class DropPath(conv.DropPath):
    """timm's share is called drop_prob, and the samples that stay need not be scaled."""

    drop_prob: float
    scale_by_keep: bool

    @property
    def p(self) -> float:  # type: ignore[override]
        return self.drop_prob

    def draw(self, input: Tensor) -> Tensor | None:
        keep = super().draw(input)
        return keep if keep is None or self.scale_by_keep else keep.sign()


class _Squeeze(conv.SqueezeExcitation):
    """Squeeze-excitation whose layers have other names, between which there may be some that do nothing."""

    layer_kinds = (*conv.SqueezeExcitation.layer_kinds, nn.Identity)

    def forward(self, input: Tensor, means: Tensor | None = None) -> Tensor:
        if runs_apart(input) or not self.is_standard():
            return super(conv.SqueezeExcitation, self).forward(input)
        return super().forward(input, means)


class SqueezeExcite(_Squeeze):
    """The one of timm's mobile networks."""

    fc1 = property(lambda self: self.conv_reduce)
    fc2 = property(lambda self: self.conv_expand)
    activation = property(lambda self: self.act1)
    scale_activation = property(lambda self: self.gate)


class SEModule(_Squeeze):
    """The one of timm's residual networks."""

    add_maxpool: bool
    bn: nn.Module
    activation = property(lambda self: self.act)
    scale_activation = property(lambda self: self.gate)

    def is_standard(self) -> bool:
        return not self.add_maxpool and kind_of(self.bn) is nn.Identity and super().is_standard()


class _Block(MBConv):
    """The layers of a block of timm's, as MBConv has them."""

    def __init__(self, layers: list[Any], drop: conv.DropPath, adds: bool, expands: bool):
        nn.Module.__init__(self)
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = drop
        self.use_res_connect, self.expands = adds, expands
        self.kinds = tuple(kind_of(layer) for layer in layers)
        self.out_channels, self.backend = layers[-1][0].out_channels, None


class DepthwiseSeparableConv(Viewed):
    """Without a convolution that expands."""

    wide: tuple[tuple[str, ...], ...] = (("conv_dw", "bn1", "aa"),)
    last: tuple[str, ...] = ("conv_pw", "bn2")

    def forward(self, x: Tensor) -> Tensor:
        view = None if runs_apart(x) else self.view(self.make, self.has_skip)
        return super().forward(x) if view is None else view(x)

    def make(self) -> _Block | None:
        """None where the layers are none of MBConv's."""
        return _block_of(self, self.wide, self.last)


class InvertedResidual(DepthwiseSeparableConv):
    wide = (("conv_pw", "bn1"), ("conv_dw", "bn2", "aa"))
    last = ("conv_pwl", "bn3")


def _block_of(block: Any, wide: tuple[tuple[str, ...], ...], last: tuple[str, ...]) -> _Block | None:
    layers = [[getattr(block, name) for name in names] for names in (*wide, last)]
    squeeze = [block.se] if kind_of(block.se) is conv.SqueezeExcitation else []
    layers[-2] += [] if squeeze else [block.se]
    drops = block.has_skip and kind_of(block.drop_path) is conv.DropPath
    layers[-1] += [block.drop_path] if block.has_skip and not drops else []
    chains = [ConvChain(part, None) for part in layers]
    if block.conv_s2d is not None or any(chain.activation is None for chain in chains) or not _training.is_depthwise(block.conv_dw):
        return None
    return _Block([*chains[:-1], *squeeze, chains[-1]], block.drop_path if drops else conv.DropPath(), block.has_skip, len(wide) == 2)


class LayerNorm2d(norm.LayerNorm2d):
    """timm's is a LayerNorm with permutations around it."""

    backend = None

    def forward(self, input: Tensor) -> Tensor:
        plain = runs_apart(input) or self._fast_norm or input.dim() != 4
        return super(norm.LayerNorm2d, self).forward(input) if plain else super().forward(input)

    def extra_repr(self) -> str:
        return super(norm.LayerNorm2d, self).extra_repr()


class LayerScale(nn.Module):
    """The kind of timm's: ``input * gamma``, channels last."""

    gamma: nn.Parameter


alias("timm.layers.layer_scale.LayerScale", LayerScale, "f6eaec4c212b2025")


def _is_still(layer: Any) -> bool:
    """Whether dropout, or a drop path, changes nothing."""
    if kind_of(layer) is nn.Identity or (not layer.training and kind_of(layer) in (nn.Dropout, conv.DropPath)):
        return not has_hooks(layer)
    return kind_of(layer) in (nn.Dropout, conv.DropPath) and layer.p == 0 and not has_hooks(layer)


class Mlp(Chained, nn.Module):
    """Two linear layers with an activation between; where it is GELU, they are one kernel in inference."""

    fc1: Any
    act: Any
    drop1: Any
    norm: Any
    fc2: Any
    drop2: Any

    def forward(self, x: Tensor) -> Tensor:
        output = self.infer(x)
        return runs.run(self, ("fc1", "act", "drop1", "norm", "fc2", "drop2"), x) if output is None else output

    def infer(self, x: Tensor, norm: Any = None, scale: Any = None, residual: Tensor | None = None) -> Tensor | None:
        """``scale(mlp(norm(x))) + residual`` by one kernel; None where there is none for the call."""
        widen = self.fc1
        if runs_apart(x) or x.dim() < 2 or kind_of(widen) is not nn.Linear or not can_fold(widen.weight, x):
            return None
        C = x.shape[-1]
        name = _mlp.backend_for(None, x, C)
        if name is None:
            return None
        around, view, kept = self._kept.get("infer", ((), None, None))
        if len(around) != 2 or around[0] is not norm or around[1] is not scale:
            around, view, kept = (norm, scale), nn.ModuleList([self, *(part for part in (norm, scale) if part is not None)]), Derived()
            self._kept["infer"] = around, view, kept
        weights = kept.get(view, lambda: self._prepare(name, C, view, norm, scale), (name, x.dtype, C))
        if weights is None:
            return None
        beside = None if residual is None else residual.reshape(-1, C)
        return _mlp.run(name, x.reshape(-1, C), weights, widen.out_features, None if norm is None else norm.eps, beside).view(x.shape)

    def _prepare(self, name: str, C: int, view: nn.ModuleList, norm: Any, scale: Any) -> Any:
        """The kernel's weights, or None where it cannot stand for the layers."""
        widen, narrow = self.fc1, self.fc2
        if any(has_hooks(part) for part in view.modules()) or kind_of(narrow) is not nn.Linear or name_of(self.act) != "gelu":
            return None
        drops = [part for part in (self.drop1, self.drop2) if kind_of(part) is not nn.Dropout or part.training]
        ends = (widen.in_features, narrow.in_features, narrow.out_features) == (C, widen.out_features, C)
        if drops or not ends or widen.bias is None or narrow.bias is None or kind_of(self.norm) is not nn.Identity:
            return None
        if norm is not None and (kind_of(norm) is not nn.LayerNorm or tuple(norm.normalized_shape) != (C,)):
            return None
        if scale is not None and kind_of(scale) not in (nn.Identity, LayerScale):
            return None
        return _mlp.prepare(name, norm, widen, narrow, scale.gamma if kind_of(scale) is LayerScale else None)


class Attention(attention.Attention):
    """Without a norm of queries, keys or outputs, and without a gate; timm's code where there are such."""

    backend = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        both = is_causal and attn_mask is not None
        if both or x.dim() != 3 or not self.is_standard():
            return super(attention.Attention, self).forward(x, attn_mask, is_causal)
        return super().forward(x, attn_mask, is_causal)

    def is_standard(self) -> bool:
        own: Any = self
        plain = own.gate is None and _does_nothing(own.q_norm, own.k_norm, own.norm)
        scaled = own.fused_attn or own.scale == own.head_dim**-0.5
        return plain and scaled and own.training == own.attn_drop.training


class Block(nn.Module):
    """A vision transformer's."""

    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        known = isinstance(self.mlp, Mlp) and _is_still(self.drop_path2)
        output = self.mlp.infer(x, self.norm2, self.ls2, x) if known else None
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) if output is None else output


class WindowAttention(nn.Module):
    """The kind of Swin's, which the block runs."""


alias("timm.models.swin_transformer.WindowAttention", WindowAttention, "2c058cd72a7df095")


class SwinTransformerBlock(nn.Module):
    """Windows are found on the map as the qkv layer leaves it."""

    norm1: Any
    attn: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    drop_path2: Any
    window_size: Any
    shift_size: Any
    input_resolution: Any
    dynamic_mask: bool

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        known = isinstance(self.mlp, Mlp) and _is_still(self.drop_path2)
        output = self.mlp.infer(x, self.norm2, None, x) if known else None
        if output is not None:
            return output
        B, H, W, C = x.shape
        tokens = x.reshape(B, -1, C)
        return (tokens + self.drop_path2(self.mlp(self.norm2(tokens)))).reshape(B, H, W, C)

    def _attn(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        if runs_apart(x) or not self._has_windows(x, attn):
            return super()._attn(x)  # type: ignore[misc]
        p = attn.attn_drop.p if attn.training else 0.0
        table = attn.relative_position_bias_table
        sizes = attn.num_heads, tuple(attn.window_size), tuple(self.shift_size)
        output = window_attention(attn.qkv(x), *sizes, table, attn.qkv.bias, scale=attn.scale, dropout_p=p)
        return attn.proj_drop(attn.proj(output))

    def _has_windows(self, x: Tensor, attn: Any) -> bool:
        """Whether the op's windows are timm's, which rolls the map before it fills up the last ones, and whose mask is of one size."""
        layers = (attn.qkv, attn.attn_drop, attn.softmax)
        if kind_of(attn) is not WindowAttention or has_hooks(attn) or any(has_hooks(layer) for layer in layers):
            return False
        if kind_of(attn.qkv) is not nn.Linear or kind_of(attn.attn_drop) is not nn.Dropout or attn.attn_drop.p >= 1:
            return False
        sides = list(zip(x.shape[1:3], self.window_size, self.shift_size, strict=True))
        fills = any(size % window for size, window, _ in sides)
        covers = any(shift and size <= window for size, window, shift in sides)
        shifts = any(self.shift_size)
        masked = self.dynamic_mask or tuple(self.input_resolution) == tuple(x.shape[1:3])
        return attn.training == attn.attn_drop.training and not (shifts and (fills or covers or not masked))


class _ConvNeXtView(convnext.ConvNeXtBlock):
    """The layers of a block of timm's, as ConvNeXtBlock has them."""

    def __init__(self, block: Any):
        nn.Module.__init__(self)
        widen, narrow = convnext.Permute((0, 2, 3, 1)), convnext.Permute((0, 3, 1, 2))
        self.block = nn.Sequential(block.conv_dw, widen, block.norm, block.mlp.fc1, block.mlp.act, block.mlp.fc2, narrow)
        self.stochastic_depth = conv.DropPath() if kind_of(block.drop_path) is nn.Identity else block.drop_path
        self.gamma, self.backend = block.gamma, None

    layer_scale = property(lambda self: self.gamma[:, None, None])


class ConvNeXtBlock(Viewed):
    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        if runs_apart(x) or not self.is_standard():
            return super().forward(x)
        return self.view(lambda: _ConvNeXtView(self), *mlp._modules.values(), self.gamma)(x)

    def is_standard(self) -> bool:
        """Whether there is nothing between or around the layers that ConvNeXtBlock has."""
        own: Any = self
        if not isinstance(own.mlp, Mlp) or own.use_conv_mlp or own.gamma is None or has_hooks(own.mlp) or own.mlp.norm is None:
            return False
        drops = _does_nothing(own.drop_path) or kind_of(own.drop_path) is conv.DropPath
        return drops and _does_nothing(own.shortcut, own.mlp.norm) and _is_still(own.mlp.drop1) and _is_still(own.mlp.drop2)


class DenseLayer(densenet.DenseLayer):
    """Its batch norms activate on their own."""

    backend = None
    layer_kinds = (BatchNormAct, nn.ReLU, nn.Conv2d, nn.Identity)
    relu1 = relu2 = staticmethod(lambda x: x)  # type: ignore[assignment]

    def is_standard(self) -> bool:
        norms: tuple[Any, ...] = (self.norm1, self.norm2)
        relu = all(kind_of(layer) is BatchNormAct and [kind_of(part) for part in inside(layer)] == [nn.ReLU] for layer in norms)
        return relu and super().is_standard()


ALIASES[DropPath] = conv.DropPath
ALIASES[SqueezeExcite] = ALIASES[SEModule] = conv.SqueezeExcitation
ALIASES[DenseLayer] = densenet.DenseLayer


@rule("timm.layers.drop.DropPath", "8c608a6bd5c32271")
def drop_path(module: Any) -> Change:
    return Change(DropPath)


@rule("timm.layers.squeeze_excite.SEModule", "98235205b83aeca1")
@rule("timm.models._efficientnet_blocks.SqueezeExcite", "1ca6db80f00838c3")
@rule("timm.layers.norm.LayerNorm2d", "31f72f5911940cc9")
@rule("timm.layers.mlp.Mlp", "a2035494666ab3fd")
@rule("timm.models.vision_transformer.Block", "0d798b57210763a1")
@rule("timm.models.swin_transformer.SwinTransformerBlock", "ededbda8b14c4548")
@rule("timm.models.densenet.DenseLayer", "dd239d0601be89b7")
def same_name(module: Any) -> Change:
    return Change(globals()[type(module).__name__], whole=False)


@rule("timm.models._efficientnet_blocks.InvertedResidual", "4b6acdcaed90762a")
@rule("timm.models._efficientnet_blocks.DepthwiseSeparableConv", "f127f40c030132a5")
def mobile(module: Any) -> Change:
    known = type(module.conv_dw) is nn.Conv2d and _training.is_depthwise(module.conv_dw) and module.conv_s2d is None
    return Change(globals()[type(module).__name__] if known else None, whole=False)


@rule("timm.layers.attention.Attention", "62f37b1357e2592f")
def vit_attention(module: Any) -> Change:
    norms = (module.q_norm, module.k_norm, module.norm)
    plain = module.gate is None and all(type(layer) is nn.Identity for layer in norms)
    return Change(Attention if plain else None, whole=False)


@rule("timm.models.convnext.ConvNeXtBlock", "6df8423df8556d07")
def convnext_block(module: Any) -> Change:
    return Change(None if module.use_conv_mlp or module.gamma is None else ConvNeXtBlock, whole=False)


@rule("timm.models.densenet.DenseBlock", "2cfae7ee24d6a5f9")
def dense_block(module: Any) -> Change:
    return Change(densenet.DenseBlock, {"backend": None}, whole=False)
