"""The activations that the convolutions' kernels fuse, and their derivatives, on tiles of any shape.

Numbers are those of csrc/conv/depthwise.h's Activation; everything is fp32. Elementwise and in registers: no layout, no tiling, and
no bytes of their own; at most one exponential an element.
"""

import triton
import triton.language as tl

from .common import tanh


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, slope):
    if ACTIVATION == 1:  # relu, as csrc/conv/depthwise.h counts them; NaN stays NaN
        return tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == 2:  # relu6
        return clamp06(z)
    elif ACTIVATION == 3:  # silu
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == 4:  # hardswish
        return z * clamp06(z + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == 5:  # gelu
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == 6:  # sigmoid
        return 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == 7:  # leaky_relu
        return tl.where(z > 0.0, z, z * slope)
    elif ACTIVATION == 8:  # tanh
        return tanh(z)
    elif ACTIVATION == 9:  # hardsigmoid
        return clamp06(z + 3.0) * (1.0 / 6.0)
    else:
        return z


@triton.jit
def differentiate(z, ACTIVATION: tl.constexpr, slope):
    """activation'(z), with torch's choices at the kinks."""
    one = tl.zeros_like(z) + 1.0
    if ACTIVATION == 1:
        return tl.where(z <= 0.0, 0.0, one)
    elif ACTIVATION == 2:
        return tl.where((z <= 0.0) | (z >= 6.0), 0.0, one)
    elif ACTIVATION == 3:
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == 4:
        return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, z * (1.0 / 3.0) + 0.5, one))
    elif ACTIVATION == 5:
        return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == 6:
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 - s)
    elif ACTIVATION == 7:
        return tl.where(z > 0.0, one, slope)
    elif ACTIVATION == 8:
        t = tanh(z)
        return 1.0 - t * t
    elif ACTIVATION == 9:
        return tl.where((z > -3.0) & (z < 3.0), one * (1.0 / 6.0), 0.0)
    else:
        return one


@triton.jit
def clamp06(z):
    return tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
