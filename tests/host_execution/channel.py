"""The channelwise kernels through ctypes, with the arguments and results of the torch ops they are behind."""

import ctypes

import torch

from pyops.ops._activations import NAMES

from .depthwise import DTYPES, I32, I64, P, nchw, nhwc, pointer, poisoned
from .harness import checked


class Channelwise(ctypes.Structure):  # csrc/conv/channel.h
    _fields_ = [("N", I64), ("P", I64), ("C", I64), ("dtype", I32), ("activation", I32), ("slope", ctypes.c_float)]
    _fields_ += [(name, P) for name in ("input", "grad", "residual", "affine", "keep", "gate", "offset", "terms")]
    _fields_ += [(name, P) for name in ("output", "grad_residual", "sums")]


OPS = ("moments", "apply", "totals", "reduce", "gradient")


class Kernels:
    """moments, apply, sums, reduce, grad, grad_: pyops::channel_*, on CPU tensors with the host build."""

    def __init__(self, library):
        self.library = library

    def call(self, op, input, sums=None, output=None, grad_residual=None, activation=0, slope=0.0, **tensors):
        """Runs one op on images [N, H, W, C] and float vectors. Results are written where the given tensors are."""
        N, H, W, C = input.shape
        p = Channelwise(N, H * W, C, DTYPES[input.dtype], activation, slope, pointer(input))
        held = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
        for name, tensor in {**held, "sums": sums, "output": output, "grad_residual": grad_residual}.items():
            setattr(p, name, pointer(tensor))
        size = ctypes.c_int64()
        checked(self.library.host_channel_workspace, OPS.index(op), ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8)
        checked(self.library.host_channel, OPS.index(op), ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))

    def moments(self, input):
        sums = poisoned(input, 2, input.shape[1], dtype=torch.float32)
        self.call("moments", nhwc(input), sums)
        return sums

    def apply(self, input, affine, keep, residual, gate, offset, activation, slope):
        x = nhwc(input)
        output = poisoned(x, *x.shape)
        vectors = {"affine": affine, "keep": keep, "gate": gate, "offset": offset}
        self.call("apply", x, output=output, residual=nhwc(residual), activation=activation, slope=slope, **vectors)
        return nchw(output)

    def sums(self, input, grad, affine, keep, residual, activation, slope):
        sums = poisoned(input, *input.shape[:2], dtype=torch.float32)
        given = {"grad": nhwc(grad), "residual": nhwc(residual), "affine": affine, "keep": keep}
        self.call("totals", nhwc(input), sums, activation=activation, slope=slope, **given)
        return sums

    def reduce(self, grad, input, affine, keep, residual, gate, offset, activation, slope):
        sums = poisoned(input, 2, input.shape[1], dtype=torch.float32)
        given = {"grad": nhwc(grad), "residual": nhwc(residual), "affine": affine, "keep": keep, "gate": gate, "offset": offset}
        self.call("reduce", nhwc(input), sums, activation=activation, slope=slope, **given)
        return sums

    def grad(self, grad, input, affine, terms, keep, residual, gate, offset, activation, slope, needs_residual, in_place=False):
        """(gradient of input, of residual or None); `in_place`: the first is written over a copy of grad."""
        x, g = nhwc(input), nhwc(grad).clone()
        output = g if in_place else poisoned(x, *x.shape)
        dresidual = poisoned(x, *x.shape) if needs_residual else None
        given = {"residual": nhwc(residual), "affine": affine, "terms": terms, "keep": keep, "gate": gate, "offset": offset}
        call = {**given, "activation": activation, "slope": slope}
        self.call("gradient", x, output=output, grad_residual=dresidual, grad=g, **call)
        return nchw(output), None if dresidual is None else nchw(dresidual)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    silu = NAMES.index("silu")
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for C in (64, 61):  # in vectors, and one by one
            x, affine = torch.zeros(2, C, 24, 24, dtype=dtype), torch.zeros(3, C)
            kernels.moments(x)
            kernels.apply(x, affine, None, None, None, None, silu, 0.0)
            kernels.sums(x, None, affine, None, None, silu, 0.0)
            kernels.reduce(x, x, affine, None, None, None, None, silu, 0.0)
            kernels.grad(x, x, affine, None, None, None, None, None, silu, 0.0, False)
