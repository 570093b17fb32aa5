"""Convolutional blocks: torchvision's structure and parameter names, pyops' kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops import _backends, _library
from pyops.nn._derived import Derived, is_plain
from pyops.ops import _activations, _mbconv_ops  # noqa: F401  (registers the ops)
from pyops.ops.depthwise_conv import depthwise_conv_bn_act, fold, run_folded

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU, "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip


def _activation(name: str, argument: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


class DropPath(nn.Module):
    """Drops the whole input of a sample with probability ``p`` while training, and scales the others by ``1 / (1 - p)``.

    Source: Huang et al., 2016 (stochastic depth); torchvision's StochasticDepth in mode "row".
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"DropPath: p: expected 0 to 1, got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        keep = input.new_empty((input.shape[0], *[1] * (input.dim() - 1))).bernoulli_(1.0 - self.p)
        return input * (keep if self.p == 1.0 else keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ConvBNAct(nn.Sequential):
    """Convolution, batch norm, activation: ``[N, C, H, W] -> [N, out_channels, OH, OW]``.

    Parameter names are those of torchvision's Conv2dNormActivation (``0.weight``, ``1.weight``, ...). A depthwise convolution
    (``groups == in_channels == out_channels``) runs on `pyops.depthwise_conv_bn_act`, any other on PyTorch's. In eval mode the running
    statistics are folded into the filter once, and again when a parameter or buffer changes. ``padding=None`` keeps the size at stride 1.

    Raises ValueError for an unknown activation, and torch.nn.Conv2d's errors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
    ):
        padding = (kernel_size - 1) // 2 * dilation if padding is None else padding
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        layers = [conv, nn.BatchNorm2d(out_channels, eps, momentum)]
        super().__init__(*layers, *([] if activation is None else [_activation(activation, "ConvBNAct: activation")]))
        self.activation, self.backend = activation or "none", backend
        self._folded = Derived()

    def train(self, mode: bool = True):
        self._folded.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._folded.clear()
        return super()._apply(fn, recurse)

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)[0]

    def run(self, input: Tensor, means: bool = False) -> tuple[Tensor, Tensor | None]:
        """The block's output and, if asked for, its channel means ``[N, C]``."""
        conv: Any = self[0]
        norm: Any = self[1]
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.padding_mode == "zeros"
        shape = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
        folded = self.folded() if can_fold(conv.weight, input) else None
        if folded is not None and depthwise:
            return run_folded(input, *folded, **shape, activation=self.activation, means=means, backend=self.backend)
        if folded is not None:
            weight, bias = (t.to(input.dtype) for t in folded)
            output = F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            output = _activations.REFERENCE[self.activation](output, 0.01)
        elif depthwise and is_plain(self, KINDS):
            output = norm(depthwise_conv_bn_act(input, conv.weight, conv.bias, **shape, backend=self.backend))
            output = _activations.REFERENCE[self.activation](output, 0.01)
        else:
            output = super().forward(input)
        return output, output.mean((2, 3)) if means else None

    def folded(self) -> tuple[Tensor, Tensor] | None:
        """Filter and bias with the running statistics in them, in float32 (float64 for float64); None where they cannot be folded."""
        return self._fold() if torch.compiler.is_compiling() else self._folded.get(self, self._fold)

    def _fold(self) -> tuple[Tensor, Tensor] | None:
        conv: Any = self[0]
        norm: Any = self[1]
        if not is_plain(self, KINDS) or norm.training or norm.running_mean is None or conv.padding_mode != "zeros":
            return None
        return fold(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


KINDS = (ConvBNAct, nn.Conv2d, nn.BatchNorm2d, *ACTIVATIONS.values())


def can_fold(weight: Tensor, input: Tensor) -> bool:
    """Whether a call is inference in the module's own dtype: what kept weights are for."""
    return input.dtype == weight.dtype and not (torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type))


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate computed from the channels' means; torchvision's class and parameter names.

    ``forward(input, means=None)``: input ``[N, C, H, W]``; ``means`` ``[N, C]`` saves the pass over input that takes them.
    Source: Hu et al., 2018.
    """

    def __init__(self, input_channels: int, squeeze_channels: int, activation: str = "relu", scale_activation: str = "sigmoid"):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = _activation(activation, "SqueezeExcitation: activation")
        self.scale_activation = _activation(scale_activation, "SqueezeExcitation: scale_activation")
        self.names = (activation, scale_activation)

    def forward(self, input: Tensor, means: Tensor | None = None) -> Tensor:
        pooled = self.avgpool(input) if means is None else means.to(input.dtype)[:, :, None, None]
        return input * self.scale_activation(self.fc2(self.activation(self.fc1(pooled))))


class MBConv(nn.Module):
    """An inverted-residual block: expand 1x1, depthwise, squeeze-excitation, project 1x1 (+ input): torchvision's names and results.

    ``[N, in_channels, H, W] -> [N, out_channels, OH, OW]``. ``expand_ratio=1`` has no expansion; ``squeeze_channels=None`` takes
    ``in_channels // 4`` (at least 1), 0 leaves squeeze-excitation out. The input is added where stride is 1 and channels agree, after
    ``DropPath(drop_path)`` of the branch. In eval mode without gradients on a CPU the block is one kernel on weights that are folded and
    packed once.

    Source: Sandler et al., 2018 (MobileNetV2); Tan and Le, 2019 (EfficientNet). Raises ValueError for sizes that make no block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: int = 6,
        squeeze_channels: int | None = None,
        activation: str = "silu",
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
    ):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"MBConv: kernel_size: expected an odd size, got {kernel_size}")
        if stride < 1 or expand_ratio < 1:
            raise ValueError(f"MBConv: stride, expand_ratio: expected 1 or more, got {stride} and {expand_ratio}")
        expanded = in_channels * expand_ratio
        squeezed = max(1, in_channels // 4) if squeeze_channels is None else squeeze_channels
        norm: dict[str, Any] = dict(eps=eps, momentum=momentum, backend=backend)
        layers: list[nn.Module] = []
        if expand_ratio > 1:
            layers.append(ConvBNAct(in_channels, expanded, 1, activation=activation, **norm))
        layers.append(ConvBNAct(expanded, expanded, kernel_size, stride, groups=expanded, activation=activation, **norm))
        if squeezed:
            layers.append(SqueezeExcitation(expanded, squeezed, activation))
        layers.append(ConvBNAct(expanded, out_channels, 1, activation=None, **norm))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = DropPath(drop_path)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.expands = expand_ratio > 1
        self.out_channels, self.backend = out_channels, backend
        self._packed = Derived()

    def train(self, mode: bool = True):
        self._packed.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._packed.clear()
        return super()._apply(fn, recurse)

    def forward(self, input: Tensor) -> Tensor:
        first: Any = self.block[0]
        if input.is_cpu and not torch.compiler.is_compiling() and can_fold(first[0].weight, input):
            wish = _backends.requested(self.backend)
            kernel = self._packed.get(self.block, self._pack, input.dtype) if wish in ("auto", "cpu") else None
            if kernel is not None:
                return self._infer(input, *kernel)
        if not is_plain(self.block, PARTS):
            output = self.block(input)
        else:
            expand, depthwise, squeeze, project = self._parts()
            output, means = depthwise.run(input if expand is None else expand(input), means=squeeze is not None and not self.training)
            output = project(output if squeeze is None else squeeze(output, means))
        return self.stochastic_depth(output) + input if self.use_res_connect else output

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """(expand or None, depthwise, squeeze or None, project)"""
        layers: list[Any] = list(self.block)
        expand = layers.pop(0) if self.expands else None
        return expand, layers[0], layers[1] if len(layers) == 3 else None, layers[-1]

    def _pack(self) -> tuple[Tensor, tuple] | None:
        """(packed weights, the op's other arguments), or None where the kernel cannot stand for the block."""
        if not is_plain(self.block, PARTS) or _library.not_loaded_reason() is not None:
            return None
        expand, depthwise, squeeze, project = self._parts()
        parts = [part for part in (expand, depthwise, project) if part is not None]
        folded = [part.folded() for part in parts]
        tensors = tuple(self.block.parameters())
        dtype = tensors[0].dtype
        if dtype == torch.float64 or any(pair is None for pair in folded) or any(t.dtype != dtype or not t.is_cpu for t in tensors):
            return None
        gates = (None, None, None, None)
        if squeeze is not None:
            gates = tuple(t.float() for layer in (squeeze.fc1, squeeze.fc2) for t in (layer.weight, layer.bias))
        weights = (*((None, None) if expand is None else folded[0]), *folded[-2], *gates, *folded[-1])
        packed = torch.ops.pyops.mbconv_pack.default(*weights, dtype == torch.bfloat16)
        conv, names = depthwise[0], (depthwise.activation, *(("none", "none") if squeeze is None else squeeze.names))
        return packed, (
            conv.out_channels, 0 if squeeze is None else squeeze.fc1.out_channels, project[0].out_channels, conv.kernel_size[0],
            conv.stride[0], *(_activations.NAMES.index(name) for name in names), expand is not None, self.use_res_connect,
        )  # fmt: skip

    def _infer(self, input: Tensor, packed: Tensor, options: tuple) -> Tensor:
        first: Any = self.block[0]
        if input.dim() != 4 or input.shape[1] != first[0].in_channels:
            raise ValueError(f"MBConv: input: expected [N, {first[0].in_channels}, H, W], got shape {tuple(input.shape)}")
        output = torch.ops.pyops.mbconv_infer.default(input, packed, *options)
        return output if input.is_contiguous(memory_format=torch.channels_last) else output.contiguous()


PARTS = (*KINDS, SqueezeExcitation, nn.Sequential, nn.AdaptiveAvgPool2d)
