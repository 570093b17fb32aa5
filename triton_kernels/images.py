"""What the kernels on images share. An image is [N, C, H, W] whose memory is [N, H, W] positions of C neighbouring channels.

A tile is [BLOCK_P, BLOCK_C]: neighbouring positions, 16 bytes of channels a thread. Floors are those of the kernels that use this.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import rounded


@triton.jit
def sum_positions(tile, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """In two steps: the interpreter adds one after another, and sums of many equal values would feel it.  # [BLOCK_C]"""
    return tl.sum(tl.sum(tl.reshape(tile, [BLOCK_P // 8, 8, BLOCK_C]), axis=1), axis=0)


@triton.jit
def store_image(to, value, mask):
    tl.store(to, rounded(value, to.dtype.element_ty), mask=mask)


def image(image: Tensor | None) -> Tensor | None:
    """The same values with channels innermost; itself where they are already."""
    return None if image is None else image.contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def on(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'. (CPU tensors: the interpreter.)"""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
