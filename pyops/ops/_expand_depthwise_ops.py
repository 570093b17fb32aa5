"""The torch op of an inverted-residual block's first two convolutions on a GPU: the expanded image never reaches memory.

    e = activation(conv1x1(input, expand_weight) + expand_bias)                  rounded to input's dtype
    output = activation(depthwise(e, depthwise_weight) + depthwise_bias)         stride 1 or 2, padding half the kernel

    pyops::expand_depthwise   (output, float32 means [N, E] of output over positions, or an empty tensor); not differentiable

expand_weight ``[E, C]`` and depthwise_weight ``[E, 1, K, K]`` have input's dtype or float32, biases ``[E]`` are float32 (float64 for
float64). Outputs are channels_last. `activation` is an index into `_activations.NAMES`. The kernel rounds float32 operands of the expansion
to tf32, so it takes float32 only with `tf32`: without tensor cores a position in two tiles, expanded twice, costs more than the memory it
saves. Elsewhere than on a GPU the op is computed by its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops, _depthwise_ops, _pointwise_ops

KERNELS, STRIDES = (3, 5, 7), (1, 2)
_WORTH = 240  # see `unsuited`


def unsuited(dtype: torch.dtype, shape: tuple[int, ...], kernel: int, stride: int, tf32: bool) -> str | None:
    """None where the kernel serves an image ``[N, C, H, W]``, else why two kernels do.

    An expanded value costs 2 C flops again where tiles overlap, and saves a write and a read. On an H100 (about 400 TFLOP/s of
    ``mma.sync`` and 3.35 TB/s; half the flops and twice the bytes in float32) the two are even where C times the overlap is `_WORTH`.
    """
    if dtype not in (torch.bfloat16, torch.float16) and not (dtype == torch.float32 and tf32):
        return "it takes bfloat16, float16, and float32 where tf32 is allowed"
    if kernel not in KERNELS or stride not in STRIDES:
        return f"it has kernels of {KERNELS} and strides of {STRIDES}, not {kernel} and {stride}"
    if len(shape) != 4 or shape[2] < 1 or shape[3] < 1:
        return "it takes images [N, C, H, W] with positions"
    if shape[1] * (overlap(dtype, shape[2], kernel, stride) * overlap(dtype, shape[3], kernel, stride) - 1) > _WORTH:
        return "tiles overlap too much for so many channels"
    return None


def overlap(dtype: torch.dtype, size: int, kernel: int, stride: int) -> float:
    """How often a row or column of a large image is expanded, by the tiles that shared memory has room for; once in a plane of one tile."""
    tile = {1: 14, 2: 8}[stride] if dtype.itemsize == 2 else {1: 10, 2: 6}[stride]
    outputs = (size - 1) // stride + 1
    return 1.0 if outputs <= tile else ((tile - 1) * stride + kernel) / (tile * stride)


def _reference(
    input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, activation, slope, means, tf32=False
) -> tuple[Tensor, Tensor]:
    expanded = _pointwise_ops._output(input, expand_weight, None, None, None, 0, 0.0, expand_bias, None, None, activation, slope)
    padding = depthwise_weight.shape[2] // 2
    shape = ([stride] * 2, [padding] * 2, [1, 1])
    output, found = _depthwise_ops.reference(expanded, depthwise_weight, depthwise_bias, None, *shape, activation, slope, means)
    return output.contiguous(memory_format=torch.channels_last), found


def _fake(input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, activation, slope, means, tf32=False):
    N, _, H, W = input.shape
    E = expand_weight.shape[0]
    output = _channel_ops.image_like(input, N, E, (H - 1) // stride + 1, (W - 1) // stride + 1)
    return output, _channel_ops.vector(input, *((N, E) if means else (0,)))


_library.define(
    "expand_depthwise",
    "(Tensor input, Tensor expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor? depthwise_bias, int stride, "
    "int activation, float slope, bool means, bool tf32=False) -> (Tensor output, Tensor means)",
    fake=_fake,
    reference=_reference,
)
