"""Samples of the recurrent family: the three sequence ops and the three cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pyops.ops.gru import fused_gru, gru_cell
from pyops.ops.lstm import fused_lstm, lstm_cell
from pyops.ops.rnn import fused_rnn, rnn_cell
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register
from pyops.testing.samples import rnn_peers

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def tensors(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, device: str, seed: int = 0):
    """(input [T, B, I], hx, weight_ih, weight_hh, bias_ih, bias_hh), rounded to dtype from the same float64 values."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * T + 100 * B + 10 * I + H)
    G = GATES[cell]

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    k = H**-0.5
    x, h0, c0 = rand(T, B, I), rand(B, H, scale=0.5), rand(B, H)
    weights = rand(G * H, I, scale=max(I, 1) ** -0.5), rand(G * H, H, scale=k), rand(G * H, scale=k), rand(G * H, scale=k)
    return x, (h0, c0) if cell == "lstm" else h0, *weights


def sequence(cell: str, T, B, I, H, dtype, device, seed: int = 0, change: Callable | None = None, **options):
    """Arguments of a sequence op; `change(arguments)` edits the positional ones in place."""
    args = list(tensors(cell, T, B, I, H, dtype, device, seed))
    if options.get("batch_first"):
        args[0] = args[0].transpose(0, 1).contiguous()
    if change is not None:
        change(args)
    if isinstance(options.get("lengths"), tuple):
        options["lengths"] = torch.tensor(options["lengths"])
    return tuple(args), dict(options)


def _drop(*positions: int):
    def change(args):
        for position in positions:
            args[position] = None

    return change


def _strided(args):  # every other feature of a wider tensor, transposed weights: nothing is contiguous
    args[0] = args[0].repeat_interleave(2, 2)[..., ::2]
    args[2], args[3] = args[2].t().contiguous().t(), args[3].t().contiguous().t()


def _expanded(args):  # one row of input for the whole batch, one bias for all gates
    args[0] = args[0][:, :1].expand_as(args[0])
    args[4] = args[4][:1].expand_as(args[4])


def samples(cell: str, options: dict) -> tuple[Sample, ...]:
    def sample(id, T, B, I, H, change=None, bench=False, test=True, **more):
        def make(dtype, device, seed=0):
            return sequence(cell, T, B, I, H, dtype, device, seed, change, **options, **more)

        return Sample(id, make, bench, test)

    return (
        sample("plain", 5, 3, 7, 20),
        sample("aligned", 4, 8, 16, 32),
        sample("odd", 3, 19, 5, 65),
        sample("wide", 6, 2, 40, 130),
        sample("long", 70, 2, 3, 9),
        sample("one_step", 1, 4, 6, 24),
        sample("one_row", 6, 1, 5, 17),
        sample("one_unit", 4, 3, 2, 1),
        sample("one_input", 4, 3, 1, 12),
        sample("no_state", 5, 3, 7, 20, _drop(1)),
        sample("no_bias", 5, 3, 7, 20, _drop(4, 5)),
        sample("bias_ih_only", 5, 3, 7, 20, _drop(5)),
        sample("reverse", 5, 3, 7, 20, reverse=True),
        sample("batch_first", 5, 3, 7, 20, batch_first=True),
        sample("lengths", 6, 5, 7, 20, lengths=(3, 6, 0, 1, 5)),
        sample("lengths_reverse", 6, 5, 7, 20, lengths=(3, 6, 0, 1, 5), reverse=True),
        sample("lengths_batch_first", 6, 5, 7, 20, lengths=(2, 2, 6, 4, 1), batch_first=True),
        sample("strided", 5, 3, 8, 20, _strided),
        sample("expanded", 5, 3, 7, 20, _expanded),
        sample("no_steps", 0, 3, 7, 20),
        sample("no_rows", 5, 0, 7, 20),
        sample("no_inputs", 5, 3, 0, 20),
        # batch x sequence x input x hidden
        sample("1x64x128x128", 64, 1, 128, 128, bench=True, test=False),
        sample("1x1x256x256", 1, 1, 256, 256, bench=True, test=False),
        sample("16x64x256x256", 64, 16, 256, 256, bench=True, test=False),
        sample("64x128x512x512", 128, 64, 512, 512, bench=True, test=False),
    )


def cell_samples(cell: str) -> tuple[Sample, ...]:
    def step(B, I, H, change, dtype, device, seed=0):
        args, kwargs = sequence(cell, 1, B, I, H, dtype, device, seed, change=change)
        return (args[0][0], *args[1:]), kwargs

    def sample(id, B, I, H, change=None, bench=False, test=True):
        return Sample(id, partial(step, B, I, H, change), bench, test)

    return (
        sample("plain", 5, 7, 20),
        sample("one_row", 1, 16, 33),
        sample("many_rows", 40, 16, 16),
        sample("no_state", 5, 7, 20, _drop(1)),
        sample("no_bias", 5, 7, 20, _drop(4, 5)),
        sample("no_rows", 0, 7, 20),
        sample("1x256x256", 1, 256, 256, bench=True, test=False),
        sample("64x512x512", 64, 512, 512, bench=True, test=False),
    )


def errors(cell: str, single: bool) -> tuple[ErrorCase, ...]:
    G, H, I, B = GATES[cell], 4, 3, 2
    layout = r"\[B, I\]" if single else r"\[T, B, I\]"

    def case(id, error, match, **edits):
        def make():
            args = list(tensors(cell, 2, B, I, H, torch.float32, "cpu"))
            if single:
                args[0] = args[0][0]
            names = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
            kwargs = {name: value for name, value in edits.items() if name not in names}
            return tuple(edits.get(name, value) for name, value in zip(names, args, strict=True)), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    state = (lambda t: (t, z(B, H))) if cell == "lstm" else (lambda t: t)
    found = [
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_other_form", ValueError, rf"input: expected {layout}, got shape", input=z(2, B, I) if single else z(B, I)),
        case("input_dim", ValueError, rf"input: expected {layout}, got shape \(3,\)", input=z(3)),
        case(
            "input_dtype", ValueError, "input: expected float32, bfloat16", input=z(*([B, I] if single else [2, B, I]), dtype=torch.int64)
        ),
        case("weight_ih_shape", ValueError, rf"weight_ih: expected shape \({G * H}, {I}\).*got \({G * H}, 5\)", weight_ih=z(G * H, 5)),
        case("weight_hh_shape", ValueError, r"weight_hh: expected \[.*H, H\] with H > 0, got shape \(7, 4\)", weight_hh=z(7, 4)),
        case("weight_hh_kind", TypeError, "weight_hh: expected a Tensor, got NoneType", weight_hh=None),
        case(
            "weight_dtype", ValueError, "weight_ih: expected input's dtype torch.float32, got torch.float64", weight_ih=z(G * H, I).double()
        ),
        case("bias_shape", ValueError, rf"bias_hh: expected shape \({G * H},\)", bias_hh=z(3)),
        case("bias_kind", TypeError, "bias_ih: expected a Tensor or None, got float", bias_ih=0.5),
        case("state_shape", ValueError, rf"h0: expected shape \({B}, {H}\).*got \(9, {H}\)", hx=state(z(9, H))),
        case("state_device", ValueError, "h0: expected input's device cpu, got meta", hx=state(z(B, H, device="meta"))),
        case("backend_name", ValueError, "backend: expected one of auto, cpu, cuda", backend="gpu"),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    ]
    if cell == "lstm":
        found.append(case("state_kind", TypeError, r"hx: expected a tuple \(h_0, c_0\) or None, got Tensor", hx=z(B, H)))
    if cell == "rnn":
        found.append(case("nonlinearity", ValueError, "nonlinearity: expected one of tanh, relu, sigmoid, got 'gelu'", nonlinearity="gelu"))
    if not single:
        found += [
            case("lengths_kind", TypeError, "lengths: expected a Tensor or None, got list", lengths=[1, 2]),
            case("lengths_dtype", ValueError, "lengths: expected int64", lengths=torch.tensor([1.0, 2.0])),
            case("lengths_shape", ValueError, r"lengths: expected int64 of shape \(2,\)", lengths=torch.tensor([1, 2, 1])),
            case("lengths_high", ValueError, r"lengths: expected values in 0\.\.2, got 3", lengths=torch.tensor([1, 3])),
            case("lengths_low", ValueError, r"lengths: expected values in 0\.\.2, got -1", lengths=torch.tensor([-1, 2])),
        ]
    return tuple(found)


def _dims(input, hx, weight_ih, weight_hh, *biases, **options):
    rows = input.numel() // max(input.shape[-1], 1)
    return rows, input.shape[-1], weight_hh.shape[1], weight_hh.shape[0]


def flops(*args, **kwargs) -> int:
    rows, I, H, GH = _dims(*args, **kwargs)
    return 2 * rows * GH * (I + H)


def minimal_bytes(*args, **kwargs) -> int:
    """Each weight once, each input and output element once."""
    rows, I, H, GH = _dims(*args, **kwargs)
    return args[0].element_size() * (GH * (I + H) + rows * (I + H))


VARIANTS: dict[str, dict] = {
    "lstm": {},
    "gru": {"reset_before": {"reset_after": False}},
    "rnn": {name: {"nonlinearity": name} for name in ("relu", "sigmoid")},
}


def variant_samples(cell: str) -> tuple[Sample, ...]:
    """A few samples of the forms that torch has not, or has under another name."""
    chosen = ("plain", "odd", "lengths_reverse", "no_state", "no_bias", "one_step")
    return tuple(
        Sample(f"{name}_{sample.id}", sample.make)
        for name, options in VARIANTS[cell].items()
        for sample in samples(cell, options)
        if sample.id in chosen
    )


for _public, _cell, _single in (
    (fused_lstm, "lstm", False),
    (fused_gru, "gru", False),
    (fused_rnn, "rnn", False),
    (lstm_cell, "lstm", True),
    (gru_cell, "gru", True),
    (rnn_cell, "rnn", True),
):
    register(
        OpSpec(
            name=_public.__name__,
            public=_public,
            family="rnn",
            ops=("rnn_fwd", "rnn_infer", "rnn_bwd"),
            samples=cell_samples(_cell) if _single else samples(_cell, {}) + variant_samples(_cell),
            errors=errors(_cell, _single),
            flops=flops,
            bytes=minimal_bytes,
            baselines=rnn_peers.baselines(_cell, _single),
        )
    )
