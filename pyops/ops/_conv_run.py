"""What runs a convolution: kernels, oneDNN or PyTorch, for functions and for modules that keep filters in a machine's layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _backends
from pyops.ops import (
    _conv_call,
    _conv_checks,
    _dense_train,  # noqa: F401  (registers ops that KERNELS holds)
    _fused_ops,
    _pointwise_ops,
    _pool_ops,
    _pool_train,  # noqa: F401
    _small_conv_ops,
    _vendor_conv,
    _winograd_ops,
)
from pyops.ops._sharding import is_sharded
from pyops.ops._vendor_conv import UPSAMPLINGS, Conv, Pool
from pyops.ops.depthwise_conv import fold

# Nothing of ours has been measured on a GPU yet, so there PyTorch's convolutions come first.
ORDER = {"cpu": ("cpu", "vendor", "eager"), "cuda": ("vendor", "eager", "cuda", "triton")}


class Facts(NamedTuple):
    op: str
    device: str
    dtype: torch.dtype
    rank: int
    differentiable: bool
    sharded: bool  # a DTensor, which PyTorch's ops know how to split

    def unsupported(self, backend: str) -> str | None:
        if backend == "vendor":
            return None
        if backend in ("cuda", "triton") and self.rank == 3:
            return f"its {backend} kernel has no third dimension"
        return _conv_call.unsupported(self.device, self.dtype, backend)

    def choose(self, backend: str | None) -> str:
        name = _backends.select(self.op, _backends.requested(backend), self.order(), self.unsupported)
        if not torch.compiler.is_compiling():
            _backends.log_choice(self.op, self.device, name)
        return name

    def order(self) -> tuple[str, ...]:
        plain = _conv_call.is_recorded() or self.dtype == torch.float64 or self.sharded
        return ("eager",) if plain else ORDER.get(self.device, ("vendor", "eager"))


def facts_of(op: str, input: Tensor, tensors) -> Facts:
    return Facts(op, input.device.type, input.dtype, input.dim() - 2, _conv_call.needs_grad(*tensors), is_sharded(input))


MOST_PLANS = 64  # shapes that a module remembers


def run_folded(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv, kept: dict, backend: str | None
) -> Tensor:
    """Inference with a filter and bias of `fold`, for modules, which keep in `kept` what is made of them for the machine: the filters in
    the layouts that kernels want, and what runs a call, by its shape."""
    if torch.compiler.is_compiling() or backend is not None or _backends.overridden():
        return _conv_call.in_layout_of(_plan(input, weight, bias, residual, call, kept, backend)(input, residual), input)
    output = run_again(input, residual, kept)
    if output is not None:
        return output
    plans = kept["plans"]
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[_key(input, residual)] = plan = _plan(input, weight, bias, residual, call, kept, backend)
    return _conv_call.in_layout_of(plan(input, residual), input)


def run_again(input: Tensor, residual: Tensor | None, kept: dict) -> Tensor | None:
    """`run_folded` of a call that has run before, without a look at anything else; None where it has not."""
    plan = kept.setdefault("plans", {}).get(_key(input, residual))
    return None if plan is None else _conv_call.in_layout_of(plan(input, residual), input)


def _key(input: Tensor, residual: Tensor | None) -> tuple:
    beside = None if residual is None else (residual.shape, residual.dtype)
    return input.shape, input.dtype, beside, _vendor_conv.switches()


def write_folded(input: Tensor, out: Tensor, weight: Tensor, call: Conv, kept: dict, backend: str | None) -> None:
    """`run_folded` without bias and residual into `out`, which may be a slice of a wider image's channels."""
    key = ("into", input.shape, input.dtype, _vendor_conv.switches())
    free = backend is None and not _backends.overridden()
    m = kept.get(key) if free else None
    if m is None:
        name = facts_of("conv_bn_act", input, ()).choose(backend)
        m = winograd(input, weight, call, keeps=True) if name == "cpu" else 0
        if free and len(kept) < MOST_PLANS:
            kept[key] = m
    if m:
        points = _kept(kept, m, lambda: torch.ops.pyops.winograd_pack.default(weight, m))
        torch.ops.pyops.winograd_into.default(out, input, points, None, *call.padding, call.activation, call.slope)
    else:
        out.copy_(run_folded(input, weight, None, None, call, kept, backend))


Plan = Callable[[Tensor, Tensor | None], Tensor]
FUSED_FROM = 3e6  # products: oneDNN's fused call takes 30 us longer to start than PyTorch's plain one


def _plan(input, weight, bias, residual, call: Conv, kept: dict, backend: str | None) -> Plan:
    if input.dim() != 4 or input.shape[1] != weight.shape[1] * call.groups:
        raise ValueError(f"ConvBNAct: input: expected [N, {weight.shape[1] * call.groups}, H, W], got shape {tuple(input.shape)}")
    size, O = _conv_checks.check("conv_bn_act", call, input, weight.to(input.dtype), None, residual)
    name = facts_of("conv_bn_act", input, ()).choose(backend)
    if name == "cpu":
        return _plan_cpu(input, weight, bias, call, kept, size, O)
    filter = _kept(kept, ("plain", input.dtype), lambda: weight.to(input.dtype))
    if name == "eager":
        return lambda x, beside: _vendor_conv.pool(_unfused(_vendor_conv.enlarge(x, call), filter, bias, beside, call), call)
    return lambda x, beside: infer(name, x, filter, bias, beside, call, size)


def _plan_cpu(input, weight, bias, call: Conv, kept: dict, size, O: int) -> Plan:
    m, pool = winograd(input, weight, call, keeps=True), call.pool
    if m:
        points = _kept(kept, m, lambda: torch.ops.pyops.winograd_pack.default(weight, m))
        return _with_points(points, bias, O, call)
    image, doubled, seen = _enlarged(input, weight, call, transposes=True)
    if seen.transposed:
        filter = _kept(kept, ("doubled", input.dtype), lambda: doubled.to(input.dtype).contiguous(memory_format=torch.channels_last))
        return lambda x, beside: _pooled(_unfused(x, filter, bias, beside, seen), pool)
    small = _small_conv_ops.is_small(_products(input, weight, size), weight.numel())
    if small and not call.upsample and call.groups == 1 and set(call.dilation) == {1}:
        return _plan_small(input, weight, bias, call, kept)
    plain = _plan_onednn(image, weight, bias, seen, kept, size)
    if call.upsample == 0 and pool is None:
        return plain
    return lambda x, beside: _pooled(plain(_vendor_conv.enlarge(x, call), beside), pool)


def _with_points(points: Tensor, bias: Tensor | None, O: int, call: Conv) -> Plan:
    """By Winograd's method, upsampling and 2x2 pooling on the way."""
    within = call.pool.in_kernel if call.pool is not None else 0
    ends = (*call.padding, call.activation, call.slope, call.residual_last, within, call.upsample)
    infer_points, rest = torch.ops.pyops.winograd_infer.default, None if within else call.pool
    if rest is None:
        return lambda x, beside: infer_points(x, points, bias, beside, O, *ends)
    return lambda x, beside: _pooled(infer_points(x, points, bias, beside, O, *ends), rest)


def _pooled(y: Tensor, pool: Pool | None) -> Tensor:
    """Without gradients."""
    return y if pool is None else _pool_ops.pooled(y, pool) if pools(pool) else _vendor_conv.pool_by(y, pool)


def _plan_onednn(input, weight, bias, call: Conv, kept: dict, size) -> Plan:
    if _products(input, weight, size) >= FUSED_FROM and _vendor_conv.fused_by(input, call) is not None:
        packed = _kept(kept, ("onednn", input.dtype), lambda: _vendor_conv.keep(weight, input, call))
        return lambda x, beside: _vendor_conv.run_fused(x, packed, bias, beside, call)
    filter = _kept(kept, ("plain", input.dtype), lambda: weight.to(input.dtype))
    return lambda x, beside: _unfused(x, filter, bias, beside, call)


def _products(input: Tensor, weight: Tensor, size) -> int:
    return math.prod(size) * input.shape[0] * weight.numel()


def _plan_small(input, weight, bias, call: Conv, kept: dict) -> Plan:
    """One call for everything but a residual, which comes before the activation, and pooling of other windows than 2x2."""
    filter = _kept(kept, "small", lambda: _small_conv_ops.pack(weight))
    vector, run = None if bias is None else bias.float(), torch.ops.pyops.small_conv.default
    within = call.pool.in_kernel if call.pool is not None else 0
    rest = None if within else call.pool
    ends = (weight.shape[0], call.stride, call.padding)

    def plan(x: Tensor, beside: Tensor | None) -> Tensor:
        if beside is None:
            return _pooled(run(x, filter, vector, *ends, call.activation, call.slope, within), rest)
        return _pooled(_vendor_conv.finish(run(x, filter, vector, *ends, 0, 0.0, 0), beside, call), call.pool)

    return plan


def _unfused(x: Tensor, filter: Tensor, bias: Tensor, beside: Tensor | None, call: Conv) -> Tensor:
    return _vendor_conv.finish(_vendor_conv.convolution(x, filter, bias, call), beside, call)


def _kept(kept: dict, key, compute):
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def pools(pool: Pool) -> bool:
    """Whether pooling kernels take such windows."""
    return math.prod(pool.kernel) < 256


def windows(pool: Pool) -> tuple:
    """As `_pool_train` takes them."""
    return pool.maximum, *(list(n) for n in pool[1:])


def infer(name: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Conv, size) -> Tensor:
    """Convolution, and what comes before and after it, without gradients; weight of input's dtype."""
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    m = winograd(input, weight, call) if call.upsample and name == "cpu" else 0
    if m:
        points = torch.ops.pyops.winograd_pack.default(weight.float(), m)
        return _with_points(points, _conv_call.as_vector(bias, input), weight.shape[0], call)(input, residual)
    if call.upsample:
        input, weight, call = _enlarged(input, weight, call, transposes=name != "vendor")
    pool = call.pool
    if name == "vendor" or (name == "cpu" and input.dim() != 4):
        return _vendor_conv.pool(_vendor_conv.run(input, weight, bias, residual, call), call)
    image, filter, beside = (None if t is None else _with_rows(t) for t in (input, weight, residual))
    within = 0 if pool is None or call.transposed else pool.in_kernel
    y = _kernel(kernels, image, filter, bias, beside, _in_two_dimensions(call), _rows(size), within)
    if pool is not None and not within:
        y = kernels.pool_run(y, None, *windows(pool), 0, 0.0, False)[0] if pools(pool) else _vendor_conv.pool_by(y, pool)
    return y if input.dim() == 4 else y.reshape(input.shape[0], -1, *size)


def _kernel(kernels, input, weight, bias, residual, call: Conv, size, pool: int) -> Tensor:
    epilogue = (call.activation, call.slope, call.residual_last, False, _pointwise_ops.tf32_allowed(input))
    bias = _conv_call.as_vector(bias, input)
    if call.transposed:
        rest = (call.stride, call.padding, size, call.dilation, call.groups)
        return kernels.conv_transpose_run(input, weight, bias, residual, *rest, *epilogue)[0]
    return kernels.conv_run(input, weight, bias, residual, call.stride, call.padding, call.dilation, call.groups, *epilogue, pool)[0]


def repeats(weight: Tensor, call: Conv) -> bool:
    """Whether a convolution of repeated positions is a transposed one of what they repeat."""
    plain = set(call.stride) == set(call.dilation) == {1} and all(k > p for k, p in zip(weight.shape[2:], call.padding, strict=True))
    return plain and call.upsample == UPSAMPLINGS.index("nearest")


def _enlarged(input: Tensor, weight: Tensor, call: Conv, transposes: bool) -> tuple[Tensor, Tensor, Conv]:
    """The same without upsampling, differentiable. Where each position is repeated, the convolution of what is enlarged is a transposed
    convolution of what is not, with a filter one larger: of 3x3 filters at 4/9 of the products (on 2 cores of Zen 4 PyTorch's took a
    quarter to three quarters of the time that enlarging and convolving did)."""
    if not transposes or not repeats(weight, call):
        return _vendor_conv.enlarge(input, call), weight, call._replace(upsample=0)
    ends = [k - 1 - p for k, p in zip(weight.shape[2:], call.padding, strict=True)]
    wide = F.pad((weight if weight.dtype == torch.float64 else weight.float()).flip(2, 3), (1, 1, 1, 1))
    pairs = wide[..., :-1, :] + wide[..., 1:, :]
    filter = (pairs[..., :-1] + pairs[..., 1:]).unflatten(0, (call.groups, -1)).transpose(1, 2).flatten(0, 1).to(weight.dtype)
    return input, filter, call._replace(stride=(2, 2), padding=tuple(ends), output_padding=(0, 0), upsample=0)


def convolve(
    kernels, input: Tensor, weight: Tensor, bias: Tensor | None, call: Conv, size, moments: bool, dense: bool, ours: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The convolution with gradients, and its moments where asked for and where its own kernel gives them: `dense`, on a GPU."""
    if call.upsample:
        input, weight, call = _enlarged(input, weight, call, transposes=dense or ours)
    if call.output_padding is not None and any(r >= s for r, s in zip(call.output_padding, call.stride, strict=True)):
        dense = ours = False  # positions that no stride of the gradient's convolution reaches
    if not dense and not (ours and winograd(input, weight, call)):
        return _vendor_conv.convolution(input, weight, bias, call), None
    image, filter, two = _with_rows(input), _with_rows(weight), _in_two_dimensions(call)
    shape = (two.stride, two.padding, *([_rows(size)] if call.transposed else []), two.dilation, two.groups)
    function = kernels.conv_transpose_train_fwd if call.transposed else kernels.conv_train_fwd
    y, found = function(image, filter, bias, *(list(n) if isinstance(n, tuple) else n for n in shape), dense and moments)
    return y.reshape(input.shape[0], -1, *size), found if dense and moments and input.dim() == 4 else None


def winograd(input: Tensor, weight: Tensor, call: Conv, keeps: bool = False) -> int:
    """m of the Winograd convolution that is fastest; 0: none. keeps: the points of the filters are kept."""
    times = winograd_times(input, weight, call, keeps)
    return min(times, key=lambda m: times[m]) if times else 0


def winograd_times(input: Tensor, weight: Tensor, call: Conv, keeps: bool = False) -> dict[int, float]:
    """As `_winograd_ops.expected_times` has them."""
    if call.transposed or input.dim() != 4 or _conv_call.is_recorded():
        return {}
    numbers = (call.stride, call.padding, call.dilation, call.groups)
    return _winograd_ops.expected_times(_vendor_conv.seen(input.shape, call), weight, *numbers, keeps, input.dtype)


def _with_rows(t: Tensor) -> Tensor:
    return t.unsqueeze(2) if t.dim() == 3 else t


def _rows(size) -> tuple[int, ...]:
    return (1, *size) if len(size) == 1 else tuple(size)


def _in_two_dimensions(call: Conv) -> Conv:
    if len(call.stride) == 2:
        return call
    rest = None if call.output_padding is None else (0, *call.output_padding)
    one: dict[str, Any] = dict(stride=(1, *call.stride), padding=(0, *call.padding), dilation=(1, *call.dilation), output_padding=rest)
    return call._replace(**one)


def fold_convolution(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps: float, call: Conv) -> tuple[Tensor, Tensor]:
    """`fold` of either kind of filter."""
    if not call.transposed:
        return fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps)
    grouped = weight.unflatten(0, (call.groups, -1)).transpose(1, 2)  # [groups, O/groups, C/groups, *kernel]
    folded, bias = fold(grouped.flatten(0, 1), bias, running_mean, running_var, bn_weight, bn_bias, eps)
    return folded.unflatten(0, (call.groups, -1)).transpose(1, 2).flatten(0, 1), bias
