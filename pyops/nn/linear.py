"""A linear layer with its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops import _backends
from pyops.nn._derived import Derived, Keeps
from pyops.ops import _activations, _conv_call, _linear_ops
from pyops.ops import linear_act as _linear


class LinearAct(Keeps, nn.Linear):
    """`torch.nn.Linear`, same parameters, with a residual and an activation after it: ``[..., in_features] -> [..., out_features]``.

    Without gradients on a CPU the weight is kept in oneDNN's layout, and laid out anew when it changes.

    Raises ValueError for an unknown activation, and torch.nn.Linear's errors.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = "none", backend: str | None = None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        _activations.number("LinearAct", activation)
        self.activation, self.backend = activation, backend

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and self.backend is None and not _backends.overridden():
            weight = self.weight
            if weight.numel() < TINY and input.shape[-1:] == weight.shape[1:] and input.dtype == weight.dtype:
                y = F.linear(input, weight, self.bias)
                return y if self.activation == "none" else _activations.apply(y, _activations.NAMES.index(self.activation), 0.01)
            if _conv_call.is_plain_inference(input):
                return self._kept.get(self, self._make_calls, "calls").run(input)
        return run_kept(self._kept, self, input, residual, self.activation, self.backend)

    def _make_calls(self) -> LinearCalls:
        return LinearCalls(self, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class BlockLinear(LinearAct):
    """A linear layer inside a block. It follows a wish for "cpu" or "eager"; with the block on another backend PyTorch's layer runs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, backend: str | None = None):
        super().__init__(in_features, out_features, bias, backend=backend if backend in ("cpu", "eager") else None)

    def forward(self, input: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """bias: in place of the layer's own."""
        if self.backend is not None or _backends.requested(None) in ("auto", "cpu", "eager"):
            return run_kept(self._kept, self, input, residual, self.activation, self.backend, bias)
        y = F.linear(input, self.weight, self.bias if bias is None else bias)
        return y if residual is None else y + residual


# Elements of a weight: with fewer, F.linear takes as long as the kernel (3.3 us of 784 x 10), and nothing has to be looked up.
TINY = 2**13


class LinearCalls:
    """A layer and its activation without gradients, which finds what ran a call of the same shape before: a layer of some rows takes
    three microseconds, as long as ten lines of Python."""

    def __init__(self, layer: nn.Linear, activation: str):
        self.layer, self.activation = layer, activation
        self.calls: dict[Any, Callable[[Tensor], Tensor]] = {}
        self.kept = Derived()

    def run(self, input: Tensor) -> Tensor:
        """Where `is_plain_inference` has said yes."""
        key = input.shape, input.dtype
        call = self.calls.get(key)
        if call is None:
            if len(self.calls) >= MOST_SHAPES:
                self.calls.clear()
            call = self.calls[key] = self._make(input)
        return call(input)

    def run_any(self, input: Tensor) -> Tensor:
        return run_kept(self.kept, self.layer, input, None, self.activation, None)

    def _make(self, input: Tensor) -> Callable[[Tensor], Tensor]:
        """What does as `run_any` does with inputs of that shape and dtype, while the layer is what it is."""
        weight, bias = self.layer.weight, self.layer.bias
        few = input.dim() == 2 and input.shape[0] <= _linear_ops.MOST_ROWS and type(weight) is nn.Parameter
        if not few or input.dtype != weight.dtype or weight.dtype == torch.float64:
            return self.run_any
        self.run_any(input)  # raises what there is to raise
        number = _activations.NAMES.index(self.activation)
        if weight.numel() < TINY:
            return lambda x: _activations.apply(F.linear(x, weight, bias), number, 0.01)
        vector, rows = _conv_call.as_vector(bias, input), torch.ops.pyops.linear_rows.default
        return lambda x: rows(x, weight, vector, None, number, 0.01)


MOST_SHAPES = 64


def run_kept(
    kept: Derived,
    layer: nn.Linear,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    backend: str | None,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear_act` with the layer's parameters, or a bias in place of its own; `kept` holds the weight in oneDNN's layout, where nobody
    follows the call."""
    weight, bias = layer.weight, layer.bias if bias is None else bias
    follows = torch.is_grad_enabled() or _conv_call.is_followed() or _conv_call.is_autocast(input.device.type)
    if follows or "weight" not in layer._parameters or input.dtype != weight.dtype or weight.dtype == torch.float64:
        return _linear.linear_act(input, weight, bias, residual=residual, activation=activation, backend=backend)
    found = kept.get(layer, dict)
    key = (input.shape, None if residual is None else (residual.shape, residual.dtype))
    last, name = found.get("last", (None, ""))
    if last != key or backend is not None or _backends.overridden():  # not the call of last time
        _linear.check(input, weight, bias, residual)
        name = _linear.choose(backend, input, live=False)
        found["last"] = key, name
    return _linear.run(name, input, weight, bias, residual, _activations.NAMES.index(activation), 0.01, found)


# Elements of a weight: 4 rows took 0.31 ms with PyTorch's product and 0.24 with ours at 512 x 512, 0.08 and 0.11 at 64 x 64.
FEW_FROM = 2**16


def run_packed(input: Tensor, weight: Tensor, bias: Tensor | None, kept: Callable[[], dict]) -> Tensor:
    """`F.linear`. Without gradients on a CPU large weights run on `linear_act`'s kernels: 2 to 4 rows, as in decoding, on the one that
    reads the weight once, more on oneDNN's, whose layout of the weight lies in what `kept` gives."""
    if weight.numel() < FEW_FROM or input.shape[:-1].numel() < 2 or not _conv_call.is_plain_inference(input):
        return F.linear(input, weight, bias)
    if input.dtype != weight.dtype or weight.dtype == torch.float64 or input.shape[-1] != weight.shape[1]:
        return F.linear(input, weight, bias)
    return _linear.run("cpu", input, weight, bias, None, 0, 0.01, kept())
