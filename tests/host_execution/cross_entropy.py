"""Cross entropy's kernel through ctypes, with the arguments and results of the torch op it is behind.

Works on the host build of csrc/linear with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from .depthwise import DTYPES, I32, I64, P, pointer, poisoned
from .harness import checked


class CrossEntropy(ctypes.Structure):  # csrc/linear/cross_entropy.h
    _fields_ = [(name, I64) for name in ("M", "V", "ignore_index")]
    _fields_ += [("dtype", I32), ("smoothing", ctypes.c_float), ("softcap", ctypes.c_float)]
    _fields_ += [(name, P) for name in ("logits", "target", "scale", "losses")]


class Kernels:
    """rows: pyops::cross_entropy_rows_."""

    def __init__(self, library):
        self.library = library

    def rows(self, logits, target, scale, ignore_index, smoothing, softcap):
        losses = poisoned(logits, logits.shape[0], dtype=torch.float32)
        tensors = map(pointer, (logits, target, scale, losses))
        p = CrossEntropy(*logits.shape, ignore_index, DTYPES[logits.dtype], smoothing, softcap, *tensors)
        checked(self.library.host_cross_entropy, ctypes.byref(p))
        return losses


def every_kernel(library):
    """Launches each instance of each kernel, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 108, 163 * 1024)
    for dtype in DTYPES:
        for V in (64, 61):  # in vectors, and one by one
            kernels.rows(torch.ones(2, V, dtype=dtype), torch.tensor([3, 60]), torch.ones(2), -100, 0.0, 0.0)
