"""Long short-term memory: `fused_lstm` over a sequence, `lstm_cell` for one step."""

from __future__ import annotations

from torch import Tensor

from pyops.ops import _rnn
from pyops.ops._rnn import Cell


def fused_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_first: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""One LSTM layer in one direction, with torch.nn.LSTM's formulas and gate order (i, f, g, o).

    .. math::
        i, f, o = \sigma(\cdot),\ g = \tanh(\cdot)\ \text{of}\ W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh},\quad
        c_t = f \odot c_{t-1} + i \odot g,\quad h_t = o \odot \tanh(c_t)

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; float32, bfloat16, float16 or float64 (not on
            "cuda" and "triton"). T, B and I may be 0.
        hx: ``(h_0, c_0)``, each ``[B, H]``; None means zeros.
        weight_ih: ``[4*H, I]``.
        weight_hh: ``[4*H, H]``.
        bias_ih: ``[4*H]`` or None.
        bias_hh: ``[4*H]`` or None.
        batch_first: whether input and output are ``[B, T, ...]``.
        reverse: run from the last step to the first; output stays in input's order.
        lengths: int64 ``[B]`` in 0..T, on the CPU or on input's device: row b has ``lengths[b]`` steps. Its output beyond is zero, its
            final state is that after its own last step, and ``reverse`` starts at its own end. Lengths on a GPU are clamped, not checked.
        backend: "cpu", "cuda", "triton", "vendor" or "eager"; None lets pyops choose.

    Returns:
        ``(output, (h_n, c_n))``: output ``[T, B, H]`` (``[B, T, H]`` with ``batch_first``), h_n and c_n ``[B, H]``, in input's dtype.
        States and gates are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.

    Source: Hochreiter and Schmidhuber, 1997; Gers et al., 2000 (forget gate). Twice differentiable.
    """
    h0, c0 = unpack(hx, "fused_lstm")
    output, h_n, c_n = _rnn.run(
        "fused_lstm", Cell.lstm, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse, lengths, backend
    )
    return output, (h_n, c_n)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `fused_lstm`: input ``[B, I]``, hx ``(h, c)`` of ``[B, H]`` or None for zeros -> ``(h', c')`` of ``[B, H]``.

    Weights, biases, dtypes, backends and errors as for `fused_lstm`.
    """
    h0, c0 = unpack(hx, "lstm_cell")
    _, h_n, c_n = _rnn.run("lstm_cell", Cell.lstm, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, False, False, None, backend, True)
    return h_n, c_n


def unpack(hx, op: str):
    if hx is None:
        return None, None
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        return hx
    raise TypeError(f"{op}: hx: expected a tuple (h_0, c_0) or None, got {type(hx).__name__}")


def _facts(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, batch_first=False, reverse=False, lengths=None, backend=None):
    h0, c0 = unpack(hx, "explain")
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    return _rnn.facts_of(Cell.lstm, *tensors, batch_first, reverse, lengths), backend


_rnn.explainable(fused_lstm, _facts)
_rnn.explainable(lstm_cell, _facts)
