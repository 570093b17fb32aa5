"""The 1x1 convolution's kernels through ctypes, with the arguments and results of the torch ops they are behind."""

import ctypes

import torch

from .depthwise import DTYPES, I32, I64, P, nhwc, pointer, poisoned
from .harness import checked


class Pointwise(ctypes.Structure):  # csrc/conv/pointwise.h
    _fields_ = [(name, I64) for name in ("N", "P", "C", "O", "input_stride", "residual_stride", "output_stride")]
    _fields_ += [(name, I32) for name in ("dtype", "weight_dtype", "input_activation", "activation")]
    _fields_ += [("input_slope", ctypes.c_float), ("slope", ctypes.c_float), ("tf32", ctypes.c_bool)]
    _fields_ += [(name, P) for name in ("input", "weight", "residual", "rows", "affine", "gate", "bias", "keep", "output", "moments")]


def slice_of(image, before, after):
    """A dense [N, H, W, C] as a slice of a wider buffer, poison on both sides of each position."""
    wide = poisoned(image, *image.shape[:3], before + image.shape[3] + after)
    wide[..., before : before + image.shape[3]] = image
    return wide[..., before : before + image.shape[3]]


class Kernels:
    """run: pyops::pointwise_run on CPU tensors with the host build, and pointwise_into where `around` widens its images."""

    def __init__(self, library):
        self.library = library

    def run(
        self, input, weight, rows, affine, gate, input_activation, input_slope, bias, keep, residual, activation, slope, moments,
        tf32=False, around=(0, 0),
    ):  # fmt: skip
        N, C, H, W = input.shape
        O = weight.shape[0]
        x, skip = (None if t is None else slice_of(nhwc(t), *around) for t in (input, residual))
        output = slice_of(poisoned(input, N, H, W, O), *around)
        vectors = [None if t is None else t.contiguous() for t in (rows, affine, gate, bias, keep)]
        weight = weight.contiguous()
        sums = poisoned(input, 2, O, dtype=torch.float32) if moments else None
        wide = sum(around)
        p = Pointwise(N, H * W, C, O, C + wide, O + wide, O + wide, DTYPES[input.dtype], DTYPES[weight.dtype], input_activation, activation)
        p.input_slope, p.slope, p.tf32 = input_slope, slope, tf32
        given = (x, weight, skip, *vectors, output, sums)
        for (name, _), tensor in zip(Pointwise._fields_[-10:], given, strict=True):
            setattr(p, name, pointer(tensor))
        size = ctypes.c_int64()
        checked(self.library.host_pointwise_workspace, ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8)
        checked(self.library.host_pointwise, ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))
        if wide and output.numel():
            buffer = output.as_strided((N, H, W, O + wide), output.stride(), output.storage_offset() - around[0])
            assert buffer[..., : around[0]].isnan().all() and buffer[..., around[0] + O :].isnan().all(), "wrote beside its slice"
        return output.permute(0, 3, 1, 2), sums


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on machines of two sizes."""
    kernels = Kernels(library)
    nothing = (None, None, None, 0, 0.0, None, None, None, 0, 0.0)
    for sms in (1, 108):  # large tiles, small ones
        library.host_machine(1, sms, 163 * 1024)
        for dtype in DTYPES:
            for C in (16, 13):  # a weight as it is, and packed
                x = torch.zeros(1, C, 12, 12, dtype=dtype)
                for weight_dtype in {dtype, torch.float32}:
                    kernels.run(x, torch.zeros(8, C, dtype=weight_dtype), *nothing, True, dtype == torch.float32 and C == 16)
