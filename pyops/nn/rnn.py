"""LSTM, GRU, RNN and their cells: subclasses of torch's with the same parameters, on pyops' kernels.

A sequence module walks its layers and directions here, in Python, and each runs as one op; there is no Python per time step.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyops import _backends
from pyops.ops import _rnn
from pyops.ops._rnn import Cell
from pyops.ops.gru import gru_cell
from pyops.ops.lstm import lstm_cell
from pyops.ops.rnn import CELLS, rnn_cell


class _Sequence(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share. `_cell` says which recurrence, `backend` who computes it."""

    backend: str | None = None

    def _cell(self) -> int:
        raise NotImplementedError

    def _vendor_takes_all(self, device: str) -> bool:
        """Whether torch's own module runs the whole stack: it was asked for, or it is auto's choice for a plain call."""
        if self.proj_size:  # no kernel of ours projects
            return True
        wish = _backends.requested(self.backend)
        choice = wish if wish != "auto" else _rnn.ORDER.get(device, ("vendor",))[0]
        return choice == "vendor" and self._cell() in _rnn.VENDOR and not torch.compiler.is_compiling()

    def forward(self, input, hx=None, lengths: Tensor | None = None):
        """As torch's; `lengths` (int64, one per row, 0 to T) gives a padded tensor the meaning of a packed one: output is zero beyond."""
        packed = isinstance(input, PackedSequence)
        if (packed or self.proj_size or (input.is_cuda and lengths is None)) and self._vendor_takes_all(
            (input.data if packed else input).device.type
        ):
            if self.backend not in (None, "auto", "vendor"):
                raise ValueError(f"{type(self).__name__}: backend {self.backend!r} has no proj_size; only PyTorch's own op projects")
            if lengths is not None:
                raise ValueError(f"{type(self).__name__}: lengths: not with proj_size; pack the sequence instead")
            with warnings.catch_warnings():  # of weights that are not one chunk of memory: no user was ever helped by it
                warnings.simplefilter("ignore", UserWarning)
                return super().forward(input, hx)
        if packed:
            return self._forward_packed(input, hx)
        name, is_lstm = type(self).__name__, self.mode == "LSTM"
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D instead")
        batch_first = self.batch_first
        if dim == 2:
            input = input.unsqueeze(0 if batch_first else 1)
            hx = self._batched_state(hx, is_lstm)
        self.check_input(input, None)
        if hx is not None:
            self._check_state(input, hx, dim == 3)
        if input.shape[1 if batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n, c_n = self._layers(input, hx, lengths, batch_first)
        if dim == 2:
            output, h_n = output.squeeze(0 if batch_first else 1), h_n.squeeze(1)
            c_n = c_n.squeeze(1) if is_lstm else None
        return output, (h_n, c_n) if is_lstm else h_n

    def _batched_state(self, hx, is_lstm: bool):
        if hx is None:
            return None
        if is_lstm:
            if hx[0].dim() != 2 or hx[1].dim() != 2:
                raise RuntimeError(
                    f"For unbatched 2-D input, hx and cx should also be 2-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            return hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        if hx.dim() != 2:
            raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
        return hx.unsqueeze(1)

    def _check_state(self, input, hx, batched: bool) -> None:
        if batched and self.mode == "LSTM" and (hx[0].dim() != 3 or hx[1].dim() != 3):
            raise RuntimeError(f"For batched 3-D input, hx and cx should also be 3-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors")
        if batched and self.mode != "LSTM" and hx.dim() != 3:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        self.check_forward_args(input, hx, None)

    def _forward_packed(self, packed: PackedSequence, hx):
        """Pads, runs with lengths, packs again: the recurrence still costs what the real tokens cost."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_input(data, batch_sizes)
        if hx is not None:
            self.check_forward_args(data, hx, batch_sizes)
        padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, len(batch_sizes))
        output, h_n, c_n = self._layers(padded, hx, lengths, False)
        output, _ = torch._VF._pack_padded_sequence(output, lengths, False)
        hidden: Any = (h_n, c_n) if self.mode == "LSTM" else h_n
        states = self.permute_hidden(hidden, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states

    def _layers(self, x, hx, lengths, batch_first: bool):
        """(output, h_n [L*D, B, H], c_n or None) of the whole stack."""
        name, own, weights = type(self).__name__, self._parameters, self._flat_weights
        for key, weight in zip(self._flat_weights_names, weights):  # noqa: B905  (as long by construction, and a check costs)
            if own.get(key) is not weight:  # replaced behind torch's list: parametrisation, functional_call, pruning
                weights = [getattr(self, key) for key in self._flat_weights_names]
                break
        directions, each, cell = 2 if self.bidirectional else 1, 4 if self.bias else 2, self._cell()
        h0, c0 = hx if self.mode == "LSTM" and hx is not None else (hx, None)
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                at = k * each
                b_ih, b_hh = (weights[at + 2], weights[at + 3]) if each == 4 else (None, None)
                y, h, c = _rnn.run(
                    name, cell, x, None if h0 is None else h0[k], None if c0 is None else c0[k], weights[at], weights[at + 1], b_ih, b_hh,
                    batch_first, direction == 1, lengths, self.backend,
                )  # fmt: skip
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, True)
        single = len(h_n) == 1
        h = h_n[0].unsqueeze(0) if single else torch.stack(h_n)
        if self.mode != "LSTM":
            return x, h, None
        return x, h, c_n[0].unsqueeze(0) if single else torch.stack(c_n)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend!r}" if self.backend else "")


class LSTM(_Sequence, torch.nn.LSTM):
    """torch.nn.LSTM with the same arguments, parameters and results, plus ``backend`` ("cpu", "cuda", "triton", "vendor", "eager").

    ``forward(input, hx=None, lengths=None)`` also takes the rows' lengths of a padded batch. ``proj_size`` runs PyTorch's own op.
    Errors are torch's for torch's mistakes and ValueError for a backend that cannot run the call.
    """

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _cell(self) -> int:
        return Cell.lstm


class GRU(_Sequence, torch.nn.GRU):
    """torch.nn.GRU with the same arguments, parameters and results, plus ``backend`` and ``reset_after``.

    ``reset_after=False`` is the original GRU, whose reset gate acts on the state before the hidden product (see `pyops.fused_gru`).
    """

    reset_after: bool = True

    def __init__(self, *args, reset_after: bool = True, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after
        self.backend = backend

    def _cell(self) -> int:
        return Cell.gru if self.reset_after else Cell.gru_reset_before

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNN(_Sequence, torch.nn.RNN):
    """torch.nn.RNN with the same arguments, parameters and results, plus ``backend`` and ``nonlinearity="sigmoid"``."""

    def __init__(self, *args, backend: str | None = None, **kwargs):
        nonlinearity = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if nonlinearity == "sigmoid":  # torch's constructor knows it not: build as tanh, then say what it is
            args = (*args[:3], "tanh", *args[4:]) if len(args) > 3 else args
            kwargs = {**kwargs, "nonlinearity": "tanh"} if len(args) <= 3 else kwargs
        super().__init__(*args, **kwargs)
        self.nonlinearity = nonlinearity
        self.backend = backend

    def _cell(self) -> int:
        return CELLS[self.nonlinearity]


class _Cell(torch.nn.modules.rnn.RNNCellBase):
    """What the three cells share: torch's checks, one op call."""

    backend: str | None = None

    def _states(self, input: Tensor, *states: Tensor | None):
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, state in enumerate(states):
            if state is not None and state.dim() not in (1, 2):
                where = f"hx[{index}]" if len(states) == 2 else "hidden"
                raise ValueError(f"{name}: Expected {where} to be 1D or 2D, got {state.dim()}D instead")
        if input.dim() == 1:
            input, states = input.unsqueeze(0), tuple(None if state is None else state.unsqueeze(0) for state in states)
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        for index, state in enumerate(states):
            if state is None:
                continue
            if state.shape[0] != input.shape[0]:
                raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {state.shape[0]}")
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {self.hidden_size}")
        return input, *states

    def _weights(self):
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend!r}" if self.backend else "")


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell on `pyops.lstm_cell`, plus ``backend``."""

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        x, h, c = self._states(input, *(hx if hx is not None else (None, None)))
        h, c = lstm_cell(x, None if h is None else (h, c), *self._weights(), backend=self.backend)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell on `pyops.gru_cell`, plus ``backend`` and ``reset_after``."""

    reset_after: bool = True

    def __init__(self, *args, reset_after: bool = True, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        x, h = self._states(input, hx)
        h = gru_cell(x, h, *self._weights(), reset_after=self.reset_after, backend=self.backend)
        return h if input.dim() == 2 else h.squeeze(0)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell on `pyops.rnn_cell`, plus ``backend`` and ``nonlinearity="sigmoid"``."""

    def __init__(self, *args, backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in CELLS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        x, h = self._states(input, hx)
        h = rnn_cell(x, h, *self._weights(), nonlinearity=self.nonlinearity, backend=self.backend)
        return h if input.dim() == 2 else h.squeeze(0)
