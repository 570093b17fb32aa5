"""The fused MLP through ctypes, with the arguments and results of the torch ops it is behind.

Works on the host build of csrc/linear with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch
import torch.nn.functional as F

from pyops.ops import _activations

from ..conftest import assert_gate
from .depthwise import DTYPES, I32, I64, P, pointer, poisoned
from .harness import checked

EPS = 1e-6
GELU = _activations.NAMES.index("gelu")


class Sizes(ctypes.Structure):  # csrc/linear/mlp.h
    _fields_ = [(name, I64) for name in "CHO"]


class Weights(ctypes.Structure):
    _fields_ = [("dtype", I32), *((name, P) for name in ("first", "second", "first_bias", "second_bias"))]


class Mlp(ctypes.Structure):
    _fields_ = [("sizes", Sizes), ("M", I64), ("dtype", I32), ("norm", ctypes.c_bool), ("pairs", ctypes.c_bool)]
    _fields_ += [("eps", ctypes.c_float), ("slope", ctypes.c_float), ("activation", I32)]
    _fields_ += [(name, P) for name in ("input", "residual", "packed", "output")]


class Kernels:
    """pack, infer: pyops::mlp_pack and mlp_infer."""

    def __init__(self, library):
        self.library = library

    def pack(self, first, first_bias, second, second_bias):
        sizes = Sizes(first.shape[1], first.shape[0], second.shape[0])
        floats = I64()
        checked(self.library.host_mlp_floats, ctypes.byref(sizes), DTYPES[first.dtype], ctypes.byref(floats))
        packed = poisoned(first, floats.value, dtype=torch.float32)
        weights = Weights(DTYPES[first.dtype], *map(pointer, (first, second, first_bias, second_bias)))
        checked(self.library.host_mlp_pack, ctypes.byref(sizes), ctypes.byref(weights), P(packed.data_ptr()))
        return packed

    def infer(self, x, packed, residual, hidden, outputs, norm, eps, activation, slope):
        output = poisoned(x, x.shape[0], outputs)
        given = map(pointer, (x, residual, packed, output))
        p = Mlp(Sizes(x.shape[1], hidden, outputs), x.shape[0], DTYPES[x.dtype], norm, False, eps, slope, activation, *given)
        checked(self.library.host_mlp, ctypes.byref(p))
        return output

    def run(self, x, weights, residual, norm=True, activation=GELU):
        first, first_bias, second, second_bias = weights
        packed = self.pack(first, first_bias.float(), second, second_bias.float())
        return self.infer(x, packed, residual, first.shape[0], second.shape[0], norm, EPS, activation, 0.1)


# ------------------------------------------------------------------------------------------------------- held to the numerics gate

SHAPES = {  # M, C, H, O: a row, ragged units of each, both widths of the kernel, less of one than of another, many blocks
    "one": (1, 1, 1, 1),
    "ragged": (37, 33, 70, 41),
    "convnext": (100, 96, 384, 96),
    "few_inputs": (49, 24, 50, 192),
    "few_outputs": (20, 192, 45, 8),
    "wide": (150, 192, 96, 192),
    "odd": (33, 131, 64, 101),
    "many_rows": (700, 16, 32, 16),
}


def draw(M, C, H, O, dtype, seed, residual=True, device="cpu"):
    """input, (first, first_bias, second, second_bias), residual"""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = rand(M, C) * 1.5 + 0.3
    weights = rand(H, C) * C**-0.5, rand(H), rand(O, H) * H**-0.5, rand(O)
    x, *weights, added = (t.to(dtype).to(device) for t in (x, *weights, rand(M, O)))
    return x, tuple(weights), added if residual else None


def rounded(t, is_tf32):
    """Floats to tf32's ten bits, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if is_tf32 else t


def layers(x, weights, residual, norm=True, activation=GELU):
    """The layers one by one; float32 with the products of tf32."""
    first, first_bias, second, second_bias = weights
    is_tf32 = x.dtype == torch.float32
    x = F.layer_norm(x, x.shape[1:], None, None, EPS) if norm else x
    h = F.linear(rounded(x, is_tf32), rounded(first, is_tf32), first_bias)
    h = _activations.REFERENCE[_activations.NAMES[activation]](h, 0.1)
    y = F.linear(rounded(h, is_tf32), rounded(second, is_tf32), second_bias)
    return y if residual is None else y + residual


def double(x, weights, residual):
    wide = lambda t: t.cpu().double()  # noqa: E731
    return wide(x), tuple(map(wide, weights)), None if residual is None else wide(residual)


def gate(kernels, shape, dtype, norm=True, activation=GELU, residual=True, device="cpu"):
    def results(seed):
        kernels.library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        given = draw(*shape, dtype, seed, residual, device)
        options = (norm, activation)
        return [kernels.run(*given, *options)], [layers(*double(*given), *options)], [layers(*given, *options)]

    assert_gate(results, dtype)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 2, 163 * 1024)
    for dtype in DTYPES:
        for C in (96, 192):
            kernels.run(*draw(300, C, 48, C, dtype, 0))
