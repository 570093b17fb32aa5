"""The depthwise convolution's kernels through ctypes, with the arguments and results of the torch ops they are behind.

Works on the host build of csrc/conv with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops._activations import NAMES
from pyops.ops._depthwise_ops import output_size

from .harness import checked

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# ---------------------------------------------------------------------------------------- csrc/conv/depthwise.h, for ctypes

P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Shape(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("N", "H", "W", "C", "OH", "OW")]
    _fields_ += [(f"{name}_{axis}", I32) for name in ("K", "stride", "pad", "dilation") for axis in "hw"]


HEAD = [("s", Shape), ("dtype", I32), ("weight_dtype", I32), ("activation", I32), ("slope", ctypes.c_float)]


class Forward(ctypes.Structure):
    _fields_ = [*HEAD, *((name, P) for name in ("input", "weight", "bias", "residual", "output", "means"))]


class Backward(ctypes.Structure):
    _fields_ = [*HEAD, *((name, P) for name in ("grad_output", "grad_means", "input", "weight", "bias", "residual"))]
    _fields_ += [(name, P) for name in ("grad_input", "grad_weight", "grad_bias", "grad_residual")]


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def nhwc(image):
    """[N, C, H, W] as a dense [N, H, W, C]."""
    return None if image is None else image.detach().permute(0, 2, 3, 1).contiguous()


def nchw(image):
    return image.permute(0, 3, 1, 2)


def poisoned(like, *shape, dtype=None):
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


class Kernels:
    """forward and backward: the arguments of pyops::depthwise_fwd and depthwise_bwd, and their results."""

    def __init__(self, library):
        self.library = library

    def workspace(self, forward, backward, device):
        size = ctypes.c_int64()
        parts = (None if p is None else ctypes.byref(p) for p in (forward, backward))
        checked(self.library.host_depthwise_workspace, *parts, ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=device)
        return space, P((space.data_ptr() + 255) // 256 * 256)

    def head(self, input, weight, stride, padding, dilation, activation, slope):
        N, C, H, W = input.shape
        kernel = weight.shape[2:]
        options = (v for pair in (kernel, stride, padding, dilation) for v in pair)
        shape = Shape(N, H, W, C, *output_size((H, W), kernel, stride, padding, dilation), *options)
        return shape, (shape, DTYPES[input.dtype], DTYPES[weight.dtype], activation, slope)

    def forward(self, input, weight, bias, residual, stride, padding, dilation, activation, slope, means):
        shape, head = self.head(input, weight, stride, padding, dilation, activation, slope)
        x, residual, weight = nhwc(input), nhwc(residual), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        output = poisoned(x, shape.N, shape.OH, shape.OW, shape.C)
        mean = poisoned(x, shape.N, shape.C, dtype=torch.float32) if means else None
        p = Forward(*head, *map(pointer, (x, weight, bias, residual, output, mean)))
        space, start = self.workspace(p, None, x.device)
        checked(self.library.host_depthwise_forward, ctypes.byref(p), start)
        del space
        return nchw(output), mean

    def backward(
        self, grad_output, grad_means, input, weight, bias, residual, stride, padding, dilation, activation, slope,
        needs_input, needs_weight,
    ):  # fmt: skip
        _, head = self.head(input, weight, stride, padding, dilation, activation, slope)
        x, grad_output, residual, weight = nhwc(input), nhwc(grad_output), nhwc(residual), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        grad_input = poisoned(x, *x.shape) if needs_input else None
        grad_weight = poisoned(x, *weight.shape, dtype=torch.float32) if needs_weight else None
        grad_bias = poisoned(x, *bias.shape, dtype=torch.float32) if needs_weight and bias is not None else None
        grad_residual = None if residual is None else poisoned(x, *residual.shape)
        given = (grad_output, grad_means, x, weight, bias, residual, grad_input, grad_weight, grad_bias, grad_residual)
        p = Backward(*head, *map(pointer, given))
        space, start = self.workspace(None, p, x.device)
        checked(self.library.host_depthwise_backward, ctypes.byref(p), start)
        del space
        images = [None if image is None else nchw(image) for image in (grad_input, grad_residual)]
        sums = [None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return images[0], *sums, images[1]


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    silu, none = NAMES.index("silu"), NAMES.index("none")
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for C in (64, 61):  # a block's channels in vectors, and one by one
            for K in (3, 5, 7, 6):
                for stride in (1, 2) if C == 64 and K % 2 else (1,):
                    x, weight = torch.zeros(1, C, 9, 33, dtype=dtype), torch.zeros(C, 1, K, K, dtype=dtype)
                    geometry = ([stride] * 2, [K // 2] * 2, [1, 1])
                    y, _ = kernels.forward(x, weight, None, None, *geometry, silu, 0.0, True)
                    for activation in (silu, none):
                        kernels.backward(y, None, x, weight, None, None, *geometry, activation, 0.0, True, True)
