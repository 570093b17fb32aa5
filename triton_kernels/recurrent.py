"""Launchers of the recurrent family: what runs on every cell, in the terms of csrc/rnn/rnn.h (ScanForward, ScanBackward)."""

import contextlib

import torch
from torch import Tensor

from .gru import gru_backward_kernel, gru_forward_kernel
from .lstm import lstm_backward_kernel, lstm_forward_kernel
from .recurrent_limits import GATES, SAVED, launch_config, supports
from .rnn import rnn_backward_kernel, rnn_forward_kernel

__all__ = ["scan_backward", "scan_forward", "supports"]


def scan_forward(
    cell: str,
    gates_x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the recurrence over gates_x = x W_ih^T + b_ih, [T, B, G*H] ([B, T, G*H] when batch_first); T and B at least 1.

    Returns output [T, B, H] (or [B, T, H]), h_n [B, H], c_n [B, H] (lstm, else None) and reserve [T, B, S, H] float32, always
    time-major (None when save is false or the cell keeps nothing). Steps beyond a row's length are zero in output and reserve.
    """
    B, T, H = _sizes(cell, gates_x, weight_hh, batch_first)
    gates_x = _rows(gates_x)
    fill = _fill(lengths)
    output = fill(*gates_x.shape[:2], H, dtype=gates_x.dtype, device=gates_x.device)
    h_n = torch.empty(B, H, dtype=gates_x.dtype, device=gates_x.device)
    c_n = torch.empty_like(h_n) if cell == "lstm" else None
    reserve = fill(T, B, SAVED[cell], H, dtype=torch.float32, device=gates_x.device) if save and SAVED[cell] else None

    tensors = (gates_x, _dense(h0), weight_hh.contiguous(), _dense(bias_hh), _dense(lengths), output, h_n)
    sizes = (*_strides(gates_x, batch_first), *_strides(output, batch_first), T, B)
    grid, config = launch_config(cell, gates_x.dtype, B, H)
    with _on(gates_x):
        if cell == "lstm":
            lstm_forward_kernel[grid](*tensors, reserve, *sizes, _dense(c0), c_n, REVERSE=reverse, **config)
        elif cell.startswith("gru"):
            before = cell == "gru_reset_before"
            gru_forward_kernel[grid](*tensors, reserve, *sizes, RESET_BEFORE=before, REVERSE=reverse, **config)
        else:
            rnn_forward_kernel[grid](*tensors, *sizes, ACTIVATION=cell[len("rnn_") :], REVERSE=reverse, **config)
    return output, h_n, c_n, reserve


def scan_backward(
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_hh: Tensor,
    reserve: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of scan_forward, from its output and reserve; an absent gradient is zero.

    Returns grad_gates_x, shaped as gates_x; grad_gates_h [T, B, H], time-major, the gradient of h W_hn^T + b_hn (gru, else None: the
    other gates' equal grad_gates_x); grad_h0 [B, H]; grad_c0 [B, H] (lstm, else None). Steps beyond a row's length are zero.
    """
    B, T, H = _sizes(cell, output, weight_hh, batch_first, gates=1)
    output = _rows(output)
    grad_output = None if grad_output is None else _rows(grad_output)
    fill = _fill(lengths)
    grad_gates_x = fill(*output.shape[:2], GATES[cell] * H, dtype=output.dtype, device=output.device)
    grad_gates_h = fill(T, B, H, dtype=output.dtype, device=output.device) if cell == "gru" else None
    grad_h0 = torch.empty(B, H, dtype=output.dtype, device=output.device)
    grad_c0 = torch.empty_like(grad_h0) if cell == "lstm" else None

    before = (grad_output, _dense(grad_h_n), weight_hh.contiguous(), _dense(lengths))
    g_strides = (0, 0) if grad_output is None else _strides(grad_output, batch_first)
    y_strides = _strides(output, batch_first)
    sizes = (*g_strides, *_strides(grad_gates_x, batch_first), T, B)
    grid, config = launch_config(cell, output.dtype, B, H)
    with _on(output):
        if cell == "lstm":
            states = (_dense(grad_c_n), _dense(c0), grad_c0)
            lstm_backward_kernel[grid](*before, reserve, grad_gates_x, grad_h0, *sizes, *states, REVERSE=reverse, **config)
        elif cell.startswith("gru"):
            extra = (output, _dense(h0), grad_gates_h, *y_strides, cell == "gru_reset_before")
            gru_backward_kernel[grid](*before, reserve, grad_gates_x, grad_h0, *sizes, *extra, REVERSE=reverse, **config)
        else:
            activation = cell[len("rnn_") :]
            rnn_backward_kernel[grid](*before, output, grad_gates_x, grad_h0, *sizes, *y_strides, activation, REVERSE=reverse, **config)
    return grad_gates_x, grad_gates_h, grad_h0, grad_c0


def _sizes(cell: str, sequence: Tensor, weight_hh: Tensor, batch_first: bool, gates: int | None = None) -> tuple[int, int, int]:
    """B, T, H, after refusing what the kernels cannot run."""
    H = weight_hh.shape[1]
    reason = supports(cell, sequence.dtype, H)
    if reason is not None:
        raise ValueError(f"the Triton backend cannot run this: {reason}")
    gates = GATES[cell] if gates is None else gates
    if sequence.dim() != 3 or sequence.shape[2] != gates * H or weight_hh.shape[0] != GATES[cell] * H:
        raise ValueError(
            f"{cell} with hidden size {H}: expected a sequence of width {gates * H} and weight_hh [{GATES[cell] * H}, {H}], "
            f"got {list(sequence.shape)} and {list(weight_hh.shape)}"
        )
    T, B = sequence.shape[:2]
    return (T, B, H) if batch_first else (B, T, H)


def _strides(sequence: Tensor, batch_first: bool) -> tuple[int, int]:
    """Strides of a step and of a row, in elements."""
    first, second = sequence.stride()[:2]
    return (second, first) if batch_first else (first, second)


def _rows(sequence: Tensor) -> Tensor:
    """The kernels walk steps and rows by strides, but read a row as one piece (an expanded gradient is not)."""
    return sequence if sequence.stride(2) == 1 else sequence.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _fill(lengths: Tensor | None):
    """The kernels write the steps a row takes part in; with lengths, the rest must already be zero."""
    return torch.empty if lengths is None else torch.zeros


def _on(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'. (CPU tensors: the interpreter.)"""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
