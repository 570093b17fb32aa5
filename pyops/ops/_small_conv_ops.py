"""The torch op of a convolution of small images on a CPU, for which oneDNN takes longer to start than to multiply.

pyops::small_conv  activation(conv(input) + bias), and with `pool` the maximum (1) or average (2) of each whole 2x2 window of that; weight
                   is `pack`'s, bias float32; sums are; not differentiable

Images are [N, C, H, W] in channels_last memory (others are copied).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations, _channel_ops, _depthwise_ops


def is_small(products: int, weights: int) -> bool:
    """Whether the kernel is the fastest: oneDNN's fused call takes 60 us to start, and holds larger filters better in its caches."""
    return products < (6e6 if weights <= 2**18 else 3e6)


def pack(weight: Tensor) -> Tensor:
    """Filters ``[O, C, KH, KW]`` as the kernel reads them: float32 ``[KH, KW, C, O]``, O padded to a multiple of 16 with zeros."""
    return F.pad(weight.detach().float().permute(2, 3, 1, 0), (0, -len(weight) % 16)).contiguous()


def _size(input: Tensor, weight: Tensor, stride, padding, pool: int) -> list[int]:
    size = _depthwise_ops.output_size(input.shape[2:], weight.shape[:2], stride, padding, (1, 1))
    return [n // 2 for n in size] if pool else list(size)


def _reference(input, weight, bias, out_channels, stride, padding, activation, slope, pool):
    filter = weight[..., :out_channels].permute(3, 2, 0, 1)
    y = _activations.apply(F.conv2d(input.float(), filter, bias, stride, padding), activation, slope)
    y = (F.max_pool2d if pool == 1 else F.avg_pool2d)(y, 2) if pool else y
    return y.to(input.dtype).contiguous(memory_format=torch.channels_last)


_library.define(
    "small_conv",
    "(Tensor input, Tensor weight, Tensor? bias, int out_channels, int[2] stride, int[2] padding, int activation, float slope, int pool)"
    " -> Tensor",
    fake=lambda input, weight, bias, out_channels, stride, padding, activation, slope, pool: _channel_ops.image_like(
        input, input.shape[0], out_channels, *_size(input, weight, stride, padding, pool)
    ),
    reference=_reference,
)
