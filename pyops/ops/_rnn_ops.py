"""The torch ops of the recurrent family: schemas, fakes, gradients, and who computes them.

All take `cell` (see `Cell`); input is [T, B, I], [B, T, I] with batch_first, or [B, I] for one step:
    pyops::rnn_infer     forward that keeps nothing; not differentiable
    pyops::rnn_fwd       forward that keeps `reserve` for backward
    pyops::rnn_bwd       all gradients
    pyops::rnn_scan_*    the recurrence alone, on a GPU; `layer_forward` and `layer_backward` add the dense GEMMs
"""

from __future__ import annotations

import torch

from pyops import _library
from pyops.ops._rnn_reference import (
    CELL_NAMES,
    GATES,
    SAVED,
    Cell,
    layer_backward,
    layer_forward,
    reference_layer,
    reference_scan_backward,
    reference_scan_forward,
)

_LAYER = (
    "int cell, Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? lengths, bool batch_first, bool reverse"
)


def _fake_layer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse):
    for t in (h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        if t is not None and t.device != input.device:
            raise RuntimeError(f"expected every tensor on input's device {input.device}, got one on {t.device}")
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
    ctx.flags = (cell, batch_first, reverse)


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
        results = reference_layer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse)
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

    return recurrent.scan_forward(CELL_NAMES[cell], *args)


def _triton_backward(cell, *args):
    from pyops.triton_kernels import recurrent

    return recurrent.scan_backward(CELL_NAMES[cell], *args)


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
