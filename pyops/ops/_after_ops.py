"""The depthwise convolution of ``activation((input - mean) * scale + bias)``: batch norm and activation of the layer before, on the way in.

    pyops::depthwise_after      output; zero padding is of what is convolved
    pyops::depthwise_after_bwd  (gradient of what is convolved, gradient of weight)

`affine` [3, C] is mean, scale and bias, as in `_channel_ops`. One pass on a CPU; elsewhere `channel_apply` and the convolution after it.
Not differentiable: `_fused_ops` is.
"""

from __future__ import annotations

import torch

from pyops import _library
from pyops.ops import _channel_ops, _depthwise_ops  # noqa: F401  (registers the ops they use)

_ARGUMENTS = "Tensor input, Tensor affine, int activation, float slope, Tensor weight, int[] stride, int[] padding, int[] dilation"


def _compose(overload: str):
    ops = torch.ops.pyops
    apply, infer, bwd = (getattr(op, overload) for op in (ops.channel_apply, ops.depthwise_infer, ops.depthwise_bwd))

    def forward(input, affine, activation, slope, weight, stride, padding, dilation):
        a = apply(input, affine, None, None, None, None, activation, slope)
        return infer(a, weight, None, None, stride, padding, dilation, 0, 0.0, False)[0]

    def backward(grad, input, affine, activation, slope, weight, stride, padding, dilation):
        a = apply(input, affine, None, None, None, None, activation, slope)
        return bwd(grad, None, a, weight, None, None, stride, padding, dilation, 0, 0.0, True, True)[:2]

    return forward, backward


def _image(like, *shape):
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(input, affine, activation, slope, weight, stride, padding, dilation):
    return _image(input, *input.shape[:2], *_depthwise_ops.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation))


def _fake_backward(grad, input, affine, activation, slope, weight, *_):
    return _image(input, *input.shape), torch.empty_like(weight, memory_format=torch.contiguous_format)


_forward, _backward = _compose("default")
_library.define("depthwise_after", f"({_ARGUMENTS}) -> Tensor", fake=_fake, reference=_forward, overloads=("", "triton"))
_library.define(
    "depthwise_after_bwd", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)", fake=_fake_backward, reference=_backward,
    overloads=("", "triton"),
)  # fmt: skip
for _name, _function in zip(("depthwise_after", "depthwise_after_bwd"), _compose("triton"), strict=True):
    _library.implement(f"{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
