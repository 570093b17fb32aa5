"""torchvision's blocks: which class of pyops.nn each can become.

Most have the names that pyops.nn took from them. Those that add in place, keep layers under other names or call none of their layers are
adapted by a class here. Digests are those of torchvision 0.29.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyops import nn
from pyops._fusion import rules
from pyops._fusion.rules import Change, alias, rule
from pyops._fusion.torch_layers import sequential
from pyops.nn._derived import has_hooks, kind_of
from pyops.nn._mlp import HasMlp
from pyops.nn.conv import FrozenBatchNorm, parts_of
from pyops.nn.convnext import Permute
from pyops.nn.linear import BlockLinear
from pyops.nn.mbconv import BlockView
from pyops.ops import _conv_call

BACKEND = {"backend": None}

alias("torchvision.ops.misc.FrozenBatchNorm2d", FrozenBatchNorm, "6a1420ec4830d565")


class _AddsInPlace:
    """Of a block whose residual is added in place: the sum has the branch's dtype, where pyops.nn's has the wider of the two."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.use_res_connect and _conv_call.autocast(input)[0].dtype != input.dtype:
            return self._original.forward(self, input)
        return super().forward(input)  # type: ignore[misc]


class MBConv(_AddsInPlace, nn.MBConv):
    pass


class FusedMBConv(_AddsInPlace, nn.FusedMBConv):
    pass


class InvertedResidual(BlockView, torch.nn.Module):
    """MobileNetV2's."""

    conv: torch.nn.Sequential
    use_res_connect: bool

    def forward(self, input: Tensor) -> Tensor:
        return self.run_block(self.conv, self.use_res_connect, input)


class _WindowAttention:
    """torchvision's attention reads its layers' tensors and calls neither: hooks on them do not fire, nor does another layer's forward."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if any(kind_of(layer) is not BlockLinear or has_hooks(layer) for layer in (self.qkv, self.proj)):
            return self._original.forward(self, input)
        return super().forward(input)  # type: ignore[misc]


class ShiftedWindowAttention(_WindowAttention, nn.ShiftedWindowAttention):
    pass


class ShiftedWindowAttentionV2(_WindowAttention, nn.ShiftedWindowAttentionV2):
    pass


class EncoderBlock(HasMlp, torch.nn.Module):
    """ViT's."""

    def forward(self: Any, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x = input + self.dropout(self.self_attention(x, x, x, need_weights=False)[0])
        output = self.infer_mlp(x, self.ln_2, x)
        return x + self.mlp(self.ln_2(x)) if output is None else output


# -- layers --------------------------------------------------------------------------------------------------------------------------------


@rule("torchvision.ops.misc.Conv2dNormActivation")
def conv_norm_activation(module: torch.nn.Sequential) -> Change | str:
    if type(module).forward is not torch.nn.Sequential.forward or parts_of(list(module), norm=True) is None:
        return sequential(module)
    return Change(nn.ConvBNAct, BACKEND)


@rule("torchvision.ops.misc.SqueezeExcitation", "a9a00c550d31a4bc")
def squeeze_excitation(module: torch.nn.Module) -> Change:
    return Change(nn.SqueezeExcitation)


@rule("torchvision.ops.stochastic_depth.StochasticDepth", "c69c6f329f219878")
def stochastic_depth(module: Any) -> Change | str:
    return Change(nn.DropPath) if module.mode == "row" else "it drops whole batches"


@rule("torchvision.ops.misc.Permute", "d5c73350cbd2b694")
def permute(module: torch.nn.Module) -> Change:
    return Change(Permute)


@rule("torchvision.models.convnext.LayerNorm2d", "d49fa079315704b5")
def layer_norm_2d(module: torch.nn.LayerNorm) -> Change | str:
    if len(module.normalized_shape) != 1:
        return "it norms more than the channels"
    return Change(nn.LayerNorm2d, {**BACKEND, "num_channels": module.normalized_shape[0]})


# -- blocks of convolutions ----------------------------------------------------------------------------------------------------------------


def _changes(layers: Any) -> list[tuple[torch.nn.Module, Change]]:
    """Those of the layers that are torchvision's, and what they become."""
    known = [(layer, rules.find(type(layer))) for layer in layers]
    found = [(layer, rule(layer)) for layer, rule in known if callable(rule)]
    return [(layer, change) for layer, change in found if isinstance(change, Change)]


def _kinds(layers: Any) -> list[Any]:
    """What the layers become; empty where one of them is another's."""
    changes = _changes(layers)
    return [change.kind for _, change in changes] if len(changes) == len(layers) else []


@rule("torchvision.models.efficientnet.MBConv", "6e551a9cb1f8f37a")
@rule("torchvision.models.mobilenetv3.InvertedResidual", "afa68e118dd1da4e")
def mbconv(module: Any) -> Change | str:
    kinds = _kinds(module.block)
    convs = kinds.count(nn.ConvBNAct)
    if convs not in (2, 3) or kinds[convs - 1 :] not in ([nn.ConvBNAct], [nn.SqueezeExcitation, nn.ConvBNAct]):
        return "its layers are none of an inverted residual's that kernels know"
    attributes: dict[str, Any] = {**BACKEND, "kinds": tuple(kinds), "expands": convs == 3}
    if not hasattr(module, "stochastic_depth"):  # MobileNetV3 drops no branch
        attributes["stochastic_depth"] = nn.DropPath()
    return Change(MBConv, attributes, whole=False)


@rule("torchvision.models.efficientnet.FusedMBConv", "c33159df4d72437d")
def fused_mbconv(module: Any) -> Change | str:
    if set(_kinds(module.block)) != {nn.ConvBNAct}:
        return "its layers are no convolutions with batch norm"
    return Change(FusedMBConv, BACKEND, whole=False)


@rule("torchvision.models.mobilenetv2.InvertedResidual", "dd5cfc75289de937")
def inverted_residual(module: torch.nn.Module) -> Change:
    return Change(InvertedResidual, whole=False)


@rule("torchvision.models.densenet._DenseLayer", "ea699bb047aa3238")
def dense_layer(module: Any) -> Change | str:
    if module.memory_efficient and module.drop_rate > 0:  # with dropout PyTorch's layers run, and save what checkpoints do not
        return "checkpoints with dropout"
    return Change(nn.DenseLayer, BACKEND, whole=False)


@rule("torchvision.models.densenet._DenseBlock", "c2ea2d58ad7e4061")
def dense_block(module: torch.nn.ModuleDict) -> Change:
    return Change(nn.DenseBlock, BACKEND, whole=False)


@rule("torchvision.models.densenet._Transition", "220a98448b42f9f5")
def dense_transition(module: torch.nn.Sequential) -> Change:
    return Change(nn.DenseTransition, BACKEND, whole=False)


@rule("torchvision.models.convnext.CNBlock", "e9974d7ab40045ae")
def convnext_block(module: Any) -> Change | str:
    parts = _changes([*module.block, module.stochastic_depth])
    if [change.kind for _, change in parts] != [Permute, Permute, nn.DropPath]:
        return "its layers are none of a ConvNeXt block's that kernels know"
    return Change(nn.ConvNeXtBlock, BACKEND, parts)


# -- blocks of transformers ----------------------------------------------------------------------------------------------------------------


def _block_linear(*layers: Any) -> list[tuple[torch.nn.Module, Change]]:
    """Those of them that are torch's own, as layers whose weights are kept ready."""
    return [(layer, Change(BlockLinear, {**BACKEND, "activation": "none"})) for layer in layers if type(layer) is torch.nn.Linear]


@rule("torchvision.models.swin_transformer.ShiftedWindowAttention", "5de771713678816d")
@rule("torchvision.models.swin_transformer.ShiftedWindowAttentionV2", "a5358ac0baac51a2")
def window_attention(module: Any) -> Change:
    kind = ShiftedWindowAttentionV2 if hasattr(module, "logit_scale") else ShiftedWindowAttention
    return Change(kind, BACKEND, _block_linear(module.qkv, module.proj))


@rule("torchvision.models.swin_transformer.SwinTransformerBlock", "845ed3709719d1d3")
@rule("torchvision.models.swin_transformer.SwinTransformerBlockV2", "1e9211805ee7df07")
def swin_block(module: torch.nn.Module) -> Change:
    return Change(getattr(nn, type(module).__name__), BACKEND, whole=False)


@rule("torchvision.models.vision_transformer.EncoderBlock", "a1be0c81a861986b")
def encoder_block(module: torch.nn.Module) -> Change:
    return Change(EncoderBlock, BACKEND, whole=False)


@rule("torchvision.models.swin_transformer.PatchMerging", "9cc732967a47fb92")
@rule("torchvision.models.swin_transformer.PatchMergingV2", "a24bfe48e6b9896a")
def patch_merging(module: Any) -> Change:
    return Change(getattr(nn, type(module).__name__), {}, _block_linear(module.reduction), whole=False)
