"""Gated recurrent unit: `fused_gru` over a sequence, `gru_cell` for one step."""

from __future__ import annotations

from torch import Tensor

from pyops.ops import _rnn
from pyops.ops._rnn import Cell


def fused_gru(
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
    reset_after: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One GRU layer in one direction, with torch.nn.GRU's formulas and gate order (r, z, n).

    .. math::
        r, z = \sigma(W_{i\cdot} x_t + b_{i\cdot} + W_{h\cdot} h_{t-1} + b_{h\cdot}),\quad
        n = \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})),\quad h_t = (1 - z) \odot n + z \odot h_{t-1}

    With ``reset_after=False`` the original form, :math:`n = \tanh(W_{in} x_t + b_{in} + W_{hn} (r \odot h_{t-1}) + b_{hn})`.

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``; float32, bfloat16, float16 or float64 (not on
            "cuda" and "triton"). T, B and I may be 0.
        hx: ``[B, H]``; None means zeros.
        weight_ih: ``[3*H, I]``.
        weight_hh: ``[3*H, H]``.
        bias_ih: ``[3*H]`` or None.
        bias_hh: ``[3*H]`` or None.
        batch_first: whether input and output are ``[B, T, ...]``.
        reverse: run from the last step to the first; output stays in input's order.
        lengths: int64 ``[B]`` in 0..T, on the CPU or on input's device: row b has ``lengths[b]`` steps; see `fused_lstm`.
        reset_after: whether the reset gate acts after (torch, cuDNN, Keras' default) or before the hidden product.
        backend: "cpu", "cuda", "triton", "vendor" or "eager"; None lets pyops choose.

    Returns:
        ``(output, h_n)``: output ``[T, B, H]`` (``[B, T, H]`` with ``batch_first``), h_n ``[B, H]``, in input's dtype.
        States and gates are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.

    Source: Cho et al., 2014 (arXiv 1406.1078: v3 is ``reset_after=False``, v1 is ``reset_after=True``). Twice differentiable.
    """
    cell = Cell.gru if reset_after else Cell.gru_reset_before
    output, h_n, _ = _rnn.run(
        "fused_gru", cell, input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, batch_first, reverse, lengths, backend
    )
    return output, h_n


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    backend: str | None = None,
) -> Tensor:
    """One step of `fused_gru`: input ``[B, I]``, hx ``[B, H]`` or None for zeros -> ``h'`` of ``[B, H]``.

    Weights, biases, dtypes, backends and errors as for `fused_gru`.
    """
    cell = Cell.gru if reset_after else Cell.gru_reset_before
    return _rnn.run("gru_cell", cell, input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, False, False, None, backend, True)[1]


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
    reset_after=True,
    backend=None,
):
    cell = Cell.gru if reset_after else Cell.gru_reset_before
    tensors = (input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh)
    return _rnn.facts_of(cell, *tensors, batch_first, reverse, lengths), backend


_rnn.explainable(fused_gru, _facts)
_rnn.explainable(gru_cell, _facts)
