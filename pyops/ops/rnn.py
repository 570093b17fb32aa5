"""The simple (Elman) recurrence: `fused_rnn` over a sequence, `rnn_cell` for one step."""

from __future__ import annotations

from torch import Tensor

from pyops.ops import _rnn
from pyops.ops._rnn import Cell

CELLS = {"tanh": Cell.rnn_tanh, "relu": Cell.rnn_relu, "sigmoid": Cell.rnn_sigmoid}


def fused_rnn(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    batch_first: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One Elman layer in one direction: :math:`h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`.

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; float32, bfloat16, float16 or float64 (not on
            "cuda" and "triton"). T, B and I may be 0.
        hx: ``[B, H]``; None means zeros.
        weight_ih: ``[H, I]``.
        weight_hh: ``[H, H]``.
        bias_ih: ``[H]`` or None.
        bias_hh: ``[H]`` or None.
        batch_first: whether input and output are ``[B, T, ...]``.
        reverse: run from the last step to the first; output stays in input's order.
        lengths: int64 ``[B]`` in 0..T, on the CPU or on input's device: row b has ``lengths[b]`` steps; see `fused_lstm`.
        nonlinearity: "tanh" or "relu" as in torch.nn.RNN, or "sigmoid", the classic Elman cell.
        backend: "cpu", "cuda", "triton", "vendor" or "eager"; None lets pyops choose.

    Returns:
        ``(output, h_n)``: output ``[T, B, H]`` (``[B, T, H]`` with ``batch_first``), h_n ``[B, H]``, in input's dtype.
        States are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.

    Source: Elman, 1990. Twice differentiable.
    """
    output, h_n, _ = _rnn.run(
        "fused_rnn", cell_of(nonlinearity, "fused_rnn"), input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse,
        lengths, backend,
    )  # fmt: skip
    return output, h_n


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of `fused_rnn`: input ``[B, I]``, hx ``[B, H]`` or None for zeros -> ``h'`` of ``[B, H]``.

    Weights, biases, dtypes, backends and errors as for `fused_rnn`.
    """
    cell = cell_of(nonlinearity, "rnn_cell")
    return _rnn.run("rnn_cell", cell, input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, False, False, None, backend, True)[1]


def cell_of(nonlinearity: str, op: str) -> int:
    if nonlinearity not in CELLS:
        raise ValueError(f"{op}: nonlinearity: expected one of {', '.join(CELLS)}, got {nonlinearity!r}")
    return CELLS[nonlinearity]


def _facts(
    input,
    hx,
    weight_ih,
    weight_hh,
    bias_ih=None,
    bias_hh=None,
    *,
    batch_first=False,
    reverse=False,
    lengths=None,
    nonlinearity="tanh",
    backend=None,
):
    tensors = (input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh)
    return _rnn.facts_of(cell_of(nonlinearity, "explain"), *tensors, batch_first, reverse, lengths), backend


_rnn.explainable(fused_rnn, _facts)
_rnn.explainable(rnn_cell, _facts)
