"""The kernels of the fused expansion and depthwise convolution through ctypes, with the arguments and results of the torch op."""

import ctypes

import torch

from .depthwise import DTYPES, I32, I64, P, nchw, nhwc, pointer, poisoned
from .harness import checked
from .pointwise import slice_of


class ExpandDepthwise(ctypes.Structure):  # csrc/conv/expand_depthwise.h
    _fields_ = [(name, I64) for name in ("N", "H", "W", "C", "E", "OH", "OW", "input_stride")]
    _fields_ += [(name, I32) for name in ("K", "stride", "dtype", "expand_weight_dtype", "depthwise_weight_dtype", "activation")]
    _fields_ += [("slope", ctypes.c_float)]
    _fields_ += [(name, P) for name in ("input", "expand_weight", "depthwise_weight", "expand_bias", "depthwise_bias", "output", "means")]


class Tile(ctypes.Structure):
    _fields_ = [("height", ctypes.c_int), ("width", ctypes.c_int), ("recompute", ctypes.c_double)]


class Kernels:
    """run: pyops::expand_depthwise on CPU tensors with the host build."""

    def __init__(self, library):
        self.library = library

    def run(self, input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, activation, slope, means, around=(0, 0)):
        N, C, H, W = input.shape
        E, K = expand_weight.shape[0], depthwise_weight.shape[2]
        x = slice_of(nhwc(input), *around)
        output = poisoned(x, N, (H - 1) // stride + 1, (W - 1) // stride + 1, E)
        mean = poisoned(x, N, E, dtype=torch.float32) if means else None
        dtypes = (DTYPES[t.dtype] for t in (input, expand_weight, depthwise_weight))
        p = ExpandDepthwise(N, H, W, C, E, *output.shape[1:3], C + sum(around), K, stride, *dtypes, activation, slope)
        given = (x, expand_weight.contiguous(), depthwise_weight.contiguous(), expand_bias, depthwise_bias, output, mean)
        for (name, _), tensor in zip(ExpandDepthwise._fields_[-7:], given, strict=True):
            setattr(p, name, pointer(tensor))
        size = ctypes.c_int64()
        checked(self.library.host_expand_depthwise_workspace, ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8)
        checked(self.library.host_expand_depthwise, ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))
        return nchw(output), mean

    def tile(self, N, C, E, H, W, K, stride, dtype):
        """(height, width, by how much halos multiply the expansion) of the tile that the launcher takes."""
        kind, tile = DTYPES[dtype], Tile()
        p = ExpandDepthwise(N, H, W, C, E, (H - 1) // stride + 1, (W - 1) // stride + 1, C, K, stride, kind, kind, kind)
        checked(self.library.host_expand_depthwise_tile, ctypes.byref(p), ctypes.byref(tile))
        return tile.height, tile.width, tile.recompute


def every_kernel(library):
    """Launches each instance of the kernel, with a tile as large as shared memory allows it."""
    kernels = Kernels(library)
    library.host_machine(1, 1, 163 * 1024)
    for dtype in DTYPES:
        for K in (3, 5, 7):
            for stride in (1, 2):
                x, expand, depthwise = (torch.zeros(s, dtype=dtype) for s in ((1, 8, 40, 40), (8, 8), (8, 1, K, K)))
                kernels.run(x, expand, None, depthwise, None, stride, 0, 0.0, True)
