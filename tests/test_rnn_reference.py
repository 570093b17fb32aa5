"""The kernels' contract in plain PyTorch: a layer composed of a scan and GEMMs equals autograd through the step-by-step reference."""

import pytest
import torch

from pyops.ops import _rnn_reference as R
from pyops.testing import SPECS

from .conftest import cotangents, double, leaves, with_grad

PUBLIC = ("fused_lstm", "fused_gru", "fused_gru", "fused_rnn", "fused_rnn", "fused_rnn")
IDS = (
    *("plain", "no_state", "no_bias", "reverse", "batch_first", "lengths", "lengths_reverse", "lengths_batch_first"),
    *("one_step", "no_steps"),
)


@pytest.mark.parametrize("sample_id", IDS)
@pytest.mark.parametrize("cell", range(6), ids=R.CELL_NAMES)
def test_composition_equals_autograd(cell, sample_id):
    (sample,) = (s for s in SPECS[PUBLIC[cell]].samples if s.id == sample_id)
    args, kwargs = sample.make(torch.float64, "cpu")
    x, hx, *weights = with_grad(double(args))
    h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
    options = (kwargs.get("lengths"), kwargs.get("batch_first", False), kwargs.get("reverse", False))
    expected = [y for y in R.reference_layer(cell, x, h0, c0, *weights, *options) if y is not None]
    grads = cotangents(expected)
    wanted = leaves((x, h0, c0, *weights))
    truth = torch.autograd.grad(expected, wanted, grads, allow_unused=True)

    with torch.no_grad():
        output, h_n, c_n, reserve = R.layer_forward(R.reference_scan_forward, cell, x, h0, c0, *weights, *options, save=True)
        for a, b in zip([output, h_n, c_n], expected, strict=False):
            torch.testing.assert_close(a, b)
        grad_c = grads[2] if cell == R.Cell.lstm else None
        found = R.layer_backward(
            R.reference_scan_backward, cell, grads[0], grads[1], grad_c, x, h0, c0, weights[0], weights[1], output, reserve, options[0],
            weights[2] is not None, options[1], options[2], True, True,
        )  # fmt: skip
    dx, dh0, dc0, d_ih, d_hh, d_bias_ih, d_bias_hh = found
    ordered = [dx, dh0, dc0, d_ih, d_hh, d_bias_ih, d_bias_hh if R.GATES[cell] == 3 else d_bias_ih]
    present = [g for g, t in zip(ordered, (x, h0, c0, *weights), strict=True) if t is not None]
    for a, b in zip(present, truth, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
