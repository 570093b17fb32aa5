"""What each backend's attention kernels can compute."""

from __future__ import annotations

import torch

from pyops.ops import _conv_call

MOST_HEAD_SIZE = 256
# csrc/attention/attention_cuda.h: keys and values of a head stay in shared memory
MOST_CUDA_HEAD_SIZE = 128
MOST_CUDA_ROWS = 320
MOST_CUDA_TOKENS = 304
MOST_CUDA_GRADIENT_TOKENS = {32: 384, 64: 256, 128: 128}  # by head size: keys' gradients stay in registers


def unsupported(call, backend: str) -> str | None:
    """None when the kernels of "cpu", "cuda" or "triton" can run a `flash_attention.Call`, else why not."""
    query, key, value = call.heads()
    (N, D), M, value_size = query.shape[2:], key.shape[2], value.shape[3]
    if value_size != D:
        return f"its query and value have one head size, these are {D} and {value_size}"
    if backend != "cuda":
        return None if D <= MOST_HEAD_SIZE else f"its heads are of {MOST_HEAD_SIZE} or less, these are {D}"
    reason = _unsupported_by_cuda(query.dtype, D)
    if reason is None and max(N, M) > MOST_CUDA_ROWS:
        return f"its sequences have {MOST_CUDA_ROWS} rows and keys or fewer, these are {N} and {M}"
    return reason


def window_unsupported(call, backend: str) -> str | None:
    """The same of a `window_attention` call."""
    D, tokens = call.qkv.shape[3] // 3 // call.heads, call.window[0] * call.window[1]
    if backend != "cuda":
        return None if D <= MOST_HEAD_SIZE else f"its heads are of {MOST_HEAD_SIZE} or less, these are {D}"
    reason = _unsupported_by_cuda(call.qkv.dtype, D)
    if reason is not None:
        return reason
    most = MOST_CUDA_TOKENS
    if _conv_call.needs_grad(*call[:4]):
        most = min(most, next(tokens for size, tokens in MOST_CUDA_GRADIENT_TOKENS.items() if size >= D))
    return None if tokens <= most else f"its windows have {most} tokens or fewer, these have {tokens}"


def _unsupported_by_cuda(dtype: torch.dtype, D: int) -> str | None:
    if dtype == torch.float32:
        return "its tensor cores multiply bfloat16 and float16, not float32; backend 'triton' does"
    return None if D <= MOST_CUDA_HEAD_SIZE else f"its heads are of {MOST_CUDA_HEAD_SIZE} or less, these are {D}"
