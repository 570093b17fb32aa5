"""The torch ops of MBConv inference on a CPU: folded weights are packed once, then a whole block is one call.

pyops::mbconv_pack   float32 weights, batch norms folded, into one opaque tensor for this machine's instruction set
pyops::mbconv_infer  the block; not differentiable. Activations are indices into `_activations.NAMES`
"""

from __future__ import annotations

import torch

from pyops import _library

_library.define(
    "mbconv_pack",
    "(Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, Tensor? squeeze_weight, "
    "Tensor? squeeze_bias, Tensor? gate_weight, Tensor? gate_bias, Tensor project_weight, Tensor project_bias, bool bf16) -> Tensor",
    fake=lambda *args: args[-2].new_empty(torch.library.get_ctx().new_dynamic_size()),
)


def _fake(
    input, packed, expanded, squeezed, out_channels, kernel, stride, activation, squeeze_activation, gate_activation, expand, residual
):  # fmt: skip
    N, _, H, W = input.shape
    size = ((H - 1) // stride + 1, (W - 1) // stride + 1)
    return torch.empty((N, out_channels, *size), dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


_library.define(
    "mbconv_infer",
    "(Tensor input, Tensor packed, int expanded, int squeezed, int out_channels, int kernel, int stride, int activation, "
    "int squeeze_activation, int gate_activation, bool expand, bool residual) -> Tensor",
    fake=_fake,
)
