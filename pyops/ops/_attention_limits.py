"""What each backend's attention kernels can compute."""

from __future__ import annotations

MOST_HEAD_SIZE = 256


def unsupported(call, backend: str) -> str | None:
    """None when the kernels of "cpu", "cuda" or "triton" can run a `flash_attention.Call`, else why not."""
    query, _, value = call.heads()
    D, value_size = query.shape[3], value.shape[3]
    if value_size != D:
        return f"its query and value have one head size, these are {D} and {value_size}"
    return None if D <= MOST_HEAD_SIZE else f"its heads are of {MOST_HEAD_SIZE} or less, these are {D}"
