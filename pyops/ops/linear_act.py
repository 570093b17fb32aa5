"""A linear layer with residual and activation in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _conv_call, _linear_ops, _machine, _vendor_conv
from pyops.ops._sharding import is_sharded

OP = "linear_act"
_onednn: Any = torch.ops.mkldnn


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    r"""``activation(input @ weight.T + bias + residual)``.

    Args:
        input: ``[..., K]``; float32, bfloat16, float16 or float64 (the last on "eager" only).
        weight: ``[N, K]`` of input's dtype.
        bias: ``[N]`` or None.
        residual: ``[..., N]``, input's dtype, added before the activation.
        activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (with erf), "sigmoid", "leaky_relu", "tanh" or "hardsigmoid".
        negative_slope: leaky_relu's.
        backend: "cpu" (pyops' kernel for up to 4 rows, oneDNN's fused product for more) or "eager"; None lets pyops choose.

    Returns:
        output ``[..., N]``. With gradients PyTorch's own ops run, whatever the backend. `pyops.nn.LinearAct` keeps the weight in
        oneDNN's layout.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.
    """
    number = _activations.number(OP, activation)
    check(input, weight, bias, residual)
    cast: Any = _conv_call.autocast(input, weight, bias, residual)
    name = choose(backend, cast[0], _conv_call.needs_grad(*cast))
    return run(name, cast[0], cast[1], cast[2], cast[3], number, negative_slope)


def run(name: str, input: Tensor, weight: Tensor, bias, residual, activation: int, slope: float, kept: dict | None = None) -> Tensor:
    """The layer without checks; `kept` holds what owners keep of the weight."""
    if name == "eager" or is_sharded(input) or (torch.is_grad_enabled() and _conv_call.needs_grad(input, weight, bias, residual)):
        y = F.linear(input, weight, bias)
        return _activations.apply(y if residual is None else y + residual, activation, slope)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    beside = None if residual is None else residual.reshape(-1, residual.shape[-1])
    if rows.shape[0] <= _linear_ops.MOST_ROWS:
        vector = _conv_call.as_vector(bias, input)
        output = torch.ops.pyops.linear_rows.default(rows, weight, vector, beside, activation, slope)
    elif fused(input):
        output = _by_library(rows, weight, bias, beside, activation, slope, kept)
    else:
        return run("eager", input, weight, bias, residual, activation, slope)
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], weight.shape[0])


def fused(input: Tensor) -> bool:
    """Whether oneDNN's fused product, private to PyTorch, is there for such inputs."""
    if not input.is_cpu or input.numel() == 0 or _conv_call.is_followed():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and hasattr(_onednn, "_linear_pointwise")):
        return False
    if input.dtype == torch.bfloat16:
        return _onednn._is_mkldnn_bf16_supported()
    # it adds products one after another, where PyTorch's own product on x86 adds up several sums
    backends: Any = torch.backends
    return input.dtype == torch.float32 and (torch.compiler.is_compiling() or backends.mkldnn.matmul.fp32_precision != "ieee")


def _by_library(input, weight, bias, residual, activation, slope, kept: dict | None) -> Tensor:
    if kept is not None and input.dtype == torch.float32:
        layout = kept.setdefault("mkl", MklLayout()).of(weight, input.shape[0], kept)
        if layout is not None:
            y = torch.ops.mkl._mkl_linear(input.contiguous(), layout, weight, bias, input.shape[0])
            return _activations.apply_(y if residual is None else y.add_(residual), activation, slope)
    if kept is not None and hasattr(_onednn, "_reorder_linear_weight"):
        key = ("onednn", input.dtype)
        if key not in kept:
            kept[key] = _onednn._reorder_linear_weight(weight, input.shape[0])
        weight = kept[key]
    attr, scalars = _vendor_conv.post_op(activation, slope)
    if residual is None:
        return _onednn._linear_pointwise(input, weight, bias, attr, scalars, "none" if attr == "gelu" else "")
    y = _onednn._linear_pointwise.binary(input, residual, weight, bias, "add")
    return _activations.apply(y, activation, slope)


class MklLayout:
    """A weight as MKL multiplies it with one number of rows, where MKL is the faster library. It is made when a number of rows comes again,
    and a few times at most: sequences of every length are oneDNN's, whose layout serves them all."""

    FROM_ROWS, MOST = 32, 4

    def __init__(self) -> None:
        self.last, self.made = 0, 0
        self.found: tuple[int, Tensor | None] = (0, None)

    def of(self, weight: Tensor, rows: int, kept: dict) -> Tensor | None:
        """None where oneDNN is to run; a layout takes the place of oneDNN's in `kept`."""
        known, layout = self.found
        if known == rows:
            return layout
        again, self.last = rows == self.last, rows
        if not again or rows < self.FROM_ROWS or self.made == self.MOST or not _machine.prefers_mkl():
            return None
        layout = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
        self.made, self.found = self.made + 1, (rows, layout)
        kept.pop(("onednn", weight.dtype), None)
        return layout


def choose(backend: str | None, input: Tensor, live: bool) -> str:
    name = _backends.select(OP, _backends.requested(backend), _order(live), lambda name: _unsupported(name, input))
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, input.device.type, name)
    return name


def _order(live: bool) -> tuple[str, ...]:
    return ("eager", "cpu") if live or _conv_call.is_recorded() else ("cpu", "eager")


def _unsupported(backend: str, input: Tensor) -> str | None:
    if backend in ("cuda", "triton"):
        return f"it has no {backend} kernel"
    return _conv_call.unsupported(input.device.type, input.dtype, backend)


def check(input, weight, bias, residual) -> None:
    _conv_call.check_tensor(OP, "input", input, optional=False)
    if input.dim() < 1 or input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: input: expected [..., K] of float32, bfloat16, float16 or float64, got {input.dtype} {tuple(input.shape)}")
    _conv_call.check_tensor(OP, "weight", weight, input, optional=False)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight: expected [N, {input.shape[-1]}] for input {tuple(input.shape)}, got shape {tuple(weight.shape)}")
    N = weight.shape[0]
    _conv_call.check_tensor(OP, "bias", bias, input, (N,))
    _conv_call.check_tensor(OP, "residual", residual, input, (*input.shape[:-1], N))
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != input.dtype and not _conv_call.is_autocast(input.device.type):
            raise ValueError(f"{OP}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")


def _explain(input, weight, bias=None, *, residual=None, backend=None, **_):
    check(input, weight, bias, residual)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, {weight.shape[0]} outputs"
    order = _order(_conv_call.needs_grad(input, weight, bias, residual))
    return _backends.build_explanation(OP, facts, _backends.requested(backend), order, lambda name: _unsupported(name, input))


_backends.EXPLAINERS[OP] = _explain
