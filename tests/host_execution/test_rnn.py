"""The recurrence kernels of csrc/rnn, executed on the host (csrc/common/cuda_host.h) and compared with a float64 loop.

The very same .cu files are compiled with the host's C++ compiler; threads are fibers in an order drawn from a seed. Nothing here
needs a GPU or a CUDA toolkit. What it cannot see: weak memory ordering, races inside what the model runs atomically, speed.
"""

from functools import cache

import pytest
import torch

from pyops.ops import _rnn_reference as composed
from pyops.testing import SPECS

from ..conftest import assert_gate, cotangents, double, leaves, with_grad
from .rnn import CELLS, DTYPES, LARGER, PATHS, SHAPES, Problem, assert_as_good_as_eager, scans


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, path, cell, dtype, shape):
    problem = Problem(cell, dtype, **SHAPES[shape], seed=3)
    runs = []
    for seed, sm_count in ((1, 6), (2, 3)):  # grid: two batch slices, then one of two tiles
        library.host_machine(seed, sm_count, 163 * 1024)
        forward = problem.forward(library, PATHS[path])
        runs.append(forward | problem.backward(library, forward, PATHS[path]))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), f"{name} depends on the order of threads"
    assert_as_good_as_eager(runs[0], problem)


@pytest.mark.parametrize("path, cell, dtype, H, T, B", LARGER, ids=lambda v: str(v).replace("torch.", ""))
def test_larger(library, path, cell, dtype, H, T, B):
    library.host_machine(5, 132, 227 * 1024)
    problem = Problem(cell, dtype, T, B, H, lengths=[i % (T + 1) for i in range(B)])
    forward = problem.forward(library, PATHS[path])
    assert_as_good_as_eager(forward | problem.backward(library, forward, PATHS[path]), problem)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_inference_keeps_nothing_and_changes_nothing(library, path, cell):
    library.host_machine(1, 8, 163 * 1024)
    problem = Problem(cell, torch.bfloat16, T=4, B=5, H=35, lengths=[4, 9, 0, -3, 2])  # out of 0..T: clamped
    with_reserve, without = problem.forward(library, PATHS[path]), problem.forward(library, PATHS[path], reserve=False)
    assert all(torch.equal(value, with_reserve[name]) for name, value in without.items())
    problem.lengths = problem.lengths.clamp(0, 4)
    assert all(torch.equal(value, with_reserve[name]) for name, value in problem.forward(library, PATHS[path]).items())


@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_the_batch(library, path):
    library.host_machine(1, 8, 163 * 1024)
    problem = Problem("lstm", torch.bfloat16, T=3, B=21, H=40, seed=9)
    whole = problem.forward(library, PATHS[path])["output"]
    problem.gates_x, problem.h0, problem.c0 = problem.gates_x[:, 13:14].contiguous(), problem.h0[13:14], problem.c0[13:14]
    problem.B = 1
    assert torch.equal(problem.forward(library, PATHS[path])["output"][:, 0], whole[:, 13])


def test_choice_of_path(library):
    def choice(cell, dtype, B, H, backward=False, sms=132, shared=227 * 1024):
        number = library.host_choose_path(CELLS[cell], DTYPES[dtype], B, H, int(backward), sms, shared)
        return list(PATHS)[number]

    bf16, f32 = torch.bfloat16, torch.float32
    assert choice("lstm", bf16, 64, 128) == choice("lstm", bf16, 64, 160) == choice("rnn_tanh", bf16, 4, 256) == "one_cta"
    assert choice("lstm", bf16, 16, 768) == choice("lstm", bf16, 32, 2048) == choice("gru", f32, 16, 512) == "grid"
    assert choice("lstm", bf16, 32, 2560) == choice("lstm", bf16, 4096, 1024) == choice("lstm", f32, 8, 2048) == "step"
    assert choice("lstm", bf16, 16, 2048, sms=108, shared=163 * 1024) == "step"
    library.host_machine(1, 2, 163 * 1024)
    with pytest.raises(RuntimeError, match="fewer SMs"):
        Problem("lstm", bf16, 1, 1, 64).forward(library, PATHS["grid"])
    with pytest.raises(RuntimeError, match="too few threads"):
        Problem("lstm", bf16, 1, 1, 300).forward(library, PATHS["one_cta"])


# ----------------------------------------------------------------------------------------------------- the registry's samples

SAMPLES = [
    pytest.param(spec, sample, id=f"{spec.name}-{sample.id}")
    for spec in SPECS.values()
    if spec.family == "rnn"
    for sample in spec.samples
    if sample.test and sample.id not in ("no_steps", "no_rows")  # nothing to do: no kernel is launched
]


def eager_gradients(spec, args, kwargs):
    args = with_grad(args)
    outputs = leaves(spec.public(*args, **kwargs, backend="eager"))
    found = torch.autograd.grad(outputs, leaves(args), cotangents(outputs), allow_unused=True)
    return outputs, [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves(args), strict=True)]


def cell_of(spec, kwargs):
    name = spec.name.removeprefix("fused_").removesuffix("_cell")
    if name == "gru":
        return "gru" if kwargs.get("reset_after", True) else "gru_reset_before"
    return "lstm" if name == "lstm" else f"rnn_{kwargs.get('nonlinearity', 'tanh')}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spec, sample", SAMPLES)
def test_registry_samples(library, spec, sample, path, dtype):
    """A whole layer, as the CUDA backend composes it around the kernels, held to the numerics gate of every backend."""
    forward, backward = scans(library, PATHS[path])
    machine = (12, 163 * 1024)
    if path == "one_cta":
        (x, _, _, weight_hh, *_), kwargs = sample.make(dtype, "cpu", 0)
        size = (CELLS[cell_of(spec, kwargs)], DTYPES[dtype], x.shape[-2], weight_hh.shape[1])
        if library.host_choose_path(*size, 0, *machine) != PATHS["one_cta"]:  # auto's choice wherever it fits
            pytest.skip("W_hh does not fit one block")

    @cache
    def layer(seed):
        """((results, their float64 truths, eager's), (gradients, their truths, eager's))"""
        args, kwargs = sample.make(dtype, "cpu", seed)
        cell = CELLS[cell_of(spec, kwargs)]
        x, hx, *weights = args
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        options = (kwargs.get("lengths"), kwargs.get("batch_first", False), kwargs.get("reverse", False))
        library.host_machine(seed, *machine)
        output, h_n, c_n, reserve = composed.layer_forward(forward, cell, x, h0, c0, *weights, *options, save=True)
        results = [output, h_n, c_n] if cell == CELLS["lstm"] else [output, h_n]
        single = x.dim() == 2  # a cell returns its new states alone
        grads = [None, *cotangents(results[1:])] if single else cotangents(results)
        dx, dh0, dc0, d_ih, d_hh, d_bias_ih, d_bias_hh = composed.layer_backward(
            backward, cell, *grads, *[None] * (3 - len(grads)), x, h0, c0, *weights[:2], output, reserve, options[0],
            weights[2] is not None, *options[1:], True, True,
        )  # fmt: skip
        gradients = [dx, dh0, dc0, d_ih, d_hh, d_bias_ih, d_bias_hh if composed.GATES[cell] == 3 else d_bias_ih]
        gradients = [g for g, t in zip(gradients, (x, h0, c0, *weights), strict=True) if t is not None]
        truth, eager = eager_gradients(spec, double(args), kwargs), eager_gradients(spec, args, kwargs)
        return (results[1:] if single else results, truth[0], eager[0]), (gradients, truth[1], eager[1])

    assert_gate(lambda seed: layer(seed)[0], dtype)
    assert_gate(lambda seed: layer(seed)[1], dtype, gradient=True)
