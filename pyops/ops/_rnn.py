"""What runs a recurrent layer, and why: facts of a call, each backend's limits, argument checks, the call itself.

Beside it: `_rnn_ops` (the torch ops) and `_rnn_reference` (the family in plain PyTorch).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyops import _backends, _library
from pyops.ops import _rnn_ops  # noqa: F401  (registers the torch ops)
from pyops.ops._rnn_reference import CELL_NAMES, GATES, Cell, reference_layer
from pyops.ops._sharding import is_sharded

_Tensors = TypeVar("_Tensors", bound=tuple)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORWARD = {  # by overload and by whether a gradient will be asked for
    (overload, needs_grad): getattr(torch.ops.pyops.rnn_fwd if needs_grad else torch.ops.pyops.rnn_infer, overload)
    for overload in ("default", "triton")
    for needs_grad in (False, True)
}
VENDOR: dict[int, tuple[Callable, Callable]] = {  # PyTorch's own: a sequence, one step
    Cell.lstm: (torch.lstm, torch.lstm_cell),
    Cell.gru: (torch.gru, torch.gru_cell),
    Cell.rnn_tanh: (torch.rnn_tanh, torch.rnn_tanh_cell),
    Cell.rnn_relu: (torch.rnn_relu, torch.rnn_relu_cell),
}
ORDER = {
    "cpu": ("cpu", "vendor", "eager"),
    # Nothing of ours has been measured on a GPU yet, so there the vendor's op comes first wherever it can run.
    "cuda": ("vendor", "cuda", "triton", "eager"),
}


# ------------------------------------------------------------------------------------------------------- what runs, and why


class Facts(NamedTuple):
    """What the choice of a backend may depend on: static facts of a call, no tensor."""

    cell: int
    device: str
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    single: bool  # a cell: one step, no time dimension
    reverse: bool
    has_lengths: bool
    needs_grad: bool
    compiling: bool
    sharded: bool

    def __str__(self) -> str:
        name = CELL_NAMES[self.cell]
        return f"{name}, {self.device}, {str(self.dtype)[6:]}, T={self.T}, B={self.B}, I={self.I}, H={self.H}"


def unsupported(facts: Facts, backend: str) -> str | None:
    """None when `backend` can run a call with these facts, else why not."""
    if backend == "eager":
        return None
    if backend == "cpu":
        if facts.device != "cpu":
            return f"it needs CPU tensors, these are on {facts.device}"
        return _library.not_loaded_reason()
    if backend == "cuda":
        if facts.device != "cuda":
            return f"it needs CUDA tensors, these are on {facts.device}"
        if not _library.has_cuda_kernels():
            return _library.not_loaded_reason() or "pyops was built without CUDA kernels; see `pyops env`"
        return "float64 has no CUDA kernel" if facts.dtype == torch.float64 else None
    if backend == "triton":
        return _triton_unsupported(facts)
    if facts.cell not in VENDOR:
        return f"PyTorch has no op for {CELL_NAMES[facts.cell]}"
    if facts.has_lengths:
        return "PyTorch's op takes no lengths"
    if facts.reverse:
        return "PyTorch's op has no reversed single direction"
    if facts.T == 0 or facts.B == 0 or facts.I == 0:
        return "PyTorch's op takes no empty sequence, batch or input"
    if facts.sharded:
        return "PyTorch's op takes no DTensor"
    return "under torch.compile PyTorch's op is unrolled over time" if facts.compiling else None


def _triton_unsupported(facts: Facts) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if facts.device != "cuda" and not (facts.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), these are on {facts.device}"
    from pyops.triton_kernels import recurrent_limits  # plain facts: imports neither triton nor the driver

    limit = recurrent_limits.SHARED_MEMORY_SM80
    if facts.device == "cuda" and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties().shared_memory_per_block_optin
    return recurrent_limits.supports(CELL_NAMES[facts.cell], facts.dtype, facts.H, limit)


def order(facts: Facts) -> tuple[str, ...]:
    """Backends by preference: the device's order, PyTorch's own op first where it was measured faster."""
    found = ORDER.get(facts.device, ("vendor", "eager"))
    if found[0] == "cpu" and _vendor_is_faster(facts):
        return ("vendor", *(name for name in found if name != "vendor"))
    return found


def _vendor_is_faster(facts: Facts) -> bool:
    """CPU training of single RNN steps, and of large layers in bfloat16. Speed of a training step, ours over PyTorch's (2 cores of Zen 4):

    RNN cell, float32, B=1 H=256: 0.8. Our kernels take 63 us of 220; most of the rest is the Python autograd of torch.library.
    bfloat16: our backward multiplies in float32, oneDNN's and MKL's in bfloat16. LSTM T=64 B=16 H=256 0.76, T=128 B=64 H=512 0.71;
    GRU 2.16 and 0.80; RNN 2.5 and 0.98; cells at B=64 H=512 0.57 to 0.77.
    """
    if not facts.needs_grad or facts.compiling:
        return False
    if facts.single and GATES[facts.cell] == 1:
        return True
    if facts.dtype != torch.bfloat16:
        return False
    products = facts.T * facts.B * GATES[facts.cell] * facts.H * (facts.I + facts.H)
    return products > (10e6 if facts.T == 1 else 100e6 if facts.cell == Cell.lstm else 2e9)


# ------------------------------------------------------------------------------------------------------------------- calling


def _vendor(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first):
    sequence, one_step = VENDOR[cell]
    B, H = input.shape[0 if batch_first or input.dim() == 2 else 1], weight_hh.shape[1]
    h0, c0 = (input.new_zeros(B, H) if state is None else state for state in (h0, c0))
    weights = [weight_ih, weight_hh]
    if bias_ih is not None or bias_hh is not None:
        weights += [weight_ih.new_zeros(weight_ih.shape[0]) if bias is None else bias for bias in (bias_ih, bias_hh)]
    if input.dim() == 2:
        results = one_step(input, (h0, c0) if cell == Cell.lstm else h0, *weights)
        return (results[0], *results) if cell == Cell.lstm else (results, results, None)
    hx = (h0.unsqueeze(0), c0.unsqueeze(0)) if cell == Cell.lstm else h0.unsqueeze(0)
    with warnings.catch_warnings():  # cuDNN would rather have the weights in one chunk; the user was never asked to flatten them
        if input.is_cuda:
            warnings.simplefilter("ignore", UserWarning)
        output, h_n, *c_n = sequence(input, hx, weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, batch_first)
    return output, h_n.squeeze(0), c_n[0].squeeze(0) if c_n else None


_cpu_settled = False  # the compiled CPU kernels were chosen by themselves once: plain calls on CPU tensors need not ask again


def run(op, cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse, lengths, backend, single=False):
    """Checks, chooses and calls: (output, h_n, c_n or None) of one layer in one direction."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input: expected a Tensor, got {type(input).__name__}")
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    compiling = torch.compiler.is_compiling()
    plain = backend is None and not compiling and input.is_cpu and not _backends.overridden() and not is_sharded(input)
    # Where a gradient may be asked for, PyTorch's own op may be the faster one: see _vendor_is_faster.
    ours = not torch.is_grad_enabled() or not (input.dtype == torch.bfloat16 or (single and GATES[cell] == 1))
    if plain and ours and _cpu_settled and input.dim() == (2 if single else 3):
        # The kernel's own checks come first here, and cost nothing; only when they object is the long message put together.
        try:
            cast = _autocast(tensors) if torch.is_autocast_enabled("cpu") else tensors
            results = _call("default", cell, *cast, lengths, batch_first, reverse)
            if results[0].is_cpu:
                return results
        except (RuntimeError, AttributeError):
            check(op, cell, *tensors, batch_first, lengths, single)
            raise
    check(op, cell, *tensors, batch_first, lengths, single)
    tensors = _autocast(tensors)
    facts = facts_of(cell, *tensors, batch_first, reverse, lengths)
    name = choose(op, facts, backend)
    if name == "eager":
        return reference_layer(cell, *tensors, lengths, batch_first, reverse)
    if name == "vendor":
        return _vendor(cell, *tensors, batch_first)
    if lengths is not None and not input.is_cpu:
        lengths = lengths.to(input.device)
    return _call("triton" if name == "triton" else "default", cell, *tensors, lengths, batch_first, reverse)


def _call(overload, cell, *args):
    results = FORWARD[overload, needs_grad(args)](cell, *args)
    return results[0], results[1], results[2] if cell == Cell.lstm else None


def _autocast(tensors: _Tensors) -> _Tensors:
    """Under autocast every tensor in its dtype, float64 excepted, as torch casts the arguments of its own RNNs."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)  # type: ignore[return-value]


def needs_grad(values) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in values)


def facts_of(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse, lengths) -> Facts:
    if input.dim() == 2:
        T, B = 1, input.shape[0]
    else:
        T, B = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    return Facts(
        cell, input.device.type, input.dtype, T, B, input.shape[-1], weight_hh.shape[1], input.dim() == 2, reverse, lengths is not None,
        needs_grad((input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)), torch.compiler.is_compiling(),
        is_sharded(input),
    )  # fmt: skip


def choose(op: str, facts: Facts, backend: str | None) -> str:
    global _cpu_settled
    wish = _backends.requested(backend)
    name = _backends.select(op, wish, order(facts), lambda name: unsupported(facts, name))
    if not facts.compiling:
        _backends.log_choice(op, facts.device, name)
        _cpu_settled = _cpu_settled or (wish == "auto" and name == "cpu")
    return name


# ------------------------------------------------------------------------------------------------------------------ checking


def check(op, cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, lengths, single) -> None:
    """Raises TypeError or ValueError with the argument's name, what it got and what it needs."""
    named = dict(weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, h0=h0, c0=c0)
    optional = ("bias_ih", "bias_hh", "h0", "c0")
    for name, t in named.items():
        if not isinstance(t, Tensor) and not (t is None and name in optional):
            raise TypeError(f"{op}: {name}: expected a Tensor{' or None' if name in optional else ''}, got {type(t).__name__}")
    layout = "[B, I]" if single else "[B, T, I]" if batch_first else "[T, B, I]"
    if input.dim() != (2 if single else 3):
        raise ValueError(f"{op}: input: expected {layout}, got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise ValueError(f"{op}: input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    G = GATES[cell]
    if weight_hh.dim() != 2 or weight_hh.shape[0] != G * weight_hh.shape[1] or weight_hh.shape[1] == 0:
        raise ValueError(f"{op}: weight_hh: expected [{f'{G}*H' if G > 1 else 'H'}, H] with H > 0, got shape {tuple(weight_hh.shape)}")
    H, I, B = weight_hh.shape[1], input.shape[-1], input.shape[0 if single or batch_first else 1]
    shapes = dict(weight_ih=(G * H, I), weight_hh=(G * H, H), bias_ih=(G * H,), bias_hh=(G * H,), h0=(B, H), c0=(B, H))
    autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    for name, t in named.items():
        if t is None:
            continue
        if tuple(t.shape) != shapes[name]:
            raise ValueError(
                f"{op}: {name}: expected shape {shapes[name]} for input {tuple(input.shape)} = {layout} and hidden size {H}, "
                f"got {tuple(t.shape)}"
            )
        if t.dtype != input.dtype and not (autocast and t.is_floating_point()):
            raise ValueError(f"{op}: {name}: expected input's dtype {input.dtype}, got {t.dtype}")
        if t.device != input.device:
            raise ValueError(f"{op}: {name}: expected input's device {input.device}, got {t.device}")
    if lengths is not None:
        _check_lengths(op, input, lengths, B, input.shape[1 if batch_first else 0])


def _check_lengths(op, input, lengths, B, T) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{op}: lengths: expected a Tensor or None, got {type(lengths).__name__}")
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (B,):
        raise ValueError(f"{op}: lengths: expected int64 of shape ({B},), got {lengths.dtype} of shape {tuple(lengths.shape)}")
    if lengths.device.type != "cpu" and lengths.device != input.device:
        raise ValueError(f"{op}: lengths: expected a tensor on the CPU or on input's device {input.device}, got {lengths.device}")
    if (
        lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not is_sharded(lengths)
    ):  # elsewhere kernels clamp: looking would synchronise
        outside = lengths[(lengths < 0) | (lengths > T)]
        if outside.numel():
            raise ValueError(f"{op}: lengths: expected values in 0..{T}, got {int(outside[0])}")


def explainable(public, facts) -> None:
    """Lets `pyops.explain` tell what `public` would run on; `facts(*args, **kwargs)` gives its facts and its backend argument."""

    def explain(*args, **kwargs) -> _backends.Explanation:
        found, backend = facts(*args, **kwargs)
        return _backends.build_explanation(
            public.__name__, str(found), _backends.requested(backend), order(found), lambda name: unsupported(found, name)
        )

    _backends.EXPLAINERS[public.__name__] = explain
