"""A linear layer with its activation."""

from __future__ import annotations

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
        return run_kept(self._kept, self, input, residual, self.activation, self.backend)

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


def run_few(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; 2 to 4 rows without gradients on a CPU, as in decoding, run on `linear_act`'s kernel, which reads the weight once."""
    few = 1 < input.numel() // max(weight.shape[1], 1) <= _linear_ops.MOST_ROWS and weight.numel() >= FEW_FROM
    if not few or not input.is_cpu or torch.is_grad_enabled() or _conv_call.is_followed():
        return F.linear(input, weight, bias)
    if _backends.requested(None) not in ("auto", "cpu"):  # linear_act has no other kernel
        return F.linear(input, weight, bias)
    return _linear.linear_act(input, weight, bias)
