"""The pooling kernels through ctypes, with the arguments and results of the torch ops they are behind."""

import ctypes

import torch

from pyops.ops._activations import NAMES
from pyops.ops._pool_ops import output_size

from .depthwise import DTYPES, I32, I64, P, nchw, nhwc, pointer, poisoned
from .harness import checked


class Pooling(ctypes.Structure):  # csrc/conv/pool.h
    _fields_ = [(name, I64) for name in ("N", "C", "H", "W", "OH", "OW")]
    _fields_ += [(name, I32 * 2) for name in ("kernel", "stride", "padding")]
    _fields_ += [("maximum", ctypes.c_bool), ("dtype", I32), ("activation", I32), ("slope", ctypes.c_float)]
    _fields_ += [(name, P) for name in ("input", "grad", "index", "index_out", "affine", "terms", "output", "sums")]


OPS = ("run", "reduce", "gradient")


class Kernels:
    """run, reduce, grad: pyops::pool_*, on CPU tensors with the host build."""

    def __init__(self, library):
        self.library = library

    def call(self, op, input, window, maximum, **tensors):
        """Runs one op on an image [N, H, W, C]; window: kernel, stride, padding, activation, slope. Results are written where the given
        tensors are."""
        N, H, W, C = input.shape
        *places, activation, slope = window
        size = output_size((H, W), *places)
        p = Pooling(N, C, H, W, *size, *((I32 * 2)(*place) for place in places), maximum, DTYPES[input.dtype], activation, slope)
        for name, tensor in {"input": input, **tensors}.items():
            setattr(p, name, pointer(tensor))
        bytes = ctypes.c_int64()
        checked(self.library.host_pool_workspace, OPS.index(op), ctypes.byref(p), ctypes.byref(bytes))
        space = torch.full((bytes.value + 256,), 255, dtype=torch.uint8)
        checked(self.library.host_pool, OPS.index(op), ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))

    def run(self, input, affine, maximum, kernel_size, stride, padding, activation, slope, indices):
        size = (input.shape[0], *output_size(input.shape[2:], kernel_size, stride, padding), input.shape[1])
        output, index = poisoned(input, *size), torch.full(size if maximum and indices else (0,), 255, dtype=torch.uint8)
        window = (kernel_size, stride, padding, activation, slope)
        self.call("run", nhwc(input), window, maximum, affine=affine, output=output, index_out=index if index.numel() else None)
        return nchw(output), nchw(index) if index.numel() else index

    def reduce(self, grad, input, affine, index, *window):
        sums = poisoned(input, 2, input.shape[1], dtype=torch.float32)
        x, g, i = map(nhwc, (input, grad, index))
        self.call("reduce", x, window, i is not None, grad=g, index=i, affine=affine, sums=sums)
        return sums

    def grad(self, grad, input, affine, terms, index, *window):
        x, g, i = map(nhwc, (input, grad, index))
        output = poisoned(x, *x.shape)
        self.call("gradient", x, window, i is not None, grad=g, index=i, affine=affine, terms=terms, output=output)
        return nchw(output)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for C in (64, 61):  # in vectors, and one by one
            x, affine = torch.zeros(2, C, 24, 24, dtype=dtype), torch.zeros(3, C)
            for side in (2, 3):
                window = ((side, side), (2, 2), (0, 0), NAMES.index("relu"), 0.0)
                y, index = kernels.run(x, affine, True, *window, True)
                kernels.reduce(y, x, affine, index, *window)
                kernels.grad(y, x, affine, None, index, *window)
