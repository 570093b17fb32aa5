"""Checks of a convolution's arguments: clear errors before any kernel runs."""

from __future__ import annotations

from pyops.ops import _conv_call
from pyops.ops._vendor_conv import UPSAMPLINGS, Conv, Pool


def numbers_of(op: str, name: str, value, rank: int, least: int) -> tuple[int, ...]:
    found = (value,) * rank if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(found) != rank or not all(isinstance(v, int) for v in found):
        raise TypeError(f"{op}: {name}: expected an int or {rank} ints, got {value!r}")
    if min(found) < least:
        raise ValueError(f"{op}: {name}: expected {least} or more, got {value!r}")
    return found


def stride_and_dilation(op: str, input, weight, stride, dilation, groups, transposed=False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stride, dilation), after input, weight and groups were found to go together."""
    _conv_call.check_tensor(op, "input", input, optional=False)
    _conv_call.check_tensor(op, "weight", weight, input, optional=False)
    if not 3 <= input.dim() <= 5:
        raise ValueError(f"{op}: input: expected [N, C] and one to three spatial dimensions, got shape {tuple(input.shape)}")
    if input.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{op}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    if not isinstance(groups, int):
        raise TypeError(f"{op}: groups: expected an int, got {groups!r}")
    C = input.shape[1]
    if groups < 1 or C % groups or (weight.dim() > 0 and not transposed and weight.shape[0] % groups):
        raise ValueError(f"{op}: groups: expected a divisor of input's {C} channels and of weight's outputs, got {groups}")
    channels = weight.dim() == input.dim() and weight.shape[0 if transposed else 1] == (C if transposed else C // groups)
    if not channels or 0 in weight.shape:
        form = f"[{C}, O/groups" if transposed else f"[O, {C // groups}"
        raise ValueError(f"{op}: weight: expected {form}, *kernel] for input {tuple(input.shape)}, got shape {tuple(weight.shape)}")
    rank = input.dim() - 2
    return numbers_of(op, "stride", stride, rank, 1), numbers_of(op, "dilation", dilation, rank, 1)


def pads(op: str, value, kernel, stride, dilation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(zeros on each side, zeros more at the end)"""
    rank = len(kernel)
    if not isinstance(value, str):
        return numbers_of(op, "padding", value, rank, 0), (0,) * rank
    if value == "valid":
        return (0,) * rank, (0,) * rank
    if value != "same":
        raise ValueError(f'{op}: padding: expected "same", "valid" or numbers, got {value!r}')
    if any(s != 1 for s in stride):
        raise ValueError(f'{op}: padding: "same" needs stride 1, got {stride}')
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in total), tuple(t % 2 for t in total)


def upsampling(op: str, name, rank: int) -> int:
    """Its number in UPSAMPLINGS."""
    if name not in UPSAMPLINGS:
        raise ValueError(f'{op}: upsample: expected None, "nearest" or "bilinear", got {name!r}')
    if name is not None and rank != 2:
        raise ValueError(f"{op}: upsample: enlarges images of two spatial dimensions, input has {rank}")
    return UPSAMPLINGS.index(name)


def pooling(op: str, name, rank: int, size=2, stride=None, padding=0) -> Pool | None:
    if name not in (None, "max", "average"):
        raise ValueError(f'{op}: pool: expected None, "max" or "average", got {name!r}')
    if name is None:
        return None
    if rank != 2:
        raise ValueError(f"{op}: pool: pools images of two spatial dimensions, input has {rank}")
    kernel, pads = numbers_of(op, "pool_size", size, 2, 1), numbers_of(op, "pool_padding", padding, 2, 0)
    step = kernel if stride is None else numbers_of(op, "pool_stride", stride, 2, 1)
    if any(2 * pad > k for k, pad in zip(kernel, pads, strict=True)):
        raise ValueError(f"{op}: pool_padding: expected at most half of pool_size {kernel}, got {pads}")
    (kh, kw), (sh, sw), (ph, pw) = kernel, step, pads
    return Pool(name == "max", (kh, kw), (sh, sw), (ph, pw))


def check(op: str, call: Conv, input, weight, bias, residual) -> tuple[tuple[int, ...], int]:
    """(the size of what the convolution gives, its channels)"""
    kernel = weight.shape[2:]
    seen = tuple(2 * n if call.upsample else n for n in input.shape[2:])
    if call.output_padding is None:
        O = weight.shape[0]
        numbers = zip(seen, kernel, call.stride, call.padding, call.dilation, strict=True)
        size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in numbers)
    else:
        O = weight.shape[1] * call.groups
        transposed = zip(seen, kernel, call.stride, call.padding, call.output_padding, call.dilation, strict=True)
        size = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + r for n, k, s, p, r, d in transposed)
    if min(size) < 1:
        raise ValueError(f"{op}: input: {tuple(input.shape[2:])} is too small for kernel {tuple(kernel)} and padding {call.padding}")
    if call.pool is not None and any(n + 2 * p < k for n, k, p in zip(size, call.pool.kernel, call.pool.padding, strict=True)):
        raise ValueError(f"{op}: pool_size: windows of {call.pool.kernel} are larger than the convolution's {size}")
    _conv_call.check_tensor(op, "bias", bias, input, (O,))
    _conv_call.check_tensor(op, "residual", residual, input, (input.shape[0], O, *size))
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype != input.dtype and not _conv_call.is_autocast(input.device.type):
            raise ValueError(f"{op}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")
    return size, O
