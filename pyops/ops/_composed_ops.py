"""Ops that are one pass over memory on a CPU and several of the other ops elsewhere. Below, a = activation((input - mean) * scale + bias),
batch norm and activation of the layer before, done on the way in; `affine` [3, C] is mean, scale, bias as in `_channel_ops`.

    pyops::depthwise_after      the depthwise convolution of a; zero padding is a's
    pyops::depthwise_after_bwd  (gradient of a, gradient of weight)
    pyops::pointwise_back       of the 1x1 convolution of a * gate: (gradient of a * gate, gradient of weight [O, C],
                                sums [N, C] of that gradient times a over positions)

None is differentiable: `_fused_ops` is.
"""

from __future__ import annotations

import torch

from pyops import _library
from pyops.ops import _channel_ops, _depthwise_ops
from pyops.ops._pointwise_ops import image_of, rows_of

_ARGUMENTS = "Tensor input, Tensor affine, int activation, float slope, Tensor weight, int[] stride, int[] padding, int[] dilation"


def _compose(overload: str):
    ops = torch.ops.pyops
    parts = (ops.channel_apply, ops.channel_sums, ops.depthwise_infer, ops.depthwise_bwd)
    apply, sums_of, infer, bwd = (getattr(op, overload) for op in parts)

    def forward(input, affine, activation, slope, weight, stride, padding, dilation):
        a = apply(input, affine, None, None, None, None, activation, slope)
        return infer(a, weight, None, None, stride, padding, dilation, 0, 0.0, False)[0]

    def backward(grad, input, affine, activation, slope, weight, stride, padding, dilation):
        a = apply(input, affine, None, None, None, None, activation, slope)
        return bwd(grad, None, a, weight, None, None, stride, padding, dilation, 0, 0.0, True, True)[:2]

    def pointwise_back(grad, input, weight, affine, gate, activation, slope, needs_input, sums):
        rows, a = rows_of(grad), input
        if affine is not None or gate is not None or activation:
            a = apply(input, affine, None, None, gate, None, activation, slope)
        grad_weight = (rows.t() @ rows_of(a)).contiguous()
        del a
        if not needs_input:
            return input.new_empty(0), grad_weight, _channel_ops.vector(input, 0)
        grad_a = image_of(rows @ weight.to(rows.dtype), grad.shape[0], *grad.shape[2:])
        found = sums_of(input, grad_a, affine, None, None, activation, slope) if sums else _channel_ops.vector(input, 0)
        return grad_a, grad_weight, found

    return forward, backward, pointwise_back


def _fake(input, affine, activation, slope, weight, stride, padding, dilation):
    return _channel_ops.image_like(
        input, *input.shape[:2], *_depthwise_ops.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    )


def _fake_backward(grad, input, affine, activation, slope, weight, *_):
    return _channel_ops.image_like(input, *input.shape), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _fake_pointwise_back(grad, input, weight, affine, gate, activation, slope, needs_input, sums):
    grad_a = _channel_ops.image_like(input, *input.shape) if needs_input else input.new_empty(0)
    wanted = needs_input and sums
    return grad_a, input.new_empty(weight.shape), _channel_ops.vector(input, *(input.shape[:2] if wanted else (0,)))


_forward, _backward, compose_pointwise_back = _compose("default")
_library.define("depthwise_after", f"({_ARGUMENTS}) -> Tensor", fake=_fake, reference=_forward, overloads=("", "triton"))
_library.define(
    "depthwise_after_bwd", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)", fake=_fake_backward, reference=_backward,
    overloads=("", "triton"),
)  # fmt: skip
_library.define(
    "pointwise_back",
    "(Tensor grad, Tensor input, Tensor weight, Tensor? affine, Tensor? gate, int activation, float slope, bool needs_input, bool sums) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_pointwise_back, reference=compose_pointwise_back, overloads=("", "triton"),
)  # fmt: skip
for _name, _function in zip(("depthwise_after", "depthwise_after_bwd", "pointwise_back"), _compose("triton"), strict=True):
    _library.implement(f"{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
