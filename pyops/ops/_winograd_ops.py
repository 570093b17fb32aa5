"""The torch ops of the Winograd convolution on a CPU: 3x3 filters, stride 1, transformed once.

pyops::winograd_pack   float32 filters [O, C, 3, 3] as the points of F(m x m, 3x3), [O/16, (m+2)^2, C, 16]; m is 4 or 2
pyops::winograd_infer  activation(conv(input) + bias + residual), or with `residual_last` the residual after the activation; with `pool`
                       the maximum (1) or average (2) of each whole 2x2 window of that; with `upsample` of the input enlarged twice, each
                       position repeated (1) or bilinear (2, `align_corners=False`); not differentiable
pyops::winograd_into   activation(conv(input) + bias) into `out`, which may be a slice of a channels_last tensor's channels

Images are [N, C, H, W] in channels_last memory (others are copied), bias is float32. Sums are in float32 whatever the images' dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops, _machine

_library.define(
    "winograd_pack",
    "(Tensor weight, int m) -> Tensor",
    fake=lambda weight, m: weight.new_empty(((weight.shape[0] + 15) // 16, (m + 2) ** 2, weight.shape[1], 16)),
)


def _fake(input, packed, bias, residual, out_channels, pad_h, pad_w, activation, slope, residual_last=False, pool=0, upsample=0):
    N, _, H, W = input.shape
    H, W = (2 * H, 2 * W) if upsample else (H, W)
    size = (H + 2 * pad_h - 2, W + 2 * pad_w - 2)
    return _channel_ops.image_like(input, N, out_channels, *(n // 2 if pool else n for n in size))


_library.define(
    "winograd_infer",
    "(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, int pad_h, int pad_w, int activation, float slope, "
    "bool residual_last=False, int pool=0, int upsample=0) -> Tensor",
    fake=_fake,
)
_library.define(
    "winograd_into",
    "(Tensor(a!) out, Tensor input, Tensor packed, Tensor? bias, int pad_h, int pad_w, int activation, float slope) -> ()",
    fake=lambda *_: None,
)


def size_of_tile(
    shape: tuple[int, ...], weight: Tensor, stride, padding, dilation, groups: int, keeps: bool, dtype: torch.dtype = torch.float32
) -> int:
    """m of the F(m x m, 3x3) for a CPU convolution of an image of `shape` and `dtype`, 0 where a direct convolution is expected to be
    faster or this is none of Winograd's. `keeps`: the points of the filters are kept from call to call."""
    times = expected_times(shape, weight, stride, padding, dilation, groups, keeps, dtype)
    return min(times, key=lambda m: times[m]) if times else 0


def expected_times(
    shape: tuple[int, ...], weight: Tensor, stride, padding, dilation, groups: int, keeps: bool, dtype: torch.dtype = torch.float32
) -> dict[int, float]:
    """Seconds by m, of a direct convolution by 0; Winograd's with the margin that they must promise. Empty where they have no say."""
    plain = tuple(stride) == (1, 1) and tuple(dilation) == (1, 1) and groups == 1
    if not plain or weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3) or not _allowed():
        return {}
    N, C, H, W = shape
    O, OH, OW = weight.shape[0], H + 2 * padding[0] - 2, W + 2 * padding[1] - 2
    if N == 0 or min(OH, OW) < 1 or C < 16 or O < 16:
        return {}
    paired = dtype == torch.bfloat16 and _multiplies_pairs()
    machine = _machine.rates(torch.float32)
    direct = _machine.rates(dtype).products if paired else machine.products
    times = {0: 18e-9 * N * OH * OW * C * O / direct}
    for m in (2, 4):
        points, tiles = (m + 2) ** 2, N * -(-OH // m) * -(-OW // m)
        size = 4e-9 * points * C * O
        arithmetic = (2e-9 * C * O + _TRANSFORM * (C + O)) * points * tiles / machine.products
        reads = size / (machine.cache if size < _CACHE_SIZE else machine.memory)
        times[m] = _MARGIN * (arithmetic + reads + (0.0 if keeps else size * _WRITES / machine.memory + _CALL))
    return times


@functools.cache
def _multiplies_pairs() -> bool:
    """Whether direct convolutions multiply pairs of bfloat16; Winograd's sums are in float32 whatever the image."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# A point's way through both transforms as products; how much slower points of filters are written than read; seconds of the calls around
# that (copies of the filter, fresh memory); gigabytes that the last level of cache holds; how much faster a convolution must promise to
# be. On two cores of Zen 4 measured times of 16 shapes lay within 30 % of these sums, and what was chosen was the fastest of the three but
# on one, by 0.02 ms; in bfloat16 on 12 of 13, by 0.07 ms.
_TRANSFORM, _WRITES, _CALL, _CACHE_SIZE, _MARGIN = 1.76e-8, 6.0, 3e-4, 0.024, 1.1


def _allowed() -> bool:
    """torch's switch: not where float32 is asked to be IEEE's, or while the compiler, which cannot read it, traces a call."""
    if torch.compiler.is_compiling() or _library.load_error is not None:
        return False
    backends: Any = torch.backends
    return backends.mkldnn.conv.fp32_precision != "ieee"  # which follows torch.backends.fp32_precision where it is not set itself
