"""How fast this machine convolves, multiplies and reads: for choices between libraries, and between methods that read more."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyops.ops import _conv_call, _vendor_conv


class Rates(NamedTuple):
    products: float  # GFLOP/s of a direct 3x3 convolution
    cache: float  # GB/s of reading what the last level of cache holds
    memory: float  # of reading what it does not


# Two cores of Zen 4, where nothing may be measured: values then depend on nothing but the call.
FIXED = {torch.float32: Rates(220.0, 90.0, 35.0), torch.bfloat16: Rates(450.0, 90.0, 35.0)}
CACHED, UNCACHED = 2**23, 2**26  # bytes
ENOUGH, FEWEST = 0.01, 5  # seconds and calls of one measurement


MEASURES = True  # off in tests, whose choices must not depend on what else a machine does


def rates(dtype: torch.dtype) -> Rates:
    """Of convolutions of that dtype, float32's for all but bfloat16. Measured once for each number of threads, in a tenth of a second;
    fixed under `torch.use_deterministic_algorithms` and while someone follows the ops of a call."""
    dtype = dtype if dtype in FIXED else torch.float32
    if not MEASURES or torch.are_deterministic_algorithms_enabled() or _conv_call.is_followed():
        return FIXED[dtype]
    threads = torch.get_num_threads()
    return Rates(_products(dtype, threads), _reading(CACHED, threads), _reading(UNCACHED, threads))


def prefers_mkl() -> bool:
    """Whether MKL's products with weights laid out for them are faster than oneDNN's, in float32. Measured, and fixed, as `rates` are."""
    if not MEASURES or torch.are_deterministic_algorithms_enabled() or _conv_call.is_followed():
        return False
    return _mkl_is_faster(torch.get_num_threads())


@functools.cache
def _mkl_is_faster(threads: int) -> bool:
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")):
        return False
    M, N, K = 192, 768, 768
    mkl: Any = torch.ops.mkl
    onednn: Any = torch.ops.mkldnn
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        rows, weight = torch.ones(M, K, device="cpu"), torch.ones(N, K, device="cpu")
        first, second = mkl._mkl_reorder_linear_weight(weight, M), onednn._reorder_linear_weight(weight, M)
        by_mkl = _best(lambda: mkl._mkl_linear(rows, first, weight, None, M))
        return 1.05 * by_mkl < _best(lambda: onednn._linear_pointwise(rows, second, None, "none", [], ""))


@functools.cache
def _products(dtype: torch.dtype, threads: int) -> float:
    N, C, O, H, W = 1, 128, 128, 28, 28
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        image = torch.ones(N, C, H, W, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last)
        filter = torch.ones(O, C, 3, 3, dtype=dtype, device="cpu")
        call = _vendor_conv.Conv((1, 1), (1, 1), (1, 1), 1)
        if _vendor_conv.fused_by(image, call) is None:
            return FIXED[dtype].products
        kept = _vendor_conv.keep(filter, image, call)
        seconds = _best(lambda: _vendor_conv.run_fused(image, kept, None, None, call))
    return 18e-9 * N * O * C * H * W / seconds


@functools.cache
def _reading(size: int, threads: int) -> float:
    with torch.no_grad():
        return size / 1e9 / _best(torch.ones(size // 4, device="cpu").sum)


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest call: others of the machine's programs only ever slow one down."""
    call()
    found: list[float] = []
    end = time.perf_counter() + ENOUGH
    while len(found) < FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
