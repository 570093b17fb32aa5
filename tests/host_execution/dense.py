"""The dense convolution's kernels through ctypes, with the arguments and results of the torch ops they are behind."""

import ctypes

import torch

from pyops.ops._depthwise_ops import output_size

from .depthwise import DTYPES, I32, I64, P, nhwc, pointer, poisoned
from .harness import checked
from .pointwise import slice_of

# --------------------------------------------------------------------------------------------- csrc/conv/dense.h, for ctypes

AUTO, TILE, HALO = -1, 0, 1  # dense_cuda.h's DensePath


class Shape(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("N", "H", "W", "C", "OH", "OW", "O")]
    _fields_ += [(f"{name}_{axis}", I32) for name in ("K", "stride", "pad", "dilation") for axis in "hw"]
    _fields_ += [("groups", I32)]


class Dense(ctypes.Structure):
    _fields_ = [("s", Shape), ("dtype", I32), ("activation", I32), ("slope", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_bool) for name in ("transposed", "residual_last", "tf32")]
    _fields_ += [("pool", I32)]
    _fields_ += [("input_stride", I64), ("residual_stride", I64), ("weight_strides", I64 * 4)]
    _fields_ += [(name, P) for name in ("input", "weight", "residual", "bias", "output", "moments")]


class Gradient(ctypes.Structure):
    _fields_ = [("s", Shape), ("dtype", I32), ("tf32", ctypes.c_bool), ("grad_stride", I64), ("input_stride", I64)]
    _fields_ += [(name, P) for name in ("grad", "input", "grad_weight")]


def shape_of(input, O, size, kernel, stride, padding, dilation, groups):
    N, C, H, W = input.shape
    return Shape(N, H, W, C, *size, O, *kernel, *stride, *padding, *dilation, groups)


class Kernels:
    """run, transpose_run, wgrad: pyops::conv_run, conv_transpose_run and conv_wgrad on CPU tensors with the host build.

    `around` makes inputs, residuals and gradients slices of wider buffers.
    """

    def __init__(self, library):
        self.library = library

    def call(self, operation, p, *path):
        size = ctypes.c_int64()
        checked(getattr(self.library, f"host_{operation}_workspace"), ctypes.byref(p), *path, ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8)
        checked(getattr(self.library, f"host_{operation}"), ctypes.byref(p), *path, P((space.data_ptr() + 255) // 256 * 256))

    def convolve(
        self, transposed, shape, input, weight, bias, residual, activation, slope, residual_last, moments, tf32, around, pool=0, path=AUTO
    ):  # fmt: skip
        x, skip = (None if t is None else slice_of(nhwc(t), *around) for t in (input, residual))
        output = poisoned(input, shape.N, shape.OH >> (pool > 0), shape.OW >> (pool > 0), shape.O)
        sums = poisoned(input, 2, shape.O, dtype=torch.float32) if moments else None
        p = Dense(shape, DTYPES[input.dtype], activation, slope, transposed, residual_last, tf32, pool)
        p.input_stride, p.residual_stride = shape.C + sum(around), shape.O + sum(around)
        p.weight_strides = (I64 * 4)(*weight.stride())
        for name, tensor in zip(
            ("input", "weight", "residual", "bias", "output", "moments"), (x, weight, skip, bias, output, sums), strict=True
        ):
            setattr(p, name, pointer(tensor))
        self.call("dense", p, path)
        return output.permute(0, 3, 1, 2), sums

    def run(
        self, input, weight, bias, residual, stride, padding, dilation, groups, activation, slope, residual_last, moments,
        tf32=False, pool=0, around=(0, 0), path=AUTO,
    ):  # fmt: skip
        kernel = weight.shape[2:]
        size = output_size(input.shape[2:], kernel, stride, padding, dilation)
        shape = shape_of(input, weight.shape[0], size, kernel, stride, padding, dilation, groups)
        epilogue = (activation, slope, residual_last, moments, tf32, around, pool, path)
        return self.convolve(False, shape, input, weight, bias, residual, *epilogue)

    def transpose_run(
        self, input, weight, bias, residual, stride, padding, output_size, dilation, groups, activation, slope, residual_last, moments,
        tf32=False, around=(0, 0),
    ):  # fmt: skip
        shape = shape_of(input, weight.shape[1] * groups, output_size, weight.shape[2:], stride, padding, dilation, groups)
        return self.convolve(True, shape, input, weight, bias, residual, activation, slope, residual_last, moments, tf32, around)

    def wgrad(self, grad, input, kernel_size, stride, padding, dilation, groups, tf32=False, around=(0, 0)):
        shape = shape_of(input, grad.shape[1], grad.shape[2:], kernel_size, stride, padding, dilation, groups)
        g, x = (slice_of(nhwc(t), *around) for t in (grad, input))
        weight = poisoned(input, grad.shape[1], input.shape[1] // groups, *kernel_size)
        p = Gradient(shape, DTYPES[input.dtype], tf32, grad.shape[1] + sum(around), input.shape[1] + sum(around))
        p.grad, p.input, p.grad_weight = map(pointer, (g, x, weight))
        self.call("dense_wgrad", p)
        return weight


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on machines of two sizes."""
    kernels = Kernels(library)
    for sms in (1, 108):  # large tiles, small ones
        library.host_machine(1, sms, 163 * 1024)
        for dtype in DTYPES:
            for C in (64, 3) if sms == 1 else ():
                x, weight = torch.zeros(1, C, 12, 12, dtype=dtype), torch.zeros(8, C, 3, 3, dtype=dtype)
                kernels.run(x, weight, None, None, (1, 1), (1, 1), (1, 1), 1, 0, 0.0, False, False, True, path=HALO)
            for C in (8, 3):  # whole pieces, and element by element
                for tf32 in {False, dtype == torch.float32}:
                    x, weight = torch.zeros(1, C, 12, 12, dtype=dtype), torch.zeros(8, C, 2, 2, dtype=dtype)
                    kernels.run(x, weight, None, None, (1, 1), (0, 0), (1, 1), 1, 0, 0.0, False, True, tf32)
                    if sms == 1:
                        kernels.wgrad(torch.zeros(1, 8, 11, 11, dtype=dtype), x, (2, 2), (1, 1), (0, 0), (1, 1), 1, tf32)
