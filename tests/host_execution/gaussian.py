"""Sampling from normal distributions through ctypes, with the arguments and results of the torch ops they are behind.

Works on the host build of csrc/sampling with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops import _sampling_ops as ops

from ..conftest import assert_gate
from .depthwise import DTYPES, I32, I64, P, pointer, poisoned
from .harness import checked


class Gaussian(ctypes.Structure):  # csrc/sampling/gaussian.h
    _fields_ = [(name, I64) for name in ("N", "D", "mean_row", "log_var_row", "grad_row")] + [("dtype", I32)]
    _fields_ += [(name, P) for name in ("seed", "mean", "log_var", "z", "kl", "grad", "grad_kl", "grad_mean", "grad_log_var")]


class Kernels:
    """run, grad: pyops::gaussian_run and pyops::gaussian_grad, of rows with neighbouring columns."""

    def __init__(self, library):
        self.library = library

    def _block(self, mean, log_var, seed, grad=None):
        apart = [0 if t is None else t.stride(0) for t in (mean, log_var, grad)]
        return Gaussian(*mean.shape, *apart, DTYPES[mean.dtype], *map(pointer, (seed, mean, log_var)))

    def run(self, mean, log_var, seed):
        z, kl = poisoned(mean, *mean.shape), poisoned(mean, mean.shape[0], dtype=torch.float32)
        p, size = self._block(mean, log_var, seed), ctypes.c_int64()
        p.z, p.kl = pointer(z), pointer(kl)
        checked(self.library.host_gaussian_workspace, ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=mean.device)
        checked(self.library.host_gaussian, 0, ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))
        return z, kl

    def grad(self, mean, log_var, seed, grad, grad_kl):
        found = poisoned(mean, *mean.shape), poisoned(mean, *mean.shape)
        p = self._block(mean, log_var, seed, grad)
        p.grad, p.grad_kl, p.grad_mean, p.grad_log_var = map(pointer, (grad, grad_kl, *found))
        checked(self.library.host_gaussian, 1, ctypes.byref(p), None)
        return found


SHAPES = {  # N, D: pieces of four, single columns, fewer than a piece, rows of several segments, more rows than a block has warps
    "pieces": (3, 128),
    "odd": (2, 37),
    "few": (5, 3),
    "one": (2, 1),
    "segments": (2, 4100),
    "odd_segments": (1, 2051),
    "many_rows": (19, 8),
}


def draw(shape, dtype, seed, device="cpu"):
    """mean, log_var, the seed of eps, grad, grad_kl"""
    generator = torch.Generator().manual_seed(seed)
    mean, log_var, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    grad_kl = torch.randn(shape[0], generator=generator).to(device)
    return mean, 2 * log_var, torch.tensor([2**40 * seed + 5], device=device), grad, grad_kl


def results(run, gradient, mean, log_var, seed, grad, grad_kl):
    """Results, then gradients."""
    return [*run(mean, log_var, seed)], [*gradient(mean, log_var, seed, grad, grad_kl)]


def wide(call):
    return [t.cpu().double() if t is not None and t.is_floating_point() else t if t is None else t.cpu() for t in call]


def gate(kernels, shape, dtype, change=lambda call: call, device="cpu"):
    def each(seed):
        kernels.library.host_machine(seed, 1 + seed % 3, 163 * 1024)
        call = change(draw(shape, dtype, seed, device))
        truth, eager = (results(ops._run, ops._grad, *given) for given in (wide(call), call))
        return list(zip(results(kernels.run, kernels.grad, *call), truth, eager, strict=True))

    for index, is_gradient in enumerate((False, True)):
        assert_gate(lambda seed, index=index: each(seed)[index], dtype, gradient=is_gradient)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for D in (4100, 37):  # in pieces of four and several segments, and column by column
            results(kernels.run, kernels.grad, *draw((2, D), dtype, 0))
