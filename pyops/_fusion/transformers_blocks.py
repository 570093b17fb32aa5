"""Hugging Face transformers: its attention on `flash_attention`, its activations behind linear layers, its ConvNeXt and ResNet.

Attention modules ask `ALL_ATTENTION_FUNCTIONS` for the function that their config names. Their rewritten forwards hand what they get to
`attention`, which puts pyops' in the place of "sdpa": the config, which other modules share and which is saved with the model, stays as
it is, and so do caches, rotations and all else that a forward does around the call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops import _backends
from pyops._fusion import classes, reading, rewrite, rules
from pyops._fusion.rules import Change, digest_of_function, rule
from pyops._fusion.views import Viewed
from pyops.nn._derived import has_hooks
from pyops.nn.chain import Chained, ConvChain, runs_apart
from pyops.nn.conv import DropPath, can_fold
from pyops.nn.convnext import ConvNeXtBlock, Permute
from pyops.ops import _conv_call
from pyops.ops.depthwise_conv import depthwise_conv_bn_act
from pyops.ops.flash_attention import flash_attention
from pyops.ops.layer_norm_2d import layer_norm_2d

SDPA = "transformers.integrations.sdpa_attention", "sdpa_attention_forward"
SDPA_DIGESTS = ("275c2164cf86985b",)  # of the code that `_attend` was written after

# Products of queries and keys from which our kernel is sooner than its checks are late: 12 heads of 64 with 32 queries and keys took
# 0.12 ms and PyTorch's 0.09, 0.70 and 1.10 with 128, 0.13 and 0.16 one query and 512 keys (float32, one core of Zen 4).
PRODUCTS_FROM = 2**20


# -- attention -------------------------------------------------------------------------------------------------------------------------


def attention(function: Any) -> Any:
    """The attention function that a module calls in the place of the one it asked for."""
    if torch.compiler.is_compiling() or not isinstance(function, types.FunctionType) or (function.__module__, function.__name__) != SDPA:
        return function
    return partial(_attend, function) if digest_of_function(function) in SDPA_DIGESTS else function


rewrite.RUNTIME["__pyops_attention__"] = attention
reading.HANDED["transformers.modeling_utils.AttentionInterface", "get_interface"] = "__pyops_attention__"
rewrite.RENEWED.add(("transformers.modeling_layers", "forward_with_checkpointing"))


def _attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `function`, transformers' `sdpa_attention_forward`, gives: ``([B, N, H, D], None)`` of query ``[B, H, N, D]``, key and value
    ``[B, H_k, M, D]``; it runs what is not known here. Key heads are read in place where it repeats them."""
    plain = partial(function, module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **options)
    if not _takes(module, query, key, value, dropout, options):
        return plain()
    N, M = query.shape[2], key.shape[2]
    wished = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(wished) and N > 1 and attention_mask is None
    if causal and M > N:  # keys that are still to be written: a static cache
        key, value, position_bias = key[:, :, :N], value[:, :, :N], None if position_bias is None else position_bias[..., :N]
    if (causal and M < N) or not _fits(attention_mask, query, key) or not _fits(position_bias, query, key):
        return plain()
    bias = attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else _joined(bias, position_bias, torch.finfo(key.dtype).min)
    kind: dict[str, Any] = dict(attn_bias=bias, is_causal=causal, scale=scaling, dropout_p=dropout, enable_gqa=True)
    output: Any = flash_attention(query, key, value, **kind)
    return output.transpose(1, 2).contiguous(), None


def _joined(mask: Tensor, position_bias: Tensor, least: float) -> Tensor:
    return torch.where(mask, position_bias, least) if mask.dtype == torch.bool else position_bias + mask


def _takes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> bool:
    if _conv_call.is_followed() or any(type(t) is not Tensor or t.dim() != 4 or t.dtype != query.dtype for t in (query, key, value)):
        return False
    small = query.numel() * key.shape[2] < PRODUCTS_FROM
    if (small or not query.is_cpu) and _backends.requested(None) == "auto":  # on a GPU PyTorch's op comes first
        return False
    if options.get("cache") is not None or options.get("softcap") is not None or options.get("output_attentions") or not 0 <= dropout < 1:
        return False
    groups = getattr(module, "num_key_value_groups", 1)
    shapes = key.shape == value.shape and key.shape[0] == query.shape[0] and key.shape[3] == query.shape[3]
    return shapes and query.shape[1] == groups * key.shape[1] and min(query.numel(), key.numel()) > 0


def _fits(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether it is a mask as `flash_attention` takes them."""
    if mask is None:
        return True
    if type(mask) not in (Tensor, nn.Parameter) or mask.dim() != 4 or mask.dtype not in (torch.bool, query.dtype):
        return False
    wanted = (*query.shape[:3], key.shape[2])
    return all(size in (1, most) for size, most in zip(mask.shape, wanted, strict=True))


# -- activations -----------------------------------------------------------------------------------------------------------------------


@rule("transformers.activations.GELUActivation", "e26775c02f91a640")
def gelu(module: Any) -> Change | str:
    return Change(nn.GELU, {"approximate": "none"}) if module.act is F.gelu else "GELU in several operations"


@rule("transformers.activations.SiLUActivation", "4e02faae6e91bf86")
def silu(module: Any) -> Change:
    return Change(nn.SiLU, {"inplace": False})


# -- layers ----------------------------------------------------------------------------------------------------------------------------


class GatedMLP(Chained):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``: Llama's and its kin's, the gate's activation in its product."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(self.gate_proj) is not nn.Linear:
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(self.chain("gate_proj", "act_fn")(x) * self.up_proj(x))


@rule("transformers.models.llama.modeling_llama.LlamaMLP", "88b282218f441013")
@rule("transformers.models.mistral.modeling_mistral.MistralMLP", "4497286c9dd4fc20")
@rule("transformers.models.qwen2.modeling_qwen2.Qwen2MLP", "4497286c9dd4fc20")
@rule("transformers.models.qwen3.modeling_qwen3.Qwen3MLP", "4497286c9dd4fc20")
def gated_mlp(module: Any) -> Change:
    return Change(cast(Any, GatedMLP), whole=False)


class ChannelNorm:
    """ConvNextLayerNorm over the channels of an image, which is neither permuted nor copied."""

    def forward(self, features: Tensor) -> Tensor:
        norm: Any = self
        fits = features.dim() == 4 and (features.shape[1],) == tuple(norm.normalized_shape)
        if not fits or torch.compiler.is_compiling() or _conv_call.is_recorded():
            return super().forward(features)  # type: ignore[misc]
        return layer_norm_2d(features, norm.weight, norm.bias, norm.eps)


@rule("transformers.models.convnext.modeling_convnext.ConvNextLayerNorm", "5d24428a9c16f050")
def channel_norm(module: Any) -> Change | str:
    if module.data_format != "channels_first":
        return "PyTorch's own: channels are the last dimension"
    return Change(cast(Any, ChannelNorm))


class _Block(ConvNeXtBlock):
    """A view of a ConvNextLayer's own layers; it drops nothing."""

    def __init__(self, layer: Any):
        nn.Module.__init__(self)
        norm = nn.LayerNorm.__new__(nn.LayerNorm)
        norm.__dict__ = layer.layernorm.__dict__  # the same layer, as PyTorch's class
        last, first = Permute((0, 2, 3, 1)), Permute((0, 3, 1, 2))
        self.block = nn.Sequential(layer.dwconv, last, norm, layer.pwconv1, layer.act, layer.pwconv2, first)
        self.layer_scale = layer.layer_scale_parameter
        self.stochastic_depth = DropPath()
        self.backend = None

    def takes(self, input: Tensor) -> bool:
        conv: Any = self.block[0]
        return input.dim() == 4 and input.shape[1] == conv.in_channels and self._is_standard()

    def infers(self, input: Tensor) -> bool:
        conv: Any = self.block[0]
        return can_fold(conv.weight, input) and self._has_kernel(input)


class ConvNextLayer(Viewed):
    """transformers' layer on ConvNeXtBlock's kernels: inference as one of those, in training the depthwise convolution."""

    def forward(self, features: Tensor) -> Tensor:
        layer: Any = self
        view = None if torch.compiler.is_compiling() else self.view(self.make, layer.layer_scale_parameter)
        if view is None or not view.takes(features):
            return super().forward(features)
        if view.infers(features) and _drops_nothing(layer.drop_path):
            return view._infer(features)
        conv = layer.dwconv
        y: Any = depthwise_conv_bn_act(*_conv_call.autocast(features, conv.weight, conv.bias), padding=3)
        y = layer.pwconv2(layer.act(layer.pwconv1(layer.layernorm(y.permute(0, 2, 3, 1)))))
        return features + layer.drop_path((layer.layer_scale_parameter * y).permute(0, 3, 1, 2))

    def make(self) -> _Block | None:
        """None where the layers are not what was read."""
        layer: Any = self
        norm, scale = layer.layernorm, layer.layer_scale_parameter
        known = rules.find(type(norm)) is channel_norm and norm.data_format == "channels_last" and isinstance(scale, nn.Parameter)
        return _Block(layer) if known else None


@rule("transformers.models.convnext.modeling_convnext.ConvNextDropPath", "a6389a772bb44b22")
def drop_path(module: Any) -> str:
    return "it draws its random numbers as it does"


def _drops_nothing(path: nn.Module) -> bool:
    known = type(path) is nn.Identity or (rules.find(type(path)) is drop_path and not path.training)
    return known and not has_hooks(path)


@rule("transformers.models.convnext.modeling_convnext.ConvNextLayer", "c3aaa1c464e2225b")
def convnext_layer(module: Any) -> Change:
    return Change(ConvNextLayer, whole=False)


@rule("transformers.models.resnet.modeling_resnet.ResNetConvLayer", "21f1295678312c00")
@rule("transformers.models.regnet.modeling_regnet.RegNetConvLayer", "1837b7f905c248ac")
def conv_layer(module: Any) -> Change:
    return Change(None, whole=False)


class ResidualLayer(Viewed):
    """``activation(layer(x) + shortcut(x))``: sum and activation run with the last convolution of `layer`."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        block: Any = self
        view = None if runs_apart(hidden_state) else self._last()
        if view is None:
            return super().forward(hidden_state)
        y = hidden_state
        for layer in list(block.layer)[:-1]:
            y = layer(y)
        return view(y, block.shortcut(hidden_state))

    def _last(self) -> ConvChain | None:
        """The last convolution, its norm and the activation behind the sum; None where another layer or a hook is between them."""
        block: Any = self
        last = block.layer[-1]
        if has_hooks(block.layer) or has_hooks(last) or type(block.layer) is not nn.Sequential:
            return None
        view = self.view(lambda: self._make(last), last, *last._modules.values())
        return None if view is None or has_hooks(last.activation) else view

    def _make(self, last: Any) -> ConvChain | None:
        block: Any = self
        known = rules.find(classes.original_of(last)) is conv_layer and type(last.activation) is nn.Identity
        return ConvChain([last.convolution, last.normalization, block.activation], 2, in_place=True) if known else None


@rule("transformers.models.resnet.modeling_resnet.ResNetBasicLayer", "af7885523ef87d25")
@rule("transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer", "9d9950b4e185d2ce")
@rule("transformers.models.regnet.modeling_regnet.RegNetXLayer", "fa455f36393be609")
@rule("transformers.models.regnet.modeling_regnet.RegNetYLayer", "50f448daef7a0c7f")
def residual_layer(module: Any) -> Change:
    return Change(ResidualLayer, whole=False)
