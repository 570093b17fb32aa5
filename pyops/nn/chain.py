"""Layers that another module owns, run as one call where kernels can stand for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import _training
from pyops.nn._derived import ALIASES, Keeps, has_hooks, is_plain, kind_of
from pyops.nn.conv import KINDS, NORMS, ConvBNAct, Parts, inside, name_of, parts_of, pool_of, upsampling_of
from pyops.nn.linear import TINY, LinearCalls
from pyops.ops import _conv_call, _conv_run, _depthwise_ops

ADD = "+"  # among the names of a chain's layers: where a residual is added
ADD_ = "+="  # the same in place: the sum has the branch's dtype


class ConvChain(ConvBNAct):
    """A view of layers that belong elsewhere: [upsampling,] convolution [, batch norm] [, + residual] [, activation] [, pooling].

    ``before``: how many layers come before the residual is added, None without one; ``in_place``: as PyTorch's ``+=`` adds. What kernels
    cannot stand for (a replaced layer, hooks, a residual at another place) runs layer by layer; `torch.nn.Identity` stands for nothing.
    The view holds the very layers, registers nothing with their owner and is never saved or copied with it.
    """

    def __init__(self, layers: list[nn.Module], before: int | None, in_place: bool = False):
        nn.Sequential.__init__(self, *layers)
        self.before, self.in_place = before, in_place
        self.backend = None
        self._place = 1 if upsampling_of(layers[0]) else 0

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        runs = input.dim() == 4 and (residual is None or self._adds(input, residual))
        return self.run(input, residual=residual)[0] if runs else self.run_layers(input, residual)

    def parts(self) -> Parts | None:
        layers = list(self)
        parts = parts_of([layer for layer in layers if kind_of(layer) is not nn.Identity], norm=False)
        if parts is None or self.before is None:
            return parts
        early, late = layers[: self.before], layers[self.before :]
        ends = any(name_of(layer) is not None or pool_of(layer) is not None or inside(layer) for layer in early)
        return None if ends or any(layer is parts.conv or layer is parts.norm for layer in late) else parts

    def _plain_parts(self) -> Parts | None:
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
        layers = list(self)
        y = self._convolve(input) if torch.is_grad_enabled() else None
        if y is None:
            return _run_layers(layers, self.before, input, residual, self.in_place)
        return _run_layers(layers[1:], None if self.before is None else self.before - 1, y, residual, self.in_place)

    def _convolve(self, input: Tensor) -> Tensor | None:
        """The convolution alone with gradients, by Winograd's method; None where the layer itself is to run."""
        parts = self.plain_parts()
        conv: Any = None if parts is None or parts.norm is not None or parts.upsample else parts.conv
        if conv is None or input.dim() != 4 or input.shape[1] != conv.in_channels or not _training.takes(conv, input):
            return None
        kernels = _training.kernels_for(self.backend, input)
        image, weight, bias = _conv_call.autocast(input, conv.weight, conv.bias)
        call = _training.shape_of(conv)
        if kernels is None or not _conv_run.winograd(image, weight, call):
            return None
        size = _depthwise_ops.output_size(image.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        y, _ = _conv_run.convolve(kernels, image, weight, bias, call, size, moments=False, dense=False)
        return _conv_call.in_layout_of(y, input)


class LinearChain(Keeps, nn.Sequential):
    """A view of a linear layer and the activation after it: one call without gradients, PyTorch's layers with them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(*(layer for layer in layers if type(layer) is not nn.Identity))

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _conv_call.is_recorded():
            return super().forward(input)
        calls = self._kept.get(self, self._make_calls)
        if calls is None:
            return super().forward(input)
        return calls.run(input) if _conv_call.is_plain_inference(input) else calls.run_any(input)

    def _make_calls(self) -> LinearCalls | None:
        """None where a kernel cannot stand for the layers."""
        layers: list[Any] = list(self)
        activation = name_of(layers[1]) if len(layers) > 1 else "none"
        if activation is None or any(has_hooks(layer) for layer in layers):
            return None
        return LinearCalls(layers[0], activation)


class Chains(dict[Any, Any]):
    """What a module keeps of its layers' views: dropped, not copied or saved, with the module."""

    def __deepcopy__(self, memo) -> Chains:
        return Chains()

    def __reduce__(self):
        return Chains, ()


class Chained(Keeps):
    """Of modules that run layers of theirs as one: ``self.chain("conv1", "bn1", ADD, "relu")(input, residual)``."""

    @cached_property
    def _kept(self) -> Chains:
        return Chains()

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
        if runs_apart(input):
            return super().forward(input)
        layers = list(self._modules.values())
        before, steps = self._kept.get("steps", ([], []))
        if layers != before:  # modules are equal only to themselves
            steps = grouped(layers)
            self._kept["steps"] = layers, steps
        for step, _ in steps:
            input = step(input)
        return input


ALIASES[Sequential] = nn.Sequential


def runs_apart(input: Any) -> bool:
    """Whether layers are to be called one by one: for the compiler, who records, or tensors of another class."""
    return torch.compiler.is_compiling() or type(input) not in (Tensor, nn.Parameter) or _conv_call.is_recorded()


def _same(layers: list[nn.Module], before) -> bool:
    return all(a is b for a, b in zip(layers, before, strict=True))


def _run_layers(
    layers: list[nn.Module], before: int | None, input: Tensor, residual: Tensor | None = None, in_place: bool = False
) -> Tensor:
    def add(y: Tensor) -> Tensor:
        return y if residual is None else y.add_(residual) if in_place else y + residual

    y = input
    for place, layer in enumerate(layers):
        y = layer(add(y) if place == before else y)
    return add(y) if before == len(layers) else y


def _view(layers: list[nn.Module], before: int | None, in_place: bool = False) -> ConvChain | LinearChain:
    return LinearChain(layers) if type(layers[0]) is nn.Linear else ConvChain(layers, before, in_place)


SUMS: dict[Any, Callable[[Any, Any], Any]] = {ADD: operator.add, ADD_: operator.iadd}


def _is_sum(layer: Any) -> bool:
    return isinstance(layer, str) and layer in SUMS


def grouped(layers: list[Any]) -> list[tuple[Any, bool]]:
    """The steps that run the layers: a layer, or the view of several, and whether a residual goes into it. ADD or ADD_ may stand among the
    layers; where no view takes the sum in, it is a step."""
    steps: list[tuple[Any, bool]] = []
    i = 0
    while i < len(layers):
        count, before = _run_length(layers[i:])
        taken = layers[i : i + (count or 1)]
        if count:
            in_place = ADD_ in taken
            steps.append((_view([layer for layer in taken if not isinstance(layer, str)], before, in_place), before is not None))
        else:
            summed = _is_sum(layers[i])
            steps.append((SUMS[layers[i]] if summed else layers[i], summed))
        i += count or 1
    return steps


def _run_length(layers: list[Any]) -> tuple[int, int | None]:
    """How many of the first layers run as one, 0: the first is nothing that a view is for; and where among them a residual is added."""

    def after(i: int, wanted: Callable[[Any], bool]) -> int:
        """Behind the next layer that does something, if it is wanted."""
        j = i
        while j < len(layers) and kind_of(layers[j]) is nn.Identity:
            j += 1
        return j + 1 if j < len(layers) and wanted(layers[j]) else i

    def activates(layer: Any) -> bool:
        return isinstance(layer, nn.Module) and name_of(layer) is not None

    def pools(layer: Any) -> bool:
        return isinstance(layer, nn.Module) and pool_of(layer) is not None

    if not isinstance(layers[0], nn.Module):
        return 0, None
    if type(layers[0]) is nn.Linear:
        count = after(1, activates)
        return count if count > 1 or layers[0].weight.numel() >= TINY else 0, None
    i = 1 if upsampling_of(layers[0]) else 0
    if i >= len(layers) or kind_of(layers[i]) is not nn.Conv2d:
        return 0, None
    i = after(i + 1, lambda layer: kind_of(layer) in NORMS)
    if inside(layers[i - 1]):
        return after(i, pools), None
    summed = after(i, _is_sum)
    if summed != i:
        return after(summed, activates), summed - 1
    i = after(i, activates)
    return after(i, pools), None
