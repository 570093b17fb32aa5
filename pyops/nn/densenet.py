"""DenseNet's blocks: torchvision's structure, parameter names and results, without a concatenation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.nn import _dense_block
from pyops.nn._derived import Keeps, has_hooks, is_plain, kind_of
from pyops.nn.conv import can_fold, pool_of
from pyops.ops import _activations, _channel_ops, _conv_call, _conv_run, _pointwise_ops
from pyops.ops._fused_ops import KERNELS
from pyops.ops._vendor_conv import Conv
from pyops.ops.depthwise_conv import fold
from pyops.ops.pointwise_conv import pointwise_conv

RELU = _activations.NAMES.index("relu")


class Ready(NamedTuple):
    """A layer for inference: ``conv2(relu(conv1(relu(input * scale + shift)) + bias))`` with norm2 in conv1."""

    affine: Tensor  # [3, C]: 0, scale, shift
    weight: Tensor  # [mid, C], or packed on a CPU in float32
    bias: Tensor  # [mid]
    second: Tensor  # [growth, mid, 3, 3]
    call: Conv
    kept: dict


def _affine(norm: Any) -> Tensor:
    scale = torch.rsqrt(norm.running_var.float() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.float()
    shift = -norm.running_mean.float() * scale
    return torch.stack([torch.zeros_like(scale), scale, shift if norm.bias is None else shift + norm.bias.float()])


class DenseLayer(Keeps, nn.Module):
    """``conv3x3(relu(bn(conv1x1(relu(bn(features))))))``: ``growth_rate`` new channels from all that came before.

    torchvision's _DenseLayer: constructor, parameter names, results; ``forward`` takes ``[N, C, H, W]`` or a list of such, to be joined by
    channels. Inside a `DenseBlock` nothing is joined. ``memory_efficient`` is taken for torchvision's sake: memory grows by what a layer
    adds either way. Source: Huang et al., 2017.
    """

    layer_kinds: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.ReLU, nn.Conv2d)

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (("num_input_features", num_input_features), ("growth_rate", growth_rate), ("bn_size", bn_size)):
            if value < 1:
                raise ValueError(f"DenseLayer: {name}: expected 1 or more, got {value}")
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate, self.memory_efficient, self.backend = float(drop_rate), memory_efficient, backend

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = input if isinstance(input, Tensor) else torch.cat(list(input), 1)
        if _infers(self.conv1.weight, features):
            name = kernels_of(self, features)
            ready = self._kept.get(self, lambda: self.make_ready(name, features.dtype), (name, features.dtype))
            if ready is not None and ready.affine.shape[1] == features.shape[1]:
                output = _channel_ops.image_like(features, features.shape[0], ready.second.shape[0], *features.shape[2:])
                with torch.no_grad():
                    write(name, ready, features, _mid(ready, features), output, self.backend)
                return _conv_call.in_layout_of(output, features)
        y = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(features))))))
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y

    def is_standard(self) -> bool:
        """Whether kernels can stand for the layers as they are now."""
        convs = (self.conv1, self.conv2)
        if not is_plain(self, (DenseLayer, *self.layer_kinds)) or any(conv.bias is not None for conv in convs):
            return False
        shapes = [(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) for conv in convs]
        plain = shapes == [((1, 1), (1, 1), (0, 0), (1, 1), 1), ((3, 3), (1, 1), (1, 1), (1, 1), 1)]
        return plain and {conv.padding_mode for conv in convs} == {"zeros"}

    def make_ready(self, name: str, dtype: torch.dtype) -> Ready | None:
        """For inference on a backend; None where kernels do not do it."""
        norms: list[Any] = [self.norm1, self.norm2]
        constant = all(not norm.training and norm.running_mean is not None for norm in norms) and not (self.training and self.drop_rate > 0)
        if name == "eager" or not constant or not self.is_standard():
            return None
        after = norms[1]
        weight, bias = fold(self.conv1.weight, None, after.running_mean, after.running_var, after.weight, after.bias, after.eps)
        packs = name == "cpu" and dtype == torch.float32
        weight = _pointwise_ops.pack(weight.flatten(1)) if packs else weight.flatten(1).to(dtype)
        return Ready(_affine(norms[0]), weight, bias, self.conv2.weight.detach().float(), Conv((1, 1), (1, 1), (1, 1), 1), {})


def _infers(weight: Tensor, input: Tensor) -> bool:
    return not torch.compiler.is_compiling() and can_fold(weight, input) and input.dim() == 4


def kernels_of(module: Any, like: Tensor) -> str:
    return _conv_call.choose(type(module).__name__, module.backend, like)


def write(name: str, ready: Ready, features: Tensor, mid: Tensor, output: Tensor, backend: str | None) -> None:
    """A layer's new channels into `output`, by way of `mid`; features and output may be slices of a wider image's channels."""
    before, after = (None, ready.affine, None, RELU, 0.0), (ready.bias, None, None, RELU, 0.0)
    tf32 = _pointwise_ops.tf32_allowed(features)
    KERNELS[_conv_call.overload(name)].pointwise_into(mid, features, ready.weight, *before, *after, tf32)
    _conv_run.write_folded(mid, output, ready.second, ready.call, ready.kept, backend)


def _mid(ready: Ready, features: Tensor) -> Tensor:
    return _channel_ops.image_like(features, features.shape[0], ready.bias.shape[0], *features.shape[2:])


class DenseBlock(Keeps, nn.ModuleDict):
    """Layers that each read all channels before them and add ``growth_rate``: ``[N, C, H, W] -> [N, C + num_layers * growth_rate, H, W]``.

    torchvision's _DenseBlock: parameter names and results. The result is allocated once and every layer writes its channels into it: what
    would be a concatenation before each layer is none. In training a channel's batch statistics are computed once, whoever reads it, and
    saved are the result (do not write to it) and each layer's output of its 1x1 convolution. Under `torch.compile`, and where parts were
    replaced, batch norm is frozen or dropout is on, the layers are PyTorch's. Gradients of gradients need ``backend="eager"``.

    Source: Huang et al., 2017; Pleiss et al., 2017 (memory-efficient DenseNets).
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        backend: str | None = None,
    ):
        if num_layers < 1:
            raise ValueError(f"DenseBlock: num_layers: expected 1 or more, got {num_layers}")
        super().__init__()
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(channels, growth_rate, bn_size, drop_rate, memory_efficient, backend)
        self.backend = backend

    def forward(self, init_features: Tensor) -> Tensor:
        layers: list[Any] = list(self.values())
        if not torch.compiler.is_compiling() and init_features.dim() == 4 and all(kind_of(layer) is DenseLayer for layer in layers):
            name = kernels_of(self, init_features)
            if _infers(layers[0].conv1.weight, init_features):
                ready = self._kept.get(self, lambda: self._make_ready(layers, name, init_features), (name, init_features.dtype))
                if ready is not None and ready[0].affine.shape[1] == init_features.shape[1]:
                    return self._infer(name, ready, init_features)
            elif _dense_block.can_train(name, layers, init_features) and _chained(layers, init_features.shape[1]):
                return _dense_block.train(KERNELS[_conv_call.overload(name)], layers, init_features)
        features = [init_features]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    def _make_ready(self, layers: list[Any], name: str, like: Tensor) -> list[Ready] | None:
        if not _chained(layers, layers[0].conv1.in_channels) or any(has_hooks(layer) for layer in layers):
            return None
        ready = [layer.make_ready(name, like.dtype) for layer in layers]
        return [r for r in ready if r is not None] if all(r is not None for r in ready) else None

    def _infer(self, name: str, ready: list[Ready], input: Tensor) -> Tensor:
        N, channels, H, W = input.shape
        features = _channel_ops.image_like(input, N, channels + sum(layer.second.shape[0] for layer in ready), H, W)
        with torch.no_grad():
            features[:, :channels].copy_(input)
            mid = _mid(ready[0], features)
            for layer in ready:
                new = channels + layer.second.shape[0]
                mid = mid if mid.shape[1] == layer.bias.shape[0] else _mid(layer, features)  # one for all, as a rule
                write(name, layer, features[:, :channels], mid, features[:, channels:new], self.backend)
                channels = new
        return _conv_call.in_layout_of(features, input)


def _chained(layers: list[Any], channels: int) -> bool:
    """Whether each layer reads all that the ones before it give."""
    for layer in layers:
        if layer.conv1.in_channels != channels:
            return False
        channels += layer.conv2.out_channels
    return True


class DenseTransition(Keeps, nn.Sequential):
    """``pool(conv1x1(relu(bn(input))))``, between dense blocks: torchvision's _Transition, names and results.

    ``pool`` is what follows, torchvision's ``AvgPool2d(2, 2)`` where it is None. An average of what a 1x1 convolution gives is the 1x1
    convolution of the average: without gradients batch norm, ReLU and the average are one pass, and the convolution sees a quarter of the
    positions. Source: Huang et al., 2017.
    """

    def __init__(self, num_input_features: int, num_output_features: int, pool: nn.Module | None = None, backend: str | None = None):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2) if pool is None else pool
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        pool = pool_of(self.pool)
        name = kernels_of(self, input) if pool is not None and self._infers(input) else "eager"
        if pool is None or name == "eager" or not _fits(pool, input):
            return super().forward(input)
        affine = self._kept.get(self, lambda: _affine(self.norm))
        kernels, windows = KERNELS[_conv_call.overload(name)], _conv_run.windows(pool)
        with torch.no_grad():
            if not pool.maximum:
                pooled, _ = kernels.pool_run(input, affine, *windows, RELU, 0.0, False)
                output = pointwise_conv(pooled, self.conv.weight, backend=name)
            else:
                scale: dict[str, Any] = dict(input_scale=affine[1], input_shift=affine[2], input_activation="relu", backend=name)
                output, _ = kernels.pool_run(pointwise_conv(input, self.conv.weight, **scale), None, *windows, 0, 0.0, False)
        return _conv_call.in_layout_of(output, input)

    def _infers(self, input: Tensor) -> bool:
        kinds = (DenseTransition, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)
        if (
            tuple(self._modules) != ("norm", "relu", "conv", "pool")
            or not is_plain(self, kinds)
            or self.norm.training
            or self.norm.running_mean is None
        ):
            return False
        conv = self.conv
        plain = (conv.kernel_size, conv.stride, conv.padding, conv.groups, conv.bias) == ((1, 1), (1, 1), (0, 0), 1, None)
        return plain and _infers(conv.weight, input) and input.shape[1] == conv.in_channels


def _fits(pool, input: Tensor) -> bool:
    """Whether there is a whole window; PyTorch's layer says it where not."""
    return all(n + 2 * p >= k for n, k, p in zip(input.shape[2:], pool.kernel, pool.padding, strict=True))
