"""Facts about the recurrent cells, and how large a one fits on chip. Imports torch alone: asking touches no driver and no Triton."""

import torch

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}
SAVED = {"lstm": 5, "gru": 4, "gru_reset_before": 4, "rnn_tanh": 0, "rnn_relu": 0, "rnn_sigmoid": 0}

# Largest hidden size by gates whose kernels, both ways, keep the weights on chip (tests/test_triton_compile.py holds the facts).
# fp32 keeps them in registers, G*H*H of the 65536 a program can have: the lstm at 128 would spill 200 bytes a thread and more.
# 16 bits keeps them in shared memory, 2*G*H*H bytes.
MAX_HIDDEN_32BIT = {4: 64, 3: 128, 1: 128}
MAX_HIDDEN_16BIT = {4: 128, 3: 128, 1: 256}

# Warps by padded hidden size. 16 bits: a warp owns at least the 8 units of a tensor-core tile. fp32: up to 32 units a thread holds all
# the inputs of its unit, so that one warp needs no reduction; above, 8 warps share them.
NUM_WARPS_16BIT = {16: 2, 32: 4, 64: 8, 128: 8, 256: 8}
NUM_WARPS_32BIT = {16: 1, 32: 1, 64: 8, 128: 8}

SHARED_MEMORY_SM80 = 163 * 1024  # what a block may have; 227 KB on sm_90, 99 KB on sm_86, sm_89 and sm_120


def padded(hidden_size: int) -> int:
    """A power of two, and no less than the 16 a tensor core takes."""
    return max(16, 1 << (hidden_size - 1).bit_length())


def shared_memory(cell: str, dtype: torch.dtype, hidden_size: int) -> int:
    """Upper bound in bytes of what a program takes: the weights, one after another on their way to registers (fp32) or all of them and
    the exchange of [B, H] tiles (16 bits)."""
    size = padded(hidden_size)
    if dtype == torch.float32:
        return 4 * size * size
    return 2 * GATES[cell] * size * size + 96 * size


def supports(cell: str, dtype: torch.dtype, hidden_size: int, shared_limit: int = SHARED_MEMORY_SM80) -> str | None:
    """None when the Triton kernels can run this, else the reason. `shared_limit`: bytes of shared memory a block may have."""
    if cell not in GATES:
        return f"no such cell: {cell!r} (one of {', '.join(GATES)})"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {dtype} (float32, float16 or bfloat16)"
    if hidden_size < 1:
        return f"hidden size {hidden_size}"
    largest = (MAX_HIDDEN_32BIT if dtype == torch.float32 else MAX_HIDDEN_16BIT)[GATES[cell]]
    if hidden_size > largest:
        return f"hidden size {hidden_size}: {cell} weights in {dtype} stay on chip up to {largest}"
    needed = shared_memory(cell, dtype, hidden_size)
    if needed > shared_limit:
        return f"{cell} of hidden size {hidden_size} in {dtype} takes up to {needed} bytes of shared memory, the device has {shared_limit}"
    return None


def launch_config(cell: str, dtype: torch.dtype, batch: int, hidden_size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and compile-time arguments of either kernel: fixed, so that a shape has one binary and one result."""
    size = padded(hidden_size)
    wide = dtype == torch.float32
    rows = 1 if wide else 16  # 16: the rows of a tensor-core tile
    warps = (NUM_WARPS_32BIT if wide else NUM_WARPS_16BIT)[size]
    config = {"H": hidden_size, "BLOCK_B": rows, "BLOCK_H": size, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return (-(-batch // rows),), config
