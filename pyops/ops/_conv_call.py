"""What the convolution family's public functions share: which backends exist for a call, autocast, checks of tensors and numbers."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyops import _backends, _library
from pyops.ops import _sharding

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Nothing of ours has been measured on a GPU yet, so there PyTorch's ops come first.
ORDER = {"cpu": ("cpu", "eager"), "cuda": ("eager", "cuda", "triton")}


def order(device: str, eager_first: bool = False, sharded: bool = False) -> tuple[str, ...]:
    """What "auto" tries, in this order. eager_first: for a call that PyTorch's ops were measured to do sooner on a CPU; sharded: for one
    that our ops have a rule to split by, where the ops that PyTorch's way is made of may gather."""
    found = ORDER.get(device, ("eager",))
    if sharded:
        return (*(name for name in found if name != "eager"), "eager")
    return found[::-1] if eager_first and device == "cpu" else found


def unsupported(device: str, dtype: torch.dtype, backend: str) -> str | None:
    """None when `backend` can run a call on such tensors, else why not."""
    if backend == "eager":
        return None
    if backend == "vendor":
        return 'PyTorch has no such op; "eager" calls the ops that it is made of'
    if dtype == torch.float64:
        return f"float64 has no {backend} kernel"
    if backend == "cpu":
        return f"it needs CPU tensors, these are on {device}" if device != "cpu" else _library.not_loaded_reason()
    if backend == "cuda":
        if device != "cuda":
            return f"it needs CUDA tensors, these are on {device}"
        return (
            None if _library.has_cuda_kernels() else _library.not_loaded_reason() or "pyops was built without CUDA kernels; see `pyops env`"
        )
    if find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), these are on {device}"
    return None


def choose(op: str, backend: str | None, like: Tensor, eager_first: bool = False) -> str:
    """The backend that runs a call on tensors such as `like`."""
    device = like.device.type
    reasons = lambda name: unsupported(device, like.dtype, name)  # noqa: E731
    sharded = _sharding.is_sharded(like)
    eager_first = eager_first or is_recorded() or sharded
    names = order(device, eager_first, sharded and op in _sharding.PUBLIC)
    name = _backends.select(op, _backends.requested(backend), names, reasons)
    if not torch.compiler.is_compiling():
        _backends.log_choice(op, device, name)
    return name


def explain(op: str, facts: str, backend: str | None, like: Tensor, eager_first: bool = False) -> _backends.Explanation:
    device = like.device.type
    reasons = lambda name: unsupported(device, like.dtype, name)  # noqa: E731
    return _backends.build_explanation(op, facts, _backends.requested(backend), order(device, eager_first), reasons)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def overload(backend: str) -> str:
    return "triton" if backend == "triton" else "default"


def is_autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def is_recorded() -> bool:
    """Whether someone follows the ops of a call who knows torch's own alone: torch.jit.trace, the ONNX exporter, torch.func, forward-mode
    gradients."""
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_followed() -> bool:
    """Whether anyone at all does, who may not know PyTorch's private ops: the compiler, fake tensors and other modes of dispatch."""
    return torch.compiler.is_compiling() or is_recorded() or torch._C._len_torch_dispatch_stack() > 0


def is_plain_inference(input: Tensor) -> bool:
    """Whether a call on a CPU has no gradients, autocast, follower or backend asked for by name: layers then look up what ran it before.
    One function, and PyTorch's own without their wrappers: it is asked for every layer, and some layers take three microseconds."""
    c = torch._C
    return not (
        torch.compiler.is_compiling()
        or c.is_grad_enabled()
        or not input.is_cpu
        or c._is_any_autocast_enabled()
        or c._is_tracing()
        or forward_ad._current_level >= 0
        or c._are_functorch_transforms_active()
        or c._len_torch_dispatch_stack() > 0
        or _backends.overridden()
    )


def autocast(*tensors):
    """Under autocast every tensor in its dtype, float64 excepted, as torch casts the arguments of its own convolutions."""
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_tensor(op: str, name: str, t, like: Tensor | None = None, shape: tuple[int, ...] | None = None, *, optional: bool = True) -> None:
    """Raises TypeError or ValueError unless `t` is a floating tensor on `like`'s device and of `shape`, or None where it may be."""
    if t is None and optional:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a Tensor{' or None' if optional else ''}, got {type(t).__name__}")
    if like is None:
        _sharding.is_sharded(t)  # with the rules in place, whatever runs the call
    if not t.is_floating_point():
        raise ValueError(f"{op}: {name}: expected a floating tensor, got {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name}: expected shape {shape}, got {tuple(t.shape)}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{op}: {name}: expected input's device {like.device}, got {t.device}")


def check_input(op: str, input) -> None:
    check_tensor(op, "input", input, optional=False)
    if input.dim() != 4:
        raise ValueError(f"{op}: input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise ValueError(f"{op}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")


def as_vector(t: Tensor | None, like: Tensor) -> Tensor | None:
    """`t` in the dtype of the vectors that go with images like `like`."""
    return None if t is None else t.to(torch.promote_types(like.dtype, torch.float32))


def in_layout_of(output: Tensor, input: Tensor) -> Tensor:
    """A kernel's channels_last output in the layout that the input had; of one channel, the layout that its strides tell."""
    last = input.is_contiguous(memory_format=torch.channels_last) and (input.shape[1] != 1 or input.stride(1) == 1)
    return output if last else output.contiguous()
