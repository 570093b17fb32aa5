"""The norms over channels through ctypes, with the arguments and results of the torch ops they are behind.

Works on the host build of csrc/norm with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops import _norm_ops as ops

from ..conftest import assert_gate
from .depthwise import DTYPES, I32, I64, P, pointer, poisoned
from .harness import checked

F32 = ctypes.c_float


class LocalResponse(ctypes.Structure):  # csrc/norm/channel_norms.h
    _fields_ = [(name, I64) for name in ("N", "P", "C", "size")] + [(name, I32) for name in ("dtype", "rows", "relu")]
    _fields_ += [(name, F32) for name in ("alpha", "beta", "k")] + [(name, P) for name in ("input", "grad", "output")]


class LayerNorm(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("N", "P", "C")] + [(name, I32) for name in ("dtype", "rows")] + [("eps", F32)]
    _fields_ += [(name, P) for name in ("input", "grad", "weight", "bias", "output", "sums")]


def sizes(input, rows):
    """N, P, C"""
    return (input.shape[0], *(input.shape[1:] if rows else input.shape[:0:-1]))


class Kernels:
    """lrn, lrn_grad, layer_norm, layer_norm_grad: pyops::lrn_run and so on."""

    def __init__(self, library):
        self.library = library

    def call(self, op, gradient, p, like):
        space = None
        if gradient:
            size = ctypes.c_int64()
            checked(getattr(self.library, f"host_{op}_workspace"), ctypes.byref(p), ctypes.byref(size))
            space = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=like.device)
        start = None if space is None else P((space.data_ptr() + 255) // 256 * 256)
        checked(getattr(self.library, f"host_{op}"), int(gradient), ctypes.byref(p), start)

    def _local_response(self, grad, input, rows, size, alpha, beta, k, relu):
        output = poisoned(input, *input.shape)
        options = (size, DTYPES[input.dtype], rows, relu, alpha, beta, k)
        p = LocalResponse(*sizes(input, rows), *options, *map(pointer, (input, grad, output)))
        self.call("lrn", grad is not None, p, input)
        return output

    def lrn(self, input, *options):
        return self._local_response(None, input, *options)

    def lrn_grad(self, grad, input, *options):
        return self._local_response(grad, input, *options)

    def layer_norm(self, input, rows, weight, bias, eps):
        output = poisoned(input, *input.shape)
        p = LayerNorm(*sizes(input, rows), DTYPES[input.dtype], rows, eps, *map(pointer, (input, None, weight, bias, output, None)))
        self.call("layer_norm", False, p, input)
        return output

    def layer_norm_grad(self, grad, input, rows, weight, eps, needs_input):
        output = poisoned(input, *input.shape) if needs_input else None
        sums = poisoned(input, 2, sizes(input, rows)[2], dtype=torch.float32)
        p = LayerNorm(*sizes(input, rows), DTYPES[input.dtype], rows, eps, *map(pointer, (input, grad, weight, None, output, sums)))
        self.call("layer_norm", True, p, input)
        return input.new_empty(0) if output is None else output, sums


# ------------------------------------------------------------------------------------------------------- held to the numerics gate

LAYOUTS = {"rows": True, "planes": False}
SHAPES = {  # N, P, C: vectors and single channels, one position, more channels than a block or a group of lanes has, one channel
    "vectors": (3, 35, 16),
    "odd": (2, 99, 13),
    "one_position": (5, 1, 24),
    "wide": (2, 9, 2200),
    "less_wide": (1, 5, 1160),
    "wide_and_odd": (1, 3, 517),
    "one_channel": (1, 221, 1),
    "few_channels": (2, 16, 6),
    "groups_of_lanes": (1, 70, 96),
}


def draw(shape, rows, dtype, seed, offset=0.0, device="cpu"):
    """input, grad, weight, bias"""
    generator = torch.Generator().manual_seed(seed)
    N, P, C = shape
    images = [torch.randn(*((N, P, C) if rows else (N, C, P)), generator=generator) for _ in range(2)]
    vectors = [torch.randn(C, generator=generator) for _ in range(2)]
    drawn = [(image + shift).to(dtype) for image, shift in zip(images, (offset, 0.0), strict=True)] + vectors
    return [t.to(device) for t in drawn]


def lrn_results(run, gradient, x, g, rows, options):
    return [run(x, rows, *options), gradient(g, x, rows, *options)]


def layer_norm_results(run, gradient, x, g, weight, bias, rows, eps=1e-6):
    return [run(x, rows, weight, bias, eps), *gradient(g, x, rows, weight, eps, True)]


def wide(*tensors):
    return [None if t is None else t.cpu().double() for t in tensors]


def lrn_gate(kernels, shape, rows, dtype, options, device="cpu"):
    def results(seed):
        kernels.library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        x, g, *_ = draw(shape, rows, dtype, seed, device=device)
        ours = lrn_results(kernels.lrn, kernels.lrn_grad, x, g, rows, options)
        truth, eager = (lrn_results(ops._lrn, ops._lrn_grad, a, b, rows, options) for a, b in (wide(x, g), (x, g)))
        return list(zip(ours, truth, eager, strict=True))

    for index, is_gradient in enumerate((False, True)):
        assert_gate(lambda seed, index=index: [[part] for part in results(seed)[index]], dtype, gradient=is_gradient)


def layer_norm_gate(kernels, shape, rows, dtype, affine=True, device="cpu"):
    def results(seed):
        kernels.library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        x, g, *vectors = draw(shape, rows, dtype, seed, 0.5, device)
        given = vectors if affine else [None, None]
        ours = layer_norm_results(kernels.layer_norm, kernels.layer_norm_grad, x, g, *given, rows)
        truth, eager = (layer_norm_results(ops._layer_norm, ops._layer_norm_grad, *t, rows) for t in (wide(x, g, *given), (x, g, *given)))
        return list(zip(ours, truth, eager, strict=True))

    assert_gate(lambda seed: [[part] for part in results(seed)[0]], dtype)
    assert_gate(lambda seed: list(zip(*results(seed)[1:], strict=True)), dtype, gradient=True)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for rows in (True, False):
            for C in (64, 61):  # in vectors, and one by one
                x = torch.ones(2, 600, C, dtype=dtype) if rows else torch.ones(2, C, 600, dtype=dtype)
                for size in (5, 4):
                    kernels.lrn(x, rows, size, 1e-4, 0.75, 1.0, False)
                    kernels.lrn_grad(x, x, rows, size, 1e-4, 0.75, 1.0, False)
                kernels.layer_norm(x, rows, None, None, 1e-6)
                kernels.layer_norm_grad(x, x, rows, None, 1e-6, True)
        vector = 16 // dtype.itemsize
        for C in (32 * 4 * vector + vector, 32 * 8 * vector + vector, 32 * 4 + 1, 32 * 8 + 1):  # more than lanes hold of few, of any
            x = torch.ones(1, 2, C, dtype=dtype)
            kernels.layer_norm(x, True, None, None, 1e-6)
            kernels.layer_norm_grad(x, x, True, None, 1e-6, True)
