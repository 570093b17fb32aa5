"""Sampling from diagonal normal distributions and its gradient, in the terms of pyops/ops/_sampling_ops.py; mean, log_var [N, D].

    z = mean + exp(log_var / 2) * eps      kl = sum of (mean^2 + (exp(log_var) - 1 - log_var)) / 2

eps are pyops/ops/_philox.py's normal numbers: blocks of four neighbouring columns. Logarithm, sine, cosine and exponential are Cephes'
polynomials: the special function unit's own are too coarse where u is near one and where a deviation is large.

Tiling: a program owns BLOCK_R rows x BLOCK_D columns; a longer row's divergences go through fp32 partials that PyTorch adds up.

Floors: mean and log_var (and grad) read once, each result written once; some 65 operations an element, most of them the numbers'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import on, store_image

ROUNDS = tl.constexpr(7)
NORMALS = tl.constexpr(-1)  # the counter's last word: 32 ones
ELEMENTS = 1024  # of a tile: two blocks of four numbers for each of 128 threads
SIZES = ("N", "segments", "units", "mean_row", "log_var_row", "grad_row")  # one binary whatever they are


@triton.jit
def logarithm(x):
    """Of normal x > 0."""
    u = x.to(tl.int32, bitcast=True)
    e = (u - 0x3F3504F3) >> 23
    f = (u - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32)
    p = (((f * 7.0376836292e-2 - 1.1514610310e-1) * f + 1.1676998740e-1) * f - 1.2420140846e-1) * f + 1.4249322787e-1
    p = (((p * f - 1.6668057665e-1) * f + 2.0000714765e-1) * f - 2.4999993993e-1) * f + 3.3333331174e-1
    return (f + ((f * f) * (f * p - 0.5) - n * 2.12194440e-4)) + n * 0.693359375


@triton.jit
def polar(first, second):
    """Two normal numbers of two words; the angle is taken from the nearest quarter turn."""
    radius = tl.sqrt_rn(-2.0 * logarithm(first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    quarter = (second + 0x20000000) >> 30
    angle = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.46291807926715968e-9
    square = angle * angle
    s = (square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1
    sin = s * square * angle + angle
    c = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = c * (square * square) + (1.0 - 0.5 * square)
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)  # quarters 1 and 2
    y = tl.where((quarter & 2) == 2, -y, y)  # quarters 2 and 3
    return radius * x, radius * y


@triton.jit
def normals(seed_ptr, row, column, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """eps of rows row + .. and columns column + .., a multiple of four.  # [BLOCK_R, BLOCK_D]"""
    i, block = row + tl.arange(0, BLOCK_R), column // 4 + tl.arange(0, BLOCK_D // 4)
    block, i = tl.broadcast(block[None, :], i[:, None])
    a, b, c, d = tl.philox(tl.load(seed_ptr), block, i, i * 0, i * 0 + NORMALS, n_rounds=ROUNDS)
    first, second = polar(a, b)
    third, fourth = polar(c, d)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK_R, BLOCK_D])  # of [.., .., k, l] number 2 * k + l


@triton.jit
def power_of_two(n):
    """-126 <= n <= 127"""
    return ((n + 12583039.0).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponentials(x):
    """(e^x, e^x - 1); the second in two ways, since a large power of two swallows what a small one keeps. NaN stays NaN."""
    y = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
    n = (y * 1.44269504 + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum's last place is one
    r = (y - n * 0.693359375) + n * 2.12194440e-4
    p = ((r * 1.9875691500e-4 + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2
    p = (p * r + 1.6666665459e-1) * r + 5.0000001201e-1
    q = p * (r * r) + r
    low = (n * 0.5 - 0.25 + 12582912.0) - 12582912.0  # two factors: 128 and subnormal powers have no float
    whole = (1.0 + q) * power_of_two(low) * power_of_two(n - low)
    small = power_of_two(tl.where(n < -126.0, -126.0, tl.where(n > 3.0, 3.0, n)))
    return whole, tl.where(n >= 3.0, whole - 1.0, q * small + (small - 1.0))


@triton.jit
def place(N, segments, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """(first row, segment, rows in 64 bits [BLOCK_R, 1], columns [1, BLOCK_D])"""
    first, segment = tl.program_id(0) // segments * BLOCK_R, tl.program_id(0) % segments
    row, column = first + tl.arange(0, BLOCK_R), segment * BLOCK_D + tl.arange(0, BLOCK_D)
    return first, segment, row.to(tl.int64)[:, None], column[None, :]


@triton.jit
def load_rows(from_ptr, row, column, stride, inside, UNIT: tl.constexpr):
    """stride: in UNITs, so that the alignment of rows is known.  # [BLOCK_R, BLOCK_D]"""
    return tl.load(from_ptr + row * (stride * UNIT) + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def gaussian_run_kernel(
    mean_ptr, log_var_ptr, seed_ptr, z_ptr, kl_ptr, N, segments, units, mean_row, log_var_row,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """kl [N, segments]"""
    first, segment, row, column = place(N, segments, BLOCK_R, BLOCK_D)
    inside = (row < N) & (column < units * UNIT)
    mean = load_rows(mean_ptr, row, column, mean_row, inside, UNIT)
    log_var = load_rows(log_var_ptr, row, column, log_var_row, inside, UNIT)
    deviation, e = exponentials(log_var * 0.5)
    z = mean + deviation * normals(seed_ptr, first, segment * BLOCK_D, BLOCK_R, BLOCK_D)
    store_image(z_ptr + row * (units * UNIT) + column, z, inside)
    sums = 0.5 * tl.sum(mean * mean + (e * (e + 2.0) - log_var), axis=1)  # zero outside
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_R)
    tl.store(kl_ptr + rows * segments + segment, sums, mask=rows < N)


@triton.jit(do_not_specialize=SIZES)
def gaussian_grad_kernel(
    mean_ptr, log_var_ptr, seed_ptr, grad_ptr, grad_kl_ptr, grad_mean_ptr, grad_log_var_ptr,
    N, segments, units, mean_row, log_var_row, grad_row, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, segment, row, column = place(N, segments, BLOCK_R, BLOCK_D)
    inside = (row < N) & (column < units * UNIT)
    deviation, e = exponentials(load_rows(log_var_ptr, row, column, log_var_row, inside, UNIT) * 0.5)
    of_mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    of_log_var = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if grad_ptr is not None:
        of_mean = load_rows(grad_ptr, row, column, grad_row, inside, UNIT)
        of_log_var = of_mean * deviation * normals(seed_ptr, first, segment * BLOCK_D, BLOCK_R, BLOCK_D)
    if grad_kl_ptr is not None:
        share = tl.load(grad_kl_ptr + row, mask=row < N, other=0.0)
        of_mean += share * load_rows(mean_ptr, row, column, mean_row, inside, UNIT)
        of_log_var += share * (e * (e + 2.0))
    at = row * (units * UNIT) + column
    store_image(grad_mean_ptr + at, of_mean, inside)
    store_image(grad_log_var_ptr + at, 0.5 * of_log_var, inside)


def gaussian_run(mean, log_var, seed) -> tuple[Tensor, Tensor]:
    """As pyops::gaussian_run."""
    mean, log_var = _rows(mean), _rows(log_var)
    N, D = mean.shape
    block = launch_config(D, mean.stride(0), log_var.stride(0))
    segments = triton.cdiv(D, block["BLOCK_D"])
    z = torch.empty(N, D, dtype=mean.dtype, device=mean.device)
    kl = torch.empty(N, segments, dtype=torch.float32, device=mean.device)
    if z.numel():
        strides = (t // block["UNIT"] for t in (D, mean.stride(0), log_var.stride(0)))
        with on(mean):
            gaussian_run_kernel[_grid(N, segments, block)](mean, log_var, seed, z, kl, N, segments, *strides, **block)
    return z, kl.view(N) if segments == 1 else kl.sum(1)


def gaussian_grad(mean, log_var, seed, grad, grad_kl) -> tuple[Tensor, Tensor]:
    """The gradients of mean and of log_var, as pyops::gaussian_grad."""
    mean, log_var = _rows(mean), _rows(log_var)
    grad, grad_kl = None if grad is None else _rows(grad), None if grad_kl is None else grad_kl.contiguous()
    N, D = mean.shape
    apart = [mean.stride(0), log_var.stride(0), 0 if grad is None else grad.stride(0)]
    block = launch_config(D, *apart)
    segments = triton.cdiv(D, block["BLOCK_D"])
    found = [torch.empty(N, D, dtype=mean.dtype, device=mean.device) for _ in range(2)]
    if mean.numel():
        strides = (t // block["UNIT"] for t in (D, *apart))
        with on(mean):
            gaussian_grad_kernel[_grid(N, segments, block)](mean, log_var, seed, grad, grad_kl, *found, N, segments, *strides, **block)
    return found[0], found[1]


def launch_config(D: int, *strides: int) -> dict[str, int]:
    """Compile-time tile. UNIT divides a row's length and the rows' distances."""
    unit = 8 if all(size % 8 == 0 for size in (D, *strides)) else 1
    columns = min(max(triton.next_power_of_2(D), 16), 512)
    return {"UNIT": unit, "BLOCK_R": ELEMENTS // columns, "BLOCK_D": columns, "num_warps": 4, "num_stages": 2}


def _rows(t: Tensor) -> Tensor:
    """With neighbouring columns."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _grid(N: int, segments: int, block: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(N, block["BLOCK_R"]) * segments,)
