"""Torch ops of batch norm, activation and pooling in one pass: what follows a convolution whose map is then pooled.

    a = activation((input - mean) * scale + bias)       affine [3, C]: mean, scale, bias; without it a = activation(input)

    pyops::pool_run     the maximum (`maximum`) or the average of a over each window, and with `indices` the place of each maximum in its
                        window, row by row: uint8 like the output, else an empty tensor
    pyops::pool_reduce  [2, C]: sums of dz and of dz * (input - mean), where dz is the gradient of (input - mean) * scale + bias for the
                        output's gradient; index None: of an average
    pyops::pool_grad    dz * scale - terms[0] - (input - mean) * terms[1]: the input's gradient, where terms [2, C] are the share that
                        flows through batch statistics

Images are ``[N, C, H, W]`` in channels_last memory (others are copied), vectors float32 (float64 for float64). Windows are those of
`torch.nn.functional.max_pool2d` and `avg_pool2d` without `ceil_mode`: padding is at most half the kernel, never the maximum, and counted
as zeros in an average. Of equal values the first is the maximum, and NaN is above all. Windows hold at most 255 positions. None is
differentiable: `_fused_ops` is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations, _channel_ops
from pyops.ops._vendor_conv import Pool


def output_size(size, kernel, stride, padding) -> tuple[int, ...]:
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))


def _windows(a: Tensor, kernel, stride, padding, fill: float) -> Tensor:
    """[N, C, OH, OW, KH * KW]"""
    ph, pw = padding
    padded = F.pad(a, (pw, pw, ph, ph), value=fill)
    return padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)


def _run(input, affine, maximum, kernel_size, stride, padding, activation, slope, indices):
    a = _activations.apply(_channel_ops._summed(input, affine, None, None), activation, slope)
    windows = _windows(a, kernel_size, stride, padding, float("-inf") if maximum else 0.0)
    output, index = (windows.amax(-1), windows.argmax(-1)) if maximum else (windows.mean(-1), None)
    if index is None or not indices:
        return _image(output, input), input.new_empty(0, dtype=torch.uint8)
    return _image(output, input), index.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def _image(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _dz(grad, input, affine, index, kernel, stride, padding, activation, slope) -> Tensor:
    u = _channel_ops._summed(input, affine, None, None)
    (H, W), (ph, pw) = input.shape[2:], padding
    da = u.new_zeros((*u.shape[:2], H + 2 * ph + stride[0], W + 2 * pw + stride[1]))
    OH, OW = grad.shape[2:]
    for tap in range(kernel[0] * kernel[1]):
        y, x = divmod(tap, kernel[1])
        share = grad.to(u.dtype) / (kernel[0] * kernel[1]) if index is None else grad.to(u.dtype) * (index == tap)
        da[:, :, y : y + OH * stride[0] : stride[0], x : x + OW * stride[1] : stride[1]] += share
    return _activations.apply_backward(da[:, :, ph : ph + H, pw : pw + W].contiguous(), u, activation, slope)


def _reduce(grad, input, affine, index, kernel_size, stride, padding, activation, slope):
    dz = _dz(grad, input, affine, index, kernel_size, stride, padding, activation, slope)
    centred = _channel_ops._wide(input) - _channel_ops._by_channel(affine[0])
    return torch.stack([dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))])


def _grad(grad, input, affine, terms, index, kernel_size, stride, padding, activation, slope):
    dx = _dz(grad, input, affine, index, kernel_size, stride, padding, activation, slope)
    if affine is not None:
        dx = dx * _channel_ops._by_channel(affine[1])
    if terms is not None:
        centred = _channel_ops._wide(input) - _channel_ops._by_channel(affine[0])
        dx = dx - _channel_ops._by_channel(terms[0]) - centred * _channel_ops._by_channel(terms[1])
    return _image(dx, input).clone(memory_format=torch.channels_last)


def _fake(input, affine, maximum, kernel_size, stride, padding, activation, slope, indices):
    size = (*input.shape[:2], *output_size(input.shape[2:], kernel_size, stride, padding))
    output = _channel_ops.image_like(input, *size)
    if not (maximum and indices):
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, torch.empty_like(output, dtype=torch.uint8)


_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int activation, float slope"
_OVERLOADS = ("", "triton")
_library.define(
    "pool_run",
    f"(Tensor input, Tensor? affine, bool maximum, {_WINDOW}, bool indices) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_run,
    overloads=_OVERLOADS,
)
_library.define(
    "pool_reduce",
    f"(Tensor grad, Tensor input, Tensor affine, Tensor? index, {_WINDOW}) -> Tensor",
    fake=lambda grad, input, *_: _channel_ops.vector(input, 2, input.shape[1]),
    reference=_reduce,
    overloads=_OVERLOADS,
)
_library.define(
    "pool_grad",
    f"(Tensor grad, Tensor input, Tensor? affine, Tensor? terms, Tensor? index, {_WINDOW}) -> Tensor",
    fake=lambda grad, input, *_: _channel_ops.image_like(input),
    reference=_grad,
    overloads=_OVERLOADS,
)


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import pool  # imports triton, so only at first use

        return getattr(pool, name)(*args)

    return call


for _name in ("run", "reduce", "grad"):
    _library.implement(f"pool_{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1


def pooled(input: Tensor, pool: Pool) -> Tensor:
    """Pooling alone, without gradients."""
    op = _run if input.dtype == torch.float64 else torch.ops.pyops.pool_run.default
    return op(input, None, pool.maximum, pool.kernel, pool.stride, pool.padding, 0, 0.0, False)[0]
