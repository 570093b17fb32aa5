"""Torch ops of the 1x1 convolution: one matrix product, with what comes before and after it done on the way.

    x = (input - rows[0]) * rows[1]                    rows [2, N*H*W]: a LayerNorm's mean and 1/std of each position; optional
    a = activation_in((x - mean) * scale + shift)      affine [3, C]: mean, scale, shift; optional
    a = a * gate                                       gate [N, C]; optional
    y[n, p, o] = sum over c of weight[o, c] * a[n, p, c]
    output = activation((y + bias[o]) * keep[n] + residual)

Images are ``[N, C, H, W]`` whose memory is ``[N, H, W]`` positions of neighbouring channels; a position may be farther from the next
than C (a slice of a wider buffer). weight ``[O, C]`` has input's dtype or float32, or is what `pack` makes of it; every vector is float32
(float64 for float64). Products are summed in float32, of operands that `tf32` lets a GPU round where images are float32. `a` is rounded to
input's dtype where the product takes 16-bit operands.

    pyops::pointwise_run   (output, moments [2, O] of output as `channel_moments` gives them, or an empty tensor)
    pyops::pointwise_into  the same, written into `output`, a slice of a wider buffer perhaps; no moments

Neither is differentiable: `_fused_ops` is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations, _channel_ops

_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor? rows, Tensor? affine, Tensor? gate, int input_activation, float input_slope, Tensor? bias, "
    "Tensor? keep, Tensor? residual, int activation, float slope"
)


def rows_of(image: Tensor) -> Tensor:
    """``[N, C, H, W] -> [N*H*W, C]``, a view where memory allows."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def image_of(rows: Tensor, N: int, H: int, W: int) -> Tensor:
    """The inverse of `rows_of`: a channels_last image on the memory of rows."""
    return rows.reshape(N, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def pack(weight: Tensor) -> Tensor:
    """``[O, C]`` as `pointwise_into` multiplies it on a CPU, for owners that keep it: ``[O/16, C, 16]``, zeros beyond O; float32."""
    O, C = weight.shape
    blocks = -(-O // 16)
    padded = F.pad(weight.float(), (0, 0, 0, 16 * blocks - O))
    return padded.reshape(blocks, 16, C).transpose(1, 2).contiguous()


def _output(input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope) -> Tensor:
    N, C, H, W = input.shape
    kind = _channel_ops.vector_dtype(input.dtype)
    a = rows_of(input.to(kind))
    if rows is not None:
        a = (a - rows[0][:, None]) * rows[1][:, None]
    if affine is not None:
        a = (a - affine[0]) * affine[1] + affine[2]
    a = _activations.apply(a, input_activation, input_slope)
    if gate is not None:
        a = a.reshape(N, H * W, C).mul(gate[:, None]).reshape(-1, C)
    y = image_of(a @ weight.to(kind).t(), N, H, W)
    if bias is not None:
        y = y + bias[None, :, None, None]
    if keep is not None:
        y = y * keep[:, None, None, None]
    if residual is not None:
        y = y + residual
    return _activations.apply(y, activation, slope).to(input.dtype).contiguous(memory_format=torch.channels_last)


_OPERANDS = 12  # arguments before `moments` and `tf32`


def _run(*arguments):
    output = _output(*arguments[:_OPERANDS])
    return output, _channel_ops._moments(output) if arguments[_OPERANDS] else _channel_ops.vector(output, 0)


def _into(output, *arguments):
    output.copy_(_output(*arguments[:_OPERANDS]))


def tf32_allowed(input: Tensor) -> bool:
    """torch's switch for convolutions on a GPU; not while the compiler, which cannot read it, traces a call."""
    cudnn: Any = torch.backends.cudnn
    return input.is_cuda and not torch.compiler.is_compiling() and cudnn.conv.fp32_precision == "tf32"


def _fake(input, weight, *options):
    N, _, H, W = input.shape
    output = _channel_ops.image_like(input, N, weight.shape[0], H, W)
    return output, _channel_ops.vector(input, *((2, weight.shape[0]) if options[_OPERANDS - 2] else (0,)))


_library.define(
    "pointwise_run",
    f"({_ARGUMENTS}, bool moments, bool tf32=False) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_run,
    overloads=("", "triton"),
)
_library.define(
    "pointwise_into",
    f"(Tensor(a!) output, {_ARGUMENTS}, bool tf32=False) -> ()",
    fake=lambda *_: None,
    reference=_into,
    overloads=("", "triton"),
)


def _triton_run(*args):
    from pyops.triton_kernels import pointwise_conv  # imports triton, so only at first use

    return pointwise_conv.run(*args)


def _triton_into(*args):
    from pyops.triton_kernels import pointwise_conv

    return pointwise_conv.into(*args)


for _name, _function in (("run", _triton_run), ("into", _triton_into)):
    _library.implement(f"pointwise_{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
