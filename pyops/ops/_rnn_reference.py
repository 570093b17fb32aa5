"""The recurrent family in plain PyTorch: what every kernel computes, step by step, forward and backward.

`scan_forward` is traceable and differentiable and is the eager backend; `scan_backward` is the contract of the backward kernels.
Both are time-major: T steps, B rows, H hidden units, G gates per unit; `gates_x` [T, B, G*H] is x W_ih^T + b_ih.
The composition of a whole layer out of a scan and dense GEMMs (`layer_forward`, `layer_backward`) is what the GPU backends run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Cell:
    """csrc/rnn/rnn.h's Cell, which also gives the formulas. Plain integers: older Dynamos trace no enum as an index."""

    lstm, gru, gru_reset_before, rnn_tanh, rnn_relu, rnn_sigmoid = range(6)


CELL_NAMES = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu", "rnn_sigmoid")
GATES = (4, 3, 3, 1, 1, 1)  # per hidden unit, indexed by Cell
SAVED = (5, 4, 4, 0, 0, 0)  # values kept per hidden unit for backward
ACTIVATIONS = {Cell.rnn_tanh: torch.tanh, Cell.rnn_relu: torch.relu, Cell.rnn_sigmoid: torch.sigmoid}


def step(cell: int, gates_x: Tensor, h: Tensor, c: Tensor | None, weight_hh: Tensor, bias_hh: Tensor | None):
    """One time step: gates_x [B, G*H], h and c [B, H] -> (h, c, what backward needs: a tuple of [B, H])."""
    if cell == Cell.lstm:
        assert c is not None
        i, f, g, o = (gates_x + F.linear(h, weight_hh, bias_hh)).chunk(4, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        return o * torch.tanh(c), c, (i, f, g, o, c)
    if cell == Cell.gru:
        xr, xz, xn = gates_x.chunk(3, 1)
        hr, hz, hn = F.linear(h, weight_hh, bias_hh).chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return n + z * (h - n), None, (r, z, n, hn)
    if cell == Cell.gru_reset_before:
        H = h.shape[1]
        xr, xz, xn = gates_x.chunk(3, 1)
        hr, hz = F.linear(h, weight_hh[: 2 * H], None if bias_hh is None else bias_hh[: 2 * H]).chunk(2, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        rh = r * h
        n = torch.tanh(xn + F.linear(rh, weight_hh[2 * H :], None if bias_hh is None else bias_hh[2 * H :]))
        return n + z * (h - n), None, (r, z, n, rh)
    return ACTIVATIONS[cell](gates_x + F.linear(h, weight_hh, bias_hh)), None, ()


def scan_forward(cell: int, gates_x, h0, c0, weight_hh, bias_hh, lengths, reverse: bool, save: bool):
    """(output [T, B, H], h_n, c_n or None, reserve [T, B, S, H] in the compute type, or None)."""
    T, B, _ = gates_x.shape
    H = weight_hh.shape[1]
    h = gates_x.new_zeros(B, H) if h0 is None else h0
    c = None if cell != Cell.lstm else gates_x.new_zeros(B, H) if c0 is None else c0
    outputs: list[Tensor] = []
    kept: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        new_h, new_c, saved = step(cell, gates_x[t], h, c, weight_hh, bias_hh)
        if lengths is None:
            h, c = new_h, new_c
            outputs.append(h)
        else:  # a row takes no part beyond its length, so a reversed one starts at its own end
            active = (t < lengths).to(gates_x.device).unsqueeze(1)
            h = torch.where(active, new_h, h)
            c = None if c is None else torch.where(active, new_c, c)
            outputs.append(torch.where(active, h, 0.0))
            saved = tuple(torch.where(active, value, 0.0) for value in saved)
        if save and saved:
            kept.append(torch.stack(saved, 1))
    if reverse:
        outputs.reverse()
        kept.reverse()
    output = torch.stack(outputs) if outputs else gates_x[..., :H]
    reserve = None
    if save:
        compute = torch.promote_types(gates_x.dtype, torch.float32)
        nothing = (T, B, SAVED[cell], H) if SAVED[cell] else (0,)
        reserve = torch.stack(kept).to(compute) if kept else gates_x.new_empty(nothing, dtype=compute)
    return output, h, c, reserve


def reference_layer(cell, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse):
    """The eager backend: plain PyTorch, differentiable any number of times."""
    single = input.dim() == 2
    x = input.unsqueeze(0) if single else input.transpose(0, 1) if batch_first else input
    gates_x = F.linear(x, weight_ih, bias_ih)
    output, h_n, c_n, _ = scan_forward(cell, gates_x, h0, c0, weight_hh, bias_hh, lengths, reverse, False)
    output = output.squeeze(0) if single else output.transpose(0, 1) if batch_first else output
    return output, h_n, c_n


def scan_backward(cell: int, grad_output, grad_h_n, grad_c_n, output, h0, c0, weight_hh, reserve, lengths, reverse: bool):
    """(grad_gates_x [T, B, G*H], grad_gates_h or None, grad_h0, grad_c0 or None).

    grad_gates_h, [T, B, H], is reset-after gru's gradient of h W_hn^T + b_hn; every other gate's equals grad_gates_x.
    """
    T, B, H = output.shape
    compute = torch.promote_types(output.dtype, torch.float32)
    weight = weight_hh.to(compute)
    previous = previous_states(output, h0, lengths, reverse).to(compute)
    dh = output.new_zeros(B, H, dtype=compute) if grad_h_n is None else grad_h_n.to(compute)
    dc = output.new_zeros(B, H, dtype=compute) if grad_c_n is None else grad_c_n.to(compute)
    grads_x, grads_h = [], []
    for t in range(T) if reverse else reversed(range(T)):
        active = None if lengths is None else (t < lengths).to(output.device).unsqueeze(1)
        d = dh if grad_output is None else dh + grad_output[t].to(compute)
        h = previous[t]
        dcn = dc
        if cell == Cell.lstm:
            i, f, g, o, c = reserve[t].unbind(1)
            before = t + 1 if reverse else t - 1
            c_before = reserve[before, :, 4] if 0 <= before < T else torch.zeros_like(c)
            first = torch.full((B, 1), not 0 <= before < T, device=c.device)
            if lengths is not None and reverse:
                first = (t == lengths - 1).to(c.device).unsqueeze(1)
            c_before = torch.where(first, torch.zeros_like(c) if c0 is None else c0.to(compute), c_before)
            tanh_c = torch.tanh(c)
            dct = dc + d * o * (1 - tanh_c * tanh_c)
            di, df, dg, do = dct * g * i * (1 - i), dct * c_before * f * (1 - f), dct * i * (1 - g * g), d * tanh_c * o * (1 - o)
            dx, dcn = torch.cat([di, df, dg, do], 1), dct * f
            dhn = dx @ weight
        elif cell == Cell.gru:
            r, z, n, hn = reserve[t].unbind(1)
            dn = d * (1 - z) * (1 - n * n)
            dz, dr = d * (h - n) * z * (1 - z), dn * hn * r * (1 - r)
            dx = torch.cat([dr, dz, dn], 1)
            dhn = d * z + torch.cat([dr, dz, dn * r], 1) @ weight
            grads_h.append(dn * r if active is None else torch.where(active, dn * r, 0.0))
        elif cell == Cell.gru_reset_before:
            r, z, n, _ = reserve[t].unbind(1)
            dn = d * (1 - z) * (1 - n * n)
            drh = dn @ weight[2 * H :]
            dz, dr = d * (h - n) * z * (1 - z), drh * h * r * (1 - r)
            dx = torch.cat([dr, dz, dn], 1)
            dhn = d * z + drh * r + dx[:, : 2 * H] @ weight[: 2 * H]
        else:
            y = output[t].to(compute)
            slope = 1 - y * y if cell == Cell.rnn_tanh else (y > 0).to(compute) if cell == Cell.rnn_relu else y * (1 - y)
            dx = d * slope
            dhn = dx @ weight
        if active is None:
            dh, dc = dhn, dcn
        else:
            dx, dh, dc = torch.where(active, dx, 0.0), torch.where(active, dhn, dh), torch.where(active, dcn, dc)
        grads_x.append(dx)
    if not reverse:
        grads_x.reverse()
        grads_h.reverse()
    dtype = output.dtype
    grad_gates_x = torch.stack(grads_x).to(dtype) if grads_x else output.new_empty(0, B, GATES[cell] * H)
    grad_gates_h = None if cell != Cell.gru else torch.stack(grads_h).to(dtype) if grads_h else output.new_empty(0, B, H)
    return grad_gates_x, grad_gates_h, dh.to(dtype), dc.to(dtype) if cell == Cell.lstm else None


def previous_states(output: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor:
    """h before each step, [T, B, H], from the outputs: h0 at a row's first step, its neighbour's output elsewhere."""
    T, B, H = output.shape
    start = output.new_zeros(B, H) if h0 is None else h0
    if T == 0:
        return output
    if not reverse:
        return torch.cat([start.unsqueeze(0), output[:-1]])
    shifted = torch.cat([output[1:], start.unsqueeze(0)])
    if lengths is None:
        return shifted
    steps = torch.arange(T, device=output.device).unsqueeze(1)
    return torch.where((steps == lengths.to(output.device) - 1).unsqueeze(2), start, shifted)


def layer_forward(scan: Callable, cell: int, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, batch_first, reverse, *, save):
    """A layer from one dense GEMM and `scan(cell, gates_x, h0, c0, weight_hh, bias_hh, lengths, batch_first, reverse, save)`."""
    single = input.dim() == 2
    gates_x = F.linear(input, weight_ih, bias_ih)
    output, h_n, c_n, reserve = scan(
        cell, gates_x.unsqueeze(0) if single else gates_x, h0, c0, weight_hh, bias_hh, lengths, batch_first and not single, reverse, save
    )
    nothing = input.new_empty(0)
    if save and reserve is None:
        reserve = input.new_empty(0, dtype=torch.promote_types(input.dtype, torch.float32))
    return output.squeeze(0) if single else output, h_n, nothing if c_n is None else c_n, reserve


def layer_backward(
    scan: Callable, cell: int, grad_output, grad_h_n, grad_c_n, input, h0, c0, weight_ih, weight_hh, output, reserve, lengths,
    has_bias: bool, batch_first: bool, reverse: bool, needs_input: bool, needs_weights: bool,
):  # fmt: skip
    """The gradients of `layer_forward`, in `pyops::rnn_bwd`'s order, from a backward scan and dense GEMMs."""
    if input.dim() == 2:
        grad_output = None if grad_output is None else grad_output.unsqueeze(0)
        input, output, batch_first, single = input.unsqueeze(0), output.unsqueeze(0), False, True
    else:
        single = False
    dx, dhn, grad_h0, grad_c0 = scan(
        cell, grad_output, grad_h_n, grad_c_n, output, h0, c0, weight_hh, reserve, lengths, batch_first, reverse
    )
    H, nothing = weight_hh.shape[1], input.new_empty(0)
    grad_input = dx @ weight_ih if needs_input else nothing
    grad_weight_ih = grad_weight_hh = grad_bias_ih = grad_bias_hh = nothing
    if needs_weights:
        time_major = output.transpose(0, 1) if batch_first else output
        h = previous_states(time_major, h0, lengths, reverse).reshape(-1, H)
        x = (input.transpose(0, 1) if batch_first else input).flatten(0, 1)
        d = (dx.transpose(0, 1) if batch_first else dx).reshape(-1, GATES[cell] * H)
        grad_weight_ih = d.t() @ x
        if cell == Cell.gru:
            last, other = dhn.reshape(-1, H), h
        elif cell == Cell.gru_reset_before:
            last, other = d[:, 2 * H :], reserve[:, :, 3].reshape(-1, H).to(d.dtype)
        grad_weight_hh = torch.cat([d[:, : 2 * H].t() @ h, last.t() @ other]) if GATES[cell] == 3 else d.t() @ h
        if has_bias:
            grad_bias_ih = d.sum(0)
            if GATES[cell] == 3:
                grad_bias_hh = torch.cat([grad_bias_ih[: 2 * H], last.sum(0)])
    grad_h0 = nothing if h0 is None else grad_h0
    grad_c0 = nothing if c0 is None else grad_c0
    return (
        grad_input.squeeze(0) if single and needs_input else grad_input,
        grad_h0,
        grad_c0,
        grad_weight_ih,
        grad_weight_hh,
        grad_bias_ih,
        grad_bias_hh,
    )


def reference_scan_forward(cell, gates_x, h0, c0, weight_hh, bias_hh, lengths, batch_first, reverse, save):
    """`scan_forward` with the kernels' signature: batch_first applies to gates_x and output."""
    time_major = gates_x.transpose(0, 1) if batch_first else gates_x
    output, h_n, c_n, reserve = scan_forward(cell, time_major, h0, c0, weight_hh, bias_hh, lengths, reverse, save)
    return output.transpose(0, 1).contiguous() if batch_first else output, h_n.clone(), None if c_n is None else c_n.clone(), reserve


def reference_scan_backward(cell, grad_output, grad_h_n, grad_c_n, output, h0, c0, weight_hh, reserve, lengths, batch_first, reverse):
    """`scan_backward` with the kernels' signature: batch_first applies to grad_output, output and grad_gates_x."""
    if batch_first:
        grad_output = None if grad_output is None else grad_output.transpose(0, 1)
        output = output.transpose(0, 1)
    dx, dhn, dh0, dc0 = scan_backward(cell, grad_output, grad_h_n, grad_c_n, output, h0, c0, weight_hh, reserve, lengths, reverse)
    return dx.transpose(0, 1).contiguous() if batch_first else dx, dhn, dh0, dc0
