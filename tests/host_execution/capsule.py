"""Routing between capsules through ctypes, with the arguments and results of the torch ops it is behind.

Works on the host build of csrc/capsule with CPU tensors and on a CUDA build of the same source with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops import _capsule_ops as ops

from ..conftest import assert_gate
from .depthwise import DTYPES, I32, I64, P, pointer, poisoned
from .harness import checked


class Routing(ctypes.Structure):  # csrc/capsule/routing.h
    _fields_ = [(name, I64) for name in ("N", "I", "J", "D", "T")] + [(name, I32) for name in ("dtype", "by_input", "stop_gradient")]
    _fields_ += [(name, P) for name in ("input", "grad", "sums", "output")]


class Kernels:
    """run, grad: pyops::capsule_run and capsule_grad."""

    def __init__(self, library):
        self.library = library

    def call(self, gradient, p, like):
        size = ctypes.c_int64()
        checked(self.library.host_capsule_workspace, int(gradient), ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=like.device)
        checked(self.library.host_capsule, int(gradient), ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))

    def block(self, u, by_input, T, stop_gradient, *pointers):
        first, second, J, D = u.shape
        N, inputs = (second, first) if by_input else (first, second)
        return Routing(N, inputs, J, D, T, DTYPES[u.dtype], by_input, stop_gradient, *map(pointer, (u, *pointers)))

    def run(self, u, by_input, T):
        N, capsule = u.shape[1 if by_input else 0], u.shape[2:]
        output, sums = poisoned(u, N, *capsule), poisoned(u, N, T, *capsule, dtype=torch.float32)
        self.call(False, self.block(u, by_input, T, False, None, sums, output), u)
        return output, sums

    def grad(self, grad, u, by_input, sums, stop_gradient):
        output = poisoned(u, *u.shape)
        self.call(True, self.block(u, by_input, sums.shape[1], stop_gradient, grad, sums, output), u)
        return output


# ------------------------------------------------------------------------------------------------------- held to the numerics gate

SHAPES = {  # N, I, J, D, T: vectors and single elements, few and many elements, a tile of one input, runs that end early, one of each
    "vectors": (2, 61, 10, 16, 3),
    "odd": (3, 37, 5, 7, 3),
    "wide": (1, 29, 6, 32, 2),
    "odd_and_wide": (1, 29, 6, 27, 4),
    "many_outputs": (1, 5, 200, 8, 2),
    "one_iteration": (2, 33, 4, 8, 1),
    "one_input": (2, 1, 4, 8, 3),
    "one_output": (1, 300, 1, 8, 3),
    "one_element": (1, 40, 7, 1, 3),
}


def draw(shape, by_input, dtype, seed, device="cpu"):
    """predictions that agree about some outputs, grad"""
    N, inputs, J, D, _ = shape
    generator = torch.Generator().manual_seed(seed)
    noise, agreed, grad = (torch.randn(*size, generator=generator) for size in ((N, inputs, J, D), (N, 1, J, D), (N, J, D)))
    u = (0.3 * noise + agreed) * (1.5 * J / (inputs * D**0.5))
    return [t.to(device, dtype) for t in (u.transpose(0, 1).contiguous() if by_input else u, grad)]


def results(run, gradient, u, g, by_input, T, stop_gradient=False):
    """v, the sums and the gradient, each from what was computed before."""
    v, sums = run(u, by_input, T)
    return [v, sums, gradient(g, u, by_input, sums, stop_gradient)]


def gate(kernels, shape, by_input, dtype, stop_gradient=False, device="cpu"):
    def found(seed):
        kernels.library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        u, g = draw(shape, by_input, dtype, seed, device)
        ours = results(kernels.run, kernels.grad, u, g, by_input, shape[4], stop_gradient)
        wide = [t.cpu().double() for t in (u, g)]
        truth, eager = (results(ops._run, ops._grad, *t, by_input, shape[4], stop_gradient) for t in (wide, (u, g)))
        return list(zip(ours, truth, eager, strict=True))

    assert_gate(lambda seed: [[part] for part in found(seed)[0]], dtype)
    assert_gate(lambda seed: [[part] for part in found(seed)[2]], dtype, gradient=True)


def every_kernel(library):
    """Launches each instance of each kernel, with its most shared memory, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for J, D in ((10, 16), (248, 32)):
            u = torch.ones(1, 3, J, D, dtype=dtype)
            results(kernels.run, kernels.grad, u, torch.ones(1, J, D, dtype=dtype), False, 2)
