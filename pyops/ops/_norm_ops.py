"""Torch ops of the norms over an image's channels, for images in either layout: `rows` [N, P, C], else planes [N, C, P]; contiguous.

    pyops::lrn_run          a / (k + alpha / size * s) ** beta, s the sum of a^2 over the channels c - size // 2 .. c + (size - 1) // 2
                            that exist; a = relu(input) with `relu`, else input
    pyops::lrn_grad         the input's gradient of it
    pyops::layer_norm_run   (input - mean) / sqrt(variance + eps) * weight + bias over each position's channels
    pyops::layer_norm_grad  (the input's gradient, or empty without `needs_input`; [2, C]: weight's and bias's gradients)

weight and bias are float32 (float64 for float64), as sums and statistics are. None is differentiable.

Source: Krizhevsky et al., 2012 (local response normalisation); Ba et al., 2016 (LayerNorm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops


def _planes(t: Tensor, rows: bool) -> Tensor:
    """Wide, with channels in the middle."""
    wide = _channel_ops._wide(t)
    return wide.transpose(1, 2) if rows else wide


def _like(value: Tensor, input: Tensor, rows: bool) -> Tensor:
    return (value.transpose(1, 2) if rows else value).to(input.dtype).contiguous()


def _window_sums(t: Tensor, before: int, after: int) -> Tensor:
    """Of channels c - before .. c + after."""
    padded = F.pad(t, (0, 0, before, after))
    return padded.unfold(1, before + after + 1, 1).sum(-1)


def _lrn(input, rows, size, alpha, beta, k, relu):
    a = _planes(input, rows)
    a = a.relu() if relu else a
    d = k + alpha / size * _window_sums(a.square(), size // 2, (size - 1) // 2)
    return _like(a * d**-beta, input, rows)


def _lrn_grad(grad, input, rows, size, alpha, beta, k, relu):
    x, g = _planes(input, rows), _planes(grad, rows)
    a = x.relu() if relu else x
    before, after = size // 2, (size - 1) // 2
    d = k + alpha / size * _window_sums(a.square(), before, after)
    shares = _window_sums(g * a * d ** (-beta - 1), after, before)
    da = g * d**-beta - 2 * alpha * beta / size * a * shares
    return _like(torch.where(x <= 0, 0, da) if relu else da, input, rows)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps), torch.rsqrt(var + eps)


def _layer_norm(input, rows, weight, bias, eps):
    y, _ = _statistics(_planes(input, rows), eps)
    y = y if weight is None else y * weight[:, None]
    return _like(y if bias is None else y + bias[:, None], input, rows)


def _layer_norm_grad(grad, input, rows, weight, eps, needs_input):
    g = _planes(grad, rows)
    normed, rstd = _statistics(_planes(input, rows), eps)
    sums = torch.stack([(g * normed).sum((0, 2)), g.sum((0, 2))])
    if not needs_input:
        return input.new_empty(0), sums
    g = g if weight is None else g * weight[:, None]
    dx = rstd * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))
    return _like(dx, input, rows), sums


_LRN = "bool rows, int size, float alpha, float beta, float k, bool relu"
_OVERLOADS = ("", "triton")
_library.define(
    "lrn_run", f"(Tensor input, {_LRN}) -> Tensor", fake=lambda input, *_: torch.empty_like(input), reference=_lrn, overloads=_OVERLOADS
)
_library.define(
    "lrn_grad",
    f"(Tensor grad, Tensor input, {_LRN}) -> Tensor",
    fake=lambda grad, input, *_: torch.empty_like(input),
    reference=_lrn_grad,
    overloads=_OVERLOADS,
)
_library.define(
    "layer_norm_run",
    "(Tensor input, bool rows, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fake=lambda input, *_: torch.empty_like(input),
    reference=_layer_norm,
    overloads=_OVERLOADS,
)
_library.define(
    "layer_norm_grad",
    "(Tensor grad, Tensor input, bool rows, Tensor? weight, float eps, bool needs_input) -> (Tensor, Tensor)",
    fake=lambda grad, input, rows, weight, eps, needs_input: (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        _channel_ops.vector(input, 2, input.shape[2 if rows else 1]),
    ),
    reference=_layer_norm_grad,
    overloads=_OVERLOADS,
)


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import channel_norms  # imports triton, so only at first use

        return getattr(channel_norms, name)(*args)

    return call


for _name in ("lrn_run", "lrn_grad", "layer_norm_run", "layer_norm_grad"):
    _library.implement(f"{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
