"""Convolutional blocks: torchvision's structure and parameter names, pyops' kernels."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyops.nn import _training
from pyops.nn._derived import Derived, Keeps, is_plain, kind_of
from pyops.ops import _activations, _conv_call, _conv_run, _vendor_conv
from pyops.ops._fused_ops import Squeeze
from pyops.ops._vendor_conv import UPSAMPLINGS, Conv, Pool
from pyops.ops.depthwise_conv import fold, run_folded
from pyops.ops.pointwise_conv import pointwise_conv
from pyops.ops.squeeze_excite import squeeze_excite

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU, "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip


def _activation(name: str, argument: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def name_of(layer: nn.Module) -> str | None:
    """The kernels' name for an activation layer as it is now; None where they have none."""
    found = kind_of(layer)
    if (isinstance(layer, nn.LeakyReLU) and layer.negative_slope != 0.01) or (isinstance(layer, nn.GELU) and layer.approximate != "none"):
        return None
    return next((name for name, kind in ACTIVATIONS.items() if found is kind), None)


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
        keep = self.draw(input)
        return input if keep is None else input * keep

    def draw(self, input: Tensor) -> Tensor | None:
        """A call's multipliers ``[N, 1, ...]``; None where it changes nothing."""
        if not self.training or self.p == 0.0:
            return None
        keep = input.new_empty((input.shape[0], *[1] * (input.dim() - 1))).bernoulli_(1.0 - self.p)
        return keep if self.p == 1.0 else keep / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class BatchNormAct(nn.BatchNorm2d):
    """The kind of other libraries' batch norms that activate on their own: ``act(drop(batch_norm(input)))``."""

    drop: nn.Module
    act: nn.Module


class FrozenBatchNorm(nn.Module):
    """The kind of batch norms whose statistics are constants in training too; what they give has the wider of input's and their dtype."""

    weight: Tensor


NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct, FrozenBatchNorm)


def widens(norm: Any, conv: nn.Conv2d, autocast: bool = False) -> bool:
    """Whether the norm gives another dtype than the convolution; autocast: a call in which that one's is not its filter's."""
    return kind_of(norm) is FrozenBatchNorm and (autocast or norm.weight.dtype != conv.weight.dtype)


def inside(layer: Any) -> list[nn.Module]:
    """What a norm does on its own after it has normalised."""
    layers = [layer.drop, layer.act] if kind_of(layer) is BatchNormAct else []
    return [layer for layer in layers if kind_of(layer) is not nn.Identity]


class Folded(NamedTuple):
    """A filter and bias with running statistics in them, in float32 (float64 for float64), and what kernels keep of them."""

    weight: Tensor
    bias: Tensor
    call: Conv
    activation: str
    kept: dict


class Parts(NamedTuple):
    """What a block's layers are, as kernels take them."""

    conv: nn.Conv2d
    norm: nn.Module | None
    activation: str
    upsample: int
    pool: Pool | None


def upsampling_of(layer: nn.Module) -> int:
    """Its number in UPSAMPLINGS, 0 where kernels have none such."""
    if type(layer) is not nn.Upsample or layer.size is not None or layer.recompute_scale_factor or layer.align_corners:
        return 0
    twice = layer.scale_factor in (2, (2, 2)) and layer.mode in UPSAMPLINGS
    return UPSAMPLINGS.index(layer.mode) if twice else 0


def _pair(n: Any) -> tuple[int, ...]:
    """Of a layer's option; empty where it is none that kernels take."""
    found = tuple(n) if isinstance(n, (tuple, list)) else (n,)
    whole = len(found) in (1, 2) and all(isinstance(v, int) and 0 <= v < 2**31 for v in found)
    return (found * 2)[:2] if whole else ()


def pool_of(layer: nn.Module) -> Pool | None:
    """None where kernels have none such."""
    if isinstance(layer, nn.MaxPool2d):
        plain = type(layer) is nn.MaxPool2d and _pair(layer.dilation) == (1, 1) and not layer.return_indices
    elif isinstance(layer, nn.AvgPool2d):
        counts = layer.count_include_pad or _pair(layer.padding) == (0, 0)
        plain = type(layer) is nn.AvgPool2d and counts and layer.divisor_override is None
    else:
        return None
    kernel, padding = _pair(layer.kernel_size), _pair(layer.padding)
    stride = kernel if layer.stride is None else _pair(layer.stride)
    if not plain or layer.ceil_mode or not (kernel and stride and padding) or min(*kernel, *stride) < 1:
        return None
    pool = Pool(isinstance(layer, nn.MaxPool2d), (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]))
    within = all(2 * p <= k for k, p in zip(kernel, padding, strict=True))
    return pool if within and _conv_run.pools(pool) else None


def parts_of(layers: list[Any], norm: bool) -> Parts | None:
    """[upsampling,] convolution, batch norm [, activation] [, pooling]; norm: it has to be there."""
    upsample = upsampling_of(layers[0]) if layers else 0
    layers = layers[1:] if upsample else layers
    pool = pool_of(layers[-1]) if layers else None
    layers = layers[:-1] if pool is not None else layers
    conv, *rest = layers or [None]
    normal = rest.pop(0) if rest and kind_of(rest[0]) in NORMS else None
    rest = rest if normal is None else [*inside(normal), *rest]
    if conv is None or kind_of(conv) is not nn.Conv2d or (norm and normal is None) or len(rest) > 1:
        return None
    activation = name_of(rest[0]) if rest else "none"
    return None if activation is None else Parts(conv, normal, activation, upsample, pool)


class ConvBNAct(Keeps, nn.Sequential):
    """Convolution, batch norm, activation, pooling: ``[N, C, H, W] -> [N, out_channels, OH, OW]``.

    Parameter names are those of torchvision's Conv2dNormActivation (``0.weight``, ``1.weight``, ...). Depthwise
    (``groups == in_channels == out_channels``) and 1x1 convolutions run on pyops' kernels, others on PyTorch's, and batch norm with the
    activation in one pass each way; what is saved for backward is then the convolution's input and output (a dense convolution on a CPU
    trains so where Winograd's method runs it, else on PyTorch's layers). In eval mode the running
    statistics are folded into the filter once, and again when a parameter or buffer changes. ``padding=None`` keeps the size at stride 1.
    ``pool`` is a `torch.nn.MaxPool2d` or `AvgPool2d` that follows: on a CPU it is part of the pass over memory that normalises and
    activates, or of the convolution, and what is saved for it is a byte for each maximum.
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the processes of a group share their statistics, on CPUs too. Gradients of
    gradients (``create_graph=True``) need ``backend="eager"``.

    Raises ValueError for an unknown activation, and torch.nn.Conv2d's errors.
    """

    _place = 0  # of the convolution among the layers

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        pool: nn.Module | None = None,
        backend: str | None = None,
    ):
        self._set_up(
            [], in_channels, out_channels, kernel_size, stride, padding, groups, dilation, activation, eps, momentum, pool, backend
        )

    def _set_up(
        self, before, in_channels, out_channels, kernel_size, stride, padding, groups, dilation, activation, eps, momentum, pool, backend
    ) -> None:
        if pool is not None and not isinstance(pool, (nn.MaxPool2d, nn.AvgPool2d)):
            raise TypeError(f"{type(self).__name__}: pool: expected a torch.nn.MaxPool2d or AvgPool2d, got {type(pool).__name__}")
        if padding is None:
            kernel, apart = (n if isinstance(n, tuple) else (n, n) for n in (kernel_size, dilation))
            padding = (kernel[0] - 1) // 2 * apart[0], (kernel[1] - 1) // 2 * apart[1]
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        layers: list[nn.Module] = [*before, conv, nn.BatchNorm2d(out_channels, eps, momentum)]
        layers += [] if activation is None else [_activation(activation, f"{type(self).__name__}: activation")]
        nn.Sequential.__init__(self, *layers, *([] if pool is None else [pool]))
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)[0]

    def parts(self) -> Parts | None:
        """None where layers were replaced by some that kernels cannot stand for."""
        return parts_of(list(self), norm=True)

    @cached_property
    def _structure(self) -> Derived:
        return Derived(of_tensors=False)

    def plain_parts(self) -> Parts | None:
        """None as well where a part is of another class or has hooks."""
        if torch.compiler.is_compiling():
            return self._plain_parts()
        return None if _conv_call.is_recorded() else self._structure.get(self, self._plain_parts)

    def _plain_parts(self) -> Parts | None:
        return self.parts() if is_plain(self, KINDS) else None

    @property
    def activation(self) -> Any:
        """The kernels' name for it, None where the block is not a convolution, batch norm and an activation that kernels have."""
        parts = self.parts()
        return parts.activation if parts is not None and not parts.upsample and parts.pool is None else None

    def run(self, input: Tensor, means: bool = False, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The block's output and, if asked for, its channel means ``[N, C]``. A residual is added before the activation."""
        if not means and self.backend is None and _conv_call.is_plain_inference(input):
            again = self._kept.get(self, self._fold)
            again = None if again is None else _conv_run.run_again(input, residual, again.kept)
            if again is not None:
                return again, None
        conv: Any = self._conv()
        folded = self.folded() if conv is not None and can_fold(conv.weight, input) else None
        around = folded is not None and (folded.call.upsample > 0 or folded.call.pool is not None)
        if folded is not None and not around and residual is None and _training.is_depthwise(conv):
            shape = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
            return run_folded(input, *folded[:2], **shape, activation=folded.activation, means=means, backend=self.backend)
        if folded is not None:
            output = self.run_dense(input, folded, residual=residual)
        elif (
            (parts := self.can_train(input)) is not None
            and (residual is None or parts.pool is None)
            and _training.gains(parts, self.backend, input)
            and (kernels := _training.kernels_for(self.backend, input)) is not None
        ):
            (cast,) = _conv_call.autocast(input)
            pending = self.convolve(kernels, _training.Pending(cast))
            if residual is None:
                output = _training.finish_pooled(kernels, pending, parts.pool)
            else:
                output = _training.finish(kernels, pending, None, _conv_call.autocast(residual)[0])
            output = _conv_call.in_layout_of(output, input)
        else:
            output = self.run_layers(input, residual)
        return output, output.mean((2, 3)) if means else None

    def run_layers(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """One after another, as PyTorch runs them."""
        return super().forward(input)

    def _conv(self) -> nn.Module | None:
        """The convolution, where it is at its place."""
        layer = self._modules.get(str(self._place))
        return layer if isinstance(layer, nn.Conv2d) else None

    def run_dense(self, input: Tensor, folded: Folded, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """``pool(activation(conv(input * gate) + bias + residual))`` with a folded filter and bias: inference alone."""
        weight, bias, call, activation, kept = folded
        with torch.no_grad():
            pointwise = _vendor_conv.is_pointwise(weight, call) and not call.upsample and call.pool is None
            if pointwise and (gate is not None or not input.is_cpu):  # oneDNN's kept 1x1 is faster, without gates
                epilogue: dict[str, Any] = dict(gate=gate, residual=residual, activation=activation, backend=self.backend)
                return pointwise_conv(input, weight, bias, **epilogue)
            if gate is not None:
                input = input * gate.to(input.dtype)[:, :, None, None]
            return _conv_run.run_folded(input, weight, bias, residual, call, kept, self.backend)

    def can_train(self, input: Tensor) -> Parts | None:
        """The layers, where the kernels can stand for them with gradients: none of another kind or with hooks, a plain convolution."""
        parts = self.plain_parts()
        if parts is None:
            return None
        conv: Any = parts.conv
        plain = conv.bias is None and parts.norm is not None and _training.takes(conv, input)
        plain = plain and not widens(parts.norm, conv, _conv_call.is_autocast(input.device.type))
        return parts if plain and input.dim() == 4 and input.shape[1] == conv.in_channels else None

    def convolve(self, kernels, input: _training.Pending, gates: _training.Gates | None = None) -> _training.Pending:
        """The convolution of `input`, with batch norm and activation pending."""
        parts: Any = self.parts()
        return _training.convolve(kernels, parts.conv, parts.norm, parts.activation, input, gates, parts.upsample)

    def folded(self) -> Folded | None:
        """None where the running statistics cannot be folded."""
        return self._fold() if torch.compiler.is_compiling() else self._kept.get(self, self._fold)

    def _fold(self) -> Folded | None:
        parts = self.plain_parts()
        if parts is None:
            return None
        conv: Any = parts.conv
        norm: Any = parts.norm
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        if norm is not None and (_training.takes_batch(norm) or widens(norm, conv)):
            return None
        if norm is None:
            kind = torch.promote_types(conv.weight.dtype, torch.float32)
            weight = conv.weight.detach().to(kind)
            bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().to(kind)
        else:
            weight, bias = fold(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        number = _activations.NAMES.index(parts.activation)
        call = _training.shape_of(conv)._replace(activation=number, slope=0.01, upsample=parts.upsample, pool=parts.pool)
        return Folded(weight, bias, call, parts.activation, {})


class UpsampleConvBNAct(ConvBNAct):
    """The image enlarged twice, then a convolution of stride 1, batch norm and activation: ``[N, C, H, W] -> [N, out_channels, 2H, 2W]``.

    What the decoders of autoencoders and segmentation networks repeat. ``mode`` is "nearest" or "bilinear" (``align_corners=False``).
    Parameter names are those of ``Sequential(Upsample, Conv2d, BatchNorm2d, activation)``. On a CPU 3x3 convolutions enlarge the image as
    they read it, where Winograd's method runs them.

    Raises ValueError for an unknown mode or activation, and torch.nn.Conv2d's errors.
    """

    _place = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        padding: int | tuple[int, int] | None = None,
        mode: str = "nearest",
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        pool: nn.Module | None = None,
        backend: str | None = None,
    ):
        if mode not in UPSAMPLINGS[1:]:
            raise ValueError(f'UpsampleConvBNAct: mode: expected "nearest" or "bilinear", got {mode!r}')
        before, rest = [nn.Upsample(scale_factor=2, mode=mode)], (activation, eps, momentum, pool, backend)
        self._set_up(before, in_channels, out_channels, kernel_size, 1, padding, 1, 1, *rest)


KINDS = (
    ConvBNAct, UpsampleConvBNAct, nn.Conv2d, *NORMS, nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, *ACTIVATIONS.values(),
)  # fmt: skip


def can_fold(weight: Tensor, input: Tensor) -> bool:
    """Whether a call is inference in the module's own dtype: what kept weights are for."""
    followed = torch.is_grad_enabled() or _conv_call.is_autocast(input.device.type) or _conv_call.is_recorded()
    return input.dtype == weight.dtype and not followed


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate computed from the channels' means; torchvision's class and parameter names.

    ``forward(input, means=None)``: input ``[N, C, H, W]``; ``means`` ``[N, C]`` saves the pass over input that takes them.
    Source: Hu et al., 2018.
    """

    layer_kinds: tuple[type, ...] = (nn.Conv2d, nn.AdaptiveAvgPool2d, *ACTIVATIONS.values())

    def __init__(self, input_channels: int, squeeze_channels: int, activation: str = "relu", scale_activation: str = "sigmoid"):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = _activation(activation, "SqueezeExcitation: activation")
        self.scale_activation = _activation(scale_activation, "SqueezeExcitation: scale_activation")

    def forward(self, input: Tensor, means: Tensor | None = None) -> Tensor:
        if not self.is_standard() or input.dtype not in _conv_call.DTYPES or input.dim() != 4:
            pooled = self.avgpool(input) if means is None else means.to(input.dtype)[:, :, None, None]
            return input * self.scale_activation(self.fc2(self.activation(self.fc1(pooled))))
        return squeeze_excite(input, *self.layers(), means=means, activation=self.names[0], gate_activation=self.names[1])

    @property
    def names(self) -> tuple[Any, Any]:
        """The kernels' names for the two activations, or None."""
        return name_of(self.activation), name_of(self.scale_activation)

    def is_standard(self) -> bool:
        """Whether kernels can stand for the layers: nothing replaced by what they do not know, no hooks inside, biases there."""
        if not is_plain(self, (SqueezeExcitation, *self.layer_kinds)) or None in self.names:
            return False
        return all(kind_of(fc) is nn.Conv2d and _training.is_pointwise(fc) and fc.bias is not None for fc in (self.fc1, self.fc2))

    def layers(self) -> tuple[Any, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def gates(self) -> _training.Gates:
        """For a 1x1 convolution that applies the gates itself."""
        numbers = (_activations.NAMES.index(name) for name in self.names)
        return _training.Gates(tuple(t.flatten(1).float() if t.dim() == 4 else t.float() for t in self.layers()), *numbers)

    def gate_of(self, means: Tensor) -> Tensor:
        """``[N, C]`` in means' dtype."""
        layers: Any = (t.flatten(1).to(means.dtype) if t.dim() == 4 else t.to(means.dtype) for t in self.layers())
        gates = self.gates()
        return Squeeze._make([*layers, gates.activation, gates.gate_activation]).run(means)[2]
