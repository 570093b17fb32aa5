"""Layers that another module owns, run as one call where kernels can stand for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn._derived import Derived, Keeps, has_hooks, is_plain
from pyops.nn.conv import KINDS, ConvBNAct, Parts, name_of, parts_of, pool_of, upsampling_of
from pyops.nn.linear import run_kept
from pyops.ops import _conv_call, _depthwise_ops

ADD = "+"  # among the names of a chain's layers: where a residual is added


class ConvChain(ConvBNAct):
    """A view of layers that belong elsewhere: [upsampling,] convolution [, batch norm] [, + residual] [, activation] [, pooling].

    ``before``: how many layers come before the residual is added, None without one. What kernels cannot stand for (a replaced layer,
    hooks, a residual at another place) runs layer by layer; `torch.nn.Identity` stands for nothing. The view holds the very layers,
    registers nothing with their owner and is never saved or copied with it.
    """

    def __init__(self, layers: list[nn.Module], before: int | None):
        nn.Sequential.__init__(self, *layers)
        self.before = before
        self.backend = None
        self._kept = Derived()
        self._place = 1 if upsampling_of(layers[0]) else 0

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.dim() != 4 or (residual is not None and not self._adds(input, residual)):
            return self.run_layers(input, residual)
        return self.run(input, residual=residual)[0]

    def parts(self) -> Parts | None:
        layers = list(self)
        parts = parts_of([layer for layer in layers if type(layer) is not nn.Identity], norm=False)
        if parts is None or self.before is None:
            return parts
        early, late = layers[: self.before], layers[self.before :]
        ends = any(name_of(layer) is not None or pool_of(layer) is not None for layer in early)
        return None if ends or any(layer is parts.conv or layer is parts.norm for layer in late) else parts

    def plain_parts(self) -> Parts | None:
        return self.parts() if is_plain(self, (ConvChain, nn.Identity, *KINDS)) else None

    def _adds(self, input: Tensor, residual: Tensor) -> bool:
        """Whether kernels add the residual as PyTorch would: no repeated one, and none of a dtype that widens the sum."""
        conv: Any = self._conv()
        if conv is None or isinstance(conv.padding, str) or residual.dtype != _conv_call.autocast(input)[0].dtype:
            return False
        seen = [n * (1 + self._place) for n in input.shape[2:]]
        size = _depthwise_ops.output_size(seen, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        return residual.shape == (input.shape[0], conv.out_channels, *size)

    def run_layers(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return _run_layers(list(self), self.before, input, residual)


class LinearChain(Keeps, nn.Sequential):
    """A view of a linear layer and the activation after it: one call without gradients, PyTorch's layers with them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(*layers)
        self._kept = Derived()

    def forward(self, input: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        activation = name_of(layers[1]) if len(layers) > 1 else "none"
        followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or _conv_call.is_recorded()
        if followed or activation is None or any(has_hooks(layer) for layer in layers):
            return super().forward(input)
        return run_kept(self._kept, layers[0], input, None, activation, None)


class Chains(dict[Any, Any]):
    """What a module keeps of its layers' views: dropped, not copied or saved, with the module."""

    def __deepcopy__(self, memo) -> Chains:
        return Chains()

    def __reduce__(self):
        return Chains, ()


class Chained(Keeps):
    """Of modules that run layers of theirs as one: ``self.chain("conv1", "bn1", ADD, "relu")(input, residual)``."""

    @property
    def _kept(self) -> Chains:
        return self.__dict__.setdefault("_chains", Chains())

    def chain(self, *names: str) -> Callable[..., Tensor]:
        """The view of the layers of those names as they are now; ADD stands where a residual comes in."""
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        layers = [modules[name] for name in names if name != ADD]
        before = names.index(ADD) if ADD in names else None
        if torch.compiler.is_compiling():
            return partial(_run_layers, layers, before)
        found = self._kept.get(names)
        if found is None or not _same(layers, found):
            found = self._kept[names] = _view(layers, before)
        return found


class Sequential(Chained, nn.Sequential):
    """`torch.nn.Sequential`; neighbours that kernels run as one do: a convolution with the upsampling before it and the batch norm,
    activation and pooling after it, a linear layer with its activation. Names, state_dict and results are torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        layers = list(self)
        before, steps = self._kept.get("steps", ((), ()))
        if len(layers) != len(before) or not _same(layers, before):
            steps = _grouped(layers)
            self._kept["steps"] = layers, steps
        for step in steps:
            input = step(input)
        return input


def _same(layers: list[nn.Module], before) -> bool:
    return all(a is b for a, b in zip(layers, before, strict=True))


def _run_layers(layers: list[nn.Module], before: int | None, input: Tensor, residual: Tensor | None = None) -> Tensor:
    y = input
    for place, layer in enumerate(layers):
        y = layer(y if place != before or residual is None else y + residual)
    return y + residual if before == len(layers) and residual is not None else y


def _view(layers: list[nn.Module], before: int | None) -> ConvChain | LinearChain:
    return LinearChain(layers) if type(layers[0]) is nn.Linear else ConvChain(layers, before)


def _grouped(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers, or views of several."""
    steps: list[nn.Module] = []
    i = 0
    while i < len(layers):
        count = _run_length(layers[i:])
        steps.append(_view(layers[i : i + count], None) if count else layers[i])
        i += count or 1
    return steps


def _run_length(layers: list[nn.Module]) -> int:
    """How many of the first layers run as one; 0: the first is nothing that a view is for."""
    if type(layers[0]) is nn.Linear:
        return 2 if len(layers) > 1 and name_of(layers[1]) is not None else 1
    i = 1 if upsampling_of(layers[0]) else 0
    if i >= len(layers) or type(layers[i]) is not nn.Conv2d:
        return 0
    i += 1
    i += i < len(layers) and type(layers[i]) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    i += i < len(layers) and name_of(layers[i]) is not None
    return i + (i < len(layers) and pool_of(layers[i]) is not None)
