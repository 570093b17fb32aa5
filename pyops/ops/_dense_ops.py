"""Torch ops of the convolution with full or grouped filters, its transpose and the gradient of its filter, as implicit matrix products.

    pyops::conv_run            output = activation(conv(input) + bias + residual)      weight [O, C/groups, KH, KW]
    pyops::conv_transpose_run  the same of the transposed convolution, which is also the gradient of a convolution's input:
                               input [N, I, H, W], weight [I, O/groups, KH, KW], output of `output_size`
    pyops::conv_wgrad          the filter's gradient [O, C/groups, KH, KW] of a convolution, from the output's gradient and the input

With `residual_last` the residual is added after the activation. Images are ``[N, C, H, W]`` in channels_last memory (others are copied),
weight has input's dtype, bias is float32 (float64 for float64). Products are summed in float32, of operands that `tf32` lets a GPU round
where images are float32; what is stored is rounded once. `moments` asks for [2, O] of the stored output, as `channel_moments` gives
them; else an empty tensor. With `pool`, 1 the maximum or 2 the average, conv_run's output is that of each whole 2x2 window of it (then
without moments). None is differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations, _channel_ops, _depthwise_ops, _pool_ops, _vendor_conv, _winograd_ops
from pyops.ops._vendor_conv import Conv, Pool

MAXIMUM, AVERAGE = 1, 2
_EPILOGUE = "int activation, float slope, bool residual_last, bool moments, bool tf32=False"


def _finish(y: Tensor, input, bias, residual, activation, slope, residual_last, moments, pool=0) -> tuple[Tensor, Tensor]:
    if bias is not None:
        y = y + bias[None, :, None, None]
    if residual is not None and not residual_last:
        y = y + residual
    y = _activations.apply(y, activation, slope)
    if residual is not None and residual_last:
        y = y + residual
    if pool:
        y = F.max_pool2d(y, 2) if pool == MAXIMUM else F.avg_pool2d(y, 2)
    output = y.to(input.dtype).contiguous(memory_format=torch.channels_last)
    return output, _channel_ops._moments(output) if moments else _channel_ops.vector(output, 0)


def _run(input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, residual_last, moments, tf32=False, pool=0):
    kind = _channel_ops.vector_dtype(input.dtype)
    y = torch.conv2d(input.to(kind), weight.to(kind), None, stride, padding, dilation, groups)
    return _finish(y, input, bias, residual, activation, slope, residual_last, moments, pool)


def _transpose_run(
    input, weight, bias, residual, stride, padding, output_size, dilation, groups, activation, slope, residual_last, moments, tf32=False
):  # fmt: skip
    kind = _channel_ops.vector_dtype(input.dtype)
    least = smallest_transposed(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    rest = [size - low for size, low in zip(output_size, least, strict=True)]
    y = torch.conv_transpose2d(input.to(kind), weight.to(kind), None, stride, padding, rest, groups, dilation)
    return _finish(y, input, bias, residual, activation, slope, residual_last, moments)


def _wgrad(grad, input, kernel_size, stride, padding, dilation, groups, tf32=False):
    kind = _channel_ops.vector_dtype(input.dtype)
    shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    like = input.new_empty(shape, dtype=kind)
    found = torch.ops.aten.convolution_backward(
        grad.to(kind), input.to(kind), like, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return found.to(input.dtype).contiguous()


def smallest_transposed(size, kernel, stride, padding, dilation) -> list[int]:
    """The transposed convolution's smallest output; up to ``stride - 1`` more positions are as good."""
    return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]


def _fake(input, weight, bias, residual, stride, padding, dilation, *options):
    size = _depthwise_ops.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    pool = len(options) > 6 and options[6] > 0
    return _results(input, weight.shape[0], [n // 2 for n in size] if pool else size, options[4])


def _fake_transpose(input, weight, bias, residual, stride, padding, output_size, dilation, groups, *options):
    return _results(input, weight.shape[1] * groups, output_size, options[3])


def _results(input, O, size, moments) -> tuple[Tensor, Tensor]:
    output = _channel_ops.image_like(input, input.shape[0], O, *size)
    return output, _channel_ops.vector(input, *((2, O) if moments else (0,)))


def _fake_wgrad(grad, input, kernel_size, stride, padding, dilation, groups, tf32=False):
    return input.new_empty((grad.shape[1], input.shape[1] // groups, *kernel_size))


_OPERANDS = "Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding"
_OVERLOADS = ("", "triton")
_library.define(
    "conv_run",
    f"({_OPERANDS}, int[] dilation, int groups, {_EPILOGUE}, int pool=0) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_run,
    overloads=_OVERLOADS,
)
_library.define(
    "conv_transpose_run",
    f"({_OPERANDS}, int[] output_size, int[] dilation, int groups, {_EPILOGUE}) -> (Tensor, Tensor)",
    fake=_fake_transpose,
    reference=_transpose_run,
    overloads=_OVERLOADS,
)
_library.define(
    "conv_wgrad",
    "(Tensor grad, Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool tf32=False) -> Tensor",
    fake=_fake_wgrad,
    reference=_wgrad,
    overloads=_OVERLOADS,
)


def _triton_run(*args):
    from pyops.triton_kernels import dense_conv  # imports triton, so only at first use

    return dense_conv.run(*args)


def _triton_transpose_run(*args):
    from pyops.triton_kernels import dense_conv

    return dense_conv.transpose_run(*args)


def _triton_wgrad(*args):
    from pyops.triton_kernels import dense_wgrad

    return dense_wgrad.wgrad(*args)


for _name, _function in (("run", _triton_run), ("transpose_run", _triton_transpose_run), ("wgrad", _triton_wgrad)):
    _library.implement(f"conv_{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1


def _on_cpu(input, weight, bias, residual, call: Conv, moments, pool=0) -> tuple[Tensor, Tensor]:
    """3x3 filters by Winograd's method where that is faster, their points computed anew; others by PyTorch's engines."""
    pads = [2 - p for p in call.padding] if call.transposed else call.padding
    m = 0
    if min(pads) >= 0 and not any(call.output_padding or ()):
        filter = weight.transpose(0, 1) if call.transposed else weight
        m = _winograd_ops.size_of_tile(input.shape, filter, call.stride, pads, call.dilation, call.groups, False, input.dtype)
    if m:
        points = torch.ops.pyops.winograd_pack.default(filter.flip(2, 3).float() if call.transposed else filter.float(), m)
        epilogue = (call.activation, call.slope, call.residual_last)
        output = torch.ops.pyops.winograd_infer.default(input, points, bias, residual, filter.shape[0], *pads, *epilogue, pool)
    else:
        output = _vendor_conv.run(input, weight, bias, residual, call).contiguous(memory_format=torch.channels_last)
        if pool:
            output = _pool_ops.pooled(output, Pool(pool == MAXIMUM, (2, 2), (2, 2), (0, 0)))
    if not moments:
        return output, _channel_ops.vector(output, 0)
    return output, (_channel_ops._moments if output.dtype == torch.float64 else torch.ops.pyops.channel_moments.default)(output)


def _run_cpu(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, residual_last, moments, tf32=False, pool=0
):  # fmt: skip
    call = Conv(tuple(stride), tuple(padding), tuple(dilation), groups, None, activation, slope, residual_last)
    return _on_cpu(input, weight, bias, residual, call, moments, pool)


def _transpose_run_cpu(
    input, weight, bias, residual, stride, padding, output_size, dilation, groups, activation, slope, residual_last, moments, tf32=False
):  # fmt: skip
    least = smallest_transposed(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    rest = tuple(size - low for size, low in zip(output_size, least, strict=True))
    call = Conv(tuple(stride), tuple(padding), tuple(dilation), groups, rest, activation, slope, residual_last)
    return _on_cpu(input, weight, bias, residual, call, moments)


def _wgrad_cpu(grad, input, kernel_size, stride, padding, dilation, groups, tf32=False):
    like = input.new_empty((grad.shape[1], input.shape[1] // groups, *kernel_size))
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad, input, like, None, stride, padding, dilation, False, [0, 0], groups, mask)[
        1
    ].contiguous()


for _name, _function in (("run", _run_cpu), ("transpose_run", _transpose_run_cpu), ("wgrad", _wgrad_cpu)):
    _library.implement(f"conv_{_name}", _function, "CPU")
