"""The recurrent family's shared machinery: argument checks, the torch ops behind the public functions, and the choice of backend.

Ops (all take `cell`, see `Cell`; input is [T, B, I], [B, T, I] with batch_first, or [B, I] for one step):
    pyops::rnn_infer     forward that keeps nothing; not differentiable
    pyops::rnn_fwd       forward that keeps `reserve` for backward
    pyops::rnn_bwd       all gradients
    pyops::rnn_scan_*    the recurrence alone, on a GPU; `layer_forward` and `layer_backward` add the dense GEMMs
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pyops import _backends, _library
from pyops.ops._rnn_reference import (
    GATES,
    SAVED,
    Cell,
    layer_backward,
    layer_forward,
    reference_scan_backward,
    reference_scan_forward,
    scan_forward,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VENDOR: dict[int, Callable] = {Cell.lstm: torch.lstm, Cell.gru: torch.gru, Cell.rnn_tanh: torch.rnn_tanh, Cell.rnn_relu: torch.rnn_relu}
ORDER = {
    "cpu": ("cpu", "vendor", "eager"),
    # Nothing of ours has been measured on a GPU yet, so there the vendor's op comes first wherever it can run.
    "cuda": ("vendor", "cuda", "triton", "eager"),
}


# ------------------------------------------------------------------------------------------------------------ the torch ops

_LAYER = (
    "int cell, Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? lengths, bool batch_first, bool reverse"
)


def _fake_layer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse):
    H = weight_hh.shape[1]
    B = input.shape[0] if batch_first or input.dim() == 2 else input.shape[1]
    c_n = input.new_empty(B, H) if cell == Cell.lstm else input.new_empty(0)
    return input.new_empty(*input.shape[:-1], H), input.new_empty(B, H), c_n


def _fake_fwd(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse):
    output, h_n, c_n = _fake_layer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse)
    B, H = h_n.shape
    T = 1 if input.dim() == 2 else input.shape[1 if batch_first else 0]
    shape = (T, B, SAVED[cell], H) if SAVED[cell] else (0,)
    return output, h_n, c_n, input.new_empty(shape, dtype=torch.promote_types(input.dtype, torch.float32))


def _fake_bwd(
    cell, grad_output, grad_h_n, grad_c_n, input, h0, c0, weight_ih, weight_hh, output, reserve, lengths,
    has_bias, batch_first, reverse, needs_input, needs_weights,
):  # fmt: skip
    def like(t, wanted=True):
        return t.new_empty(t.shape) if wanted and t is not None else input.new_empty(0)

    biases = has_bias and needs_weights
    G = weight_ih.shape[0]
    return (
        like(input, needs_input), like(h0), like(c0), like(weight_ih, needs_weights), like(weight_hh, needs_weights),
        input.new_empty(G if biases else 0), input.new_empty(G if biases and GATES[cell] == 3 else 0),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse = inputs
    out, _, _, reserve = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, out, reserve)
    ctx.flags = (int(cell), batch_first, reverse)


def _backward_through(op):
    def backward(ctx, grad_output, grad_h_n, grad_c_n, _grad_reserve):
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, reserve = ctx.saved_tensors
        cell, batch_first, reverse = ctx.flags
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again, through the reference
            tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
            grads = _differentiable_gradients(cell, tensors, lengths, batch_first, reverse, (grad_output, grad_h_n, grad_c_n))
            return None, *grads, None, None, None
        needs = ctx.needs_input_grad
        has_bias = bias_ih is not None or bias_hh is not None
        d_input, d_h0, d_c0, d_ih, d_hh, d_bias_ih, d_bias_hh = op(
            cell, grad_output, grad_h_n, grad_c_n if cell == Cell.lstm else None, input, h0, c0, weight_ih, weight_hh, output, reserve,
            lengths, has_bias, batch_first, reverse, needs[1], any(needs[4:8]),
        )  # fmt: skip
        if GATES[cell] != 3:  # both biases enter the same sum
            d_bias_hh = d_bias_ih
        found = (d_input, d_h0, d_c0, d_ih, d_hh, d_bias_ih, d_bias_hh)
        return None, *(grad if need else None for grad, need in zip(found, needs[1:8], strict=True)), None, None, None

    return backward


def _differentiable_gradients(cell, tensors, lengths, batch_first, reverse, grads):
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh = tensors
    with torch.enable_grad():
        results = reference(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse)
        pairs = [(y, g) for y, g in zip(results, grads, strict=True) if y is not None and g is not None and y.requires_grad]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in tensors)


def _compose(forward_scan, backward_scan) -> dict:
    """The three ops out of a pair of scans and dense GEMMs."""
    return {
        "rnn_infer": lambda cell, *args: layer_forward(forward_scan, cell, *args, save=False)[:3],
        "rnn_fwd": lambda cell, *args: layer_forward(forward_scan, cell, *args, save=True),
        "rnn_bwd": lambda cell, *args: layer_backward(backward_scan, cell, *args),
    }


_reference = _compose(reference_scan_forward, reference_scan_backward)
_library.define(
    "rnn_infer",
    f"({_LAYER}) -> (Tensor output, Tensor h_n, Tensor c_n)",
    fake=_fake_layer,
    reference=_reference["rnn_infer"],
    overloads=("", "triton"),
)
_library.define(
    "rnn_bwd",
    "(int cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, "
    "Tensor weight_hh, Tensor output, Tensor reserve, Tensor? lengths, bool has_bias, bool batch_first, bool reverse, bool needs_input, "
    "bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference["rnn_bwd"],
    overloads=("", "triton"),
)
for _overload in ("default", "triton"):
    _library.define(
        "rnn_fwd",
        f"({_LAYER}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)",
        fake=_fake_fwd,
        reference=_reference["rnn_fwd"],
        setup_context=_setup_context,
        backward=_backward_through(getattr(torch.ops.pyops.rnn_bwd, _overload)),
        overloads=("" if _overload == "default" else _overload,),
    )


def _triton_forward(cell, *args):
    from pyops.triton_kernels import recurrent  # imports triton, so only at first use

    return recurrent.scan_forward(Cell(cell).name, *args)


def _triton_backward(cell, *args):
    from pyops.triton_kernels import recurrent

    return recurrent.scan_backward(Cell(cell).name, *args)


for _name, _function in _compose(_triton_forward, _triton_backward).items():
    _library.implement(f"{_name}.triton", _function, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1

if _library.has_cuda_kernels():
    _library.LIBRARY.define(
        "rnn_scan_fwd(int cell, Tensor gates_x, Tensor? h0, Tensor? c0, Tensor weight_hh, Tensor? bias_hh, Tensor? lengths, "
        "bool batch_first, bool reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _library.LIBRARY.define(
        "rnn_scan_bwd(int cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor? h0, Tensor? c0, "
        "Tensor weight_hh, Tensor reserve, Tensor? lengths, bool batch_first, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    for _name, _function in _compose(torch.ops.pyops.rnn_scan_fwd.default, torch.ops.pyops.rnn_scan_bwd.default).items():
        _library.implement(_name, _function, "CUDA")


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
    reverse: bool
    has_lengths: bool
    compiling: bool

    def __str__(self) -> str:
        name = Cell(self.cell).name
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
        return f"PyTorch has no op for {Cell(facts.cell).name}"
    if facts.has_lengths:
        return "PyTorch's op takes no lengths"
    if facts.reverse:
        return "PyTorch's op has no reversed single direction"
    if facts.T == 0 or facts.B == 0:
        return "PyTorch's op takes no empty sequence or batch"
    return "under torch.compile PyTorch's op is unrolled over time" if facts.compiling else None


def _triton_unsupported(facts: Facts) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if facts.device != "cuda" and not (facts.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1), these are on {facts.device}"
    from pyops.triton_kernels import recurrent_limits  # plain facts: imports neither triton nor the driver

    return recurrent_limits.supports(Cell(facts.cell).name, facts.dtype, facts.H)


def order(facts: Facts) -> tuple[str, ...]:
    return ORDER.get(facts.device, ("vendor", "eager"))


# ------------------------------------------------------------------------------------------------------------------- calling


def reference(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse):
    """The eager backend: plain PyTorch, differentiable any number of times."""
    single = input.dim() == 2
    x = input.unsqueeze(0) if single else input.transpose(0, 1) if batch_first else input
    gates_x = torch.nn.functional.linear(x, weight_ih, bias_ih)
    output, h_n, c_n, _ = scan_forward(cell, gates_x, h0, c0, weight_hh, bias_hh, lengths, reverse, False)
    output = output.squeeze(0) if single else output.transpose(0, 1) if batch_first else output
    return output, h_n, c_n


def _vendor(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, training):
    single = input.dim() == 2
    x = input.unsqueeze(0) if single else input
    B, H = x.shape[0 if batch_first and not single else 1], weight_hh.shape[1]
    h0, c0 = (x.new_zeros(1, B, H) if state is None else state.unsqueeze(0) for state in (h0, c0))
    weights = [weight_ih, weight_hh]
    if bias_ih is not None or bias_hh is not None:
        weights += [weight_ih.new_zeros(weight_ih.shape[0]) if bias is None else bias for bias in (bias_ih, bias_hh)]
    hx = (h0, c0) if cell == Cell.lstm else h0
    with warnings.catch_warnings():  # cuDNN would rather have the weights in one chunk; the user was never asked to flatten them
        if x.is_cuda:
            warnings.simplefilter("ignore", UserWarning)
        output, h_n, *c_n = VENDOR[cell](x, hx, weights, len(weights) == 4, 1, 0.0, training, False, batch_first and not single)
    return output.squeeze(0) if single else output, h_n.squeeze(0), c_n[0].squeeze(0) if c_n else None


_cpu_settled = False  # the compiled CPU kernels were chosen by themselves once: plain calls on CPU tensors need not ask again


def run(op, cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse, lengths, backend, single=False):
    """Checks, chooses and calls: (output, h_n, c_n or None) of one layer in one direction."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input: expected a Tensor, got {type(input).__name__}")
    device = input.device.type
    compiling = torch.compiler.is_compiling()
    fast = _cpu_settled and device == "cpu" and backend is None and not _backends.overridden() and not compiling
    if not fast:
        check(op, cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, lengths, single)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
        )
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    overload = "default"
    if not fast:
        name = choose(op, facts_of(cell, input, weight_hh, batch_first, reverse, lengths, compiling), backend)
        if name == "eager":
            return reference(int(cell), *tensors, lengths, batch_first, reverse)
        if name == "vendor":
            return _vendor(cell, *tensors, batch_first, needs_grad)
        if name == "triton":
            overload = "triton"
        if lengths is not None and device != "cpu":
            lengths = lengths.to(input.device)
    try:
        if needs_grad:
            results = getattr(torch.ops.pyops.rnn_fwd, overload)(int(cell), *tensors, lengths, batch_first, reverse)
        else:
            results = getattr(torch.ops.pyops.rnn_infer, overload)(int(cell), *tensors, lengths, batch_first, reverse)
    except (RuntimeError, AttributeError):
        if fast:  # the kernel's own checks are terse; these say which argument, what it is and what it should be
            check(op, cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, lengths, single)
        raise
    return results[0], results[1], results[2] if cell == Cell.lstm else None


def facts_of(cell, input, weight_hh, batch_first, reverse, lengths, compiling) -> Facts:
    if input.dim() == 2:
        T, B = 1, input.shape[0]
    else:
        T, B = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    return Facts(
        int(cell), input.device.type, input.dtype, T, B, input.shape[-1], weight_hh.shape[1], reverse, lengths is not None, compiling
    )


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
    autocast = torch.is_autocast_enabled(input.device.type)
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
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere kernels clamp: looking would synchronise
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
