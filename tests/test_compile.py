"""opcheck of the torch ops, and fullgraph torch.compile of the public functions, static and dynamic."""

import pytest
import torch

from pyops import _library
from pyops.testing import SPECS
from pyops.testing.samples.rnn import sequence

from .conftest import arguments, cases, cotangents, leaves, with_grad

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))


def layer_arguments(sample_id: str, cell: int, grad: bool):
    """Positional arguments of pyops::rnn_fwd and rnn_infer from a registry sample."""
    name = ("fused_lstm", "fused_gru", "fused_gru", "fused_rnn", "fused_rnn", "fused_rnn")[cell]
    (sample,) = (s for s in SPECS[name].samples if s.id == sample_id)
    args, kwargs = sample.make(torch.float32, "cpu")
    args = with_grad(args) if grad else args
    x, hx, *weights = args
    h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
    return (cell, x, h0, c0, *weights, kwargs.get("lengths"), kwargs.get("batch_first", False), kwargs.get("reverse", False))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
@pytest.mark.parametrize("sample_id", ["plain", "no_state", "lengths_batch_first"])
@pytest.mark.parametrize("cell", range(6))
def test_opcheck(cell, sample_id):
    torch.library.opcheck(torch.ops.pyops.rnn_fwd.default, layer_arguments(sample_id, cell, grad=True))
    args = layer_arguments(sample_id, cell, grad=False)
    torch.library.opcheck(torch.ops.pyops.rnn_infer.default, args)
    output, _, c_n, reserve = torch.ops.pyops.rnn_fwd(*args)
    grads = (torch.ones_like(output), None, torch.ones_like(c_n) if cell == 0 else None)
    _, x, h0, c0, w_ih, w_hh, b_ih, _, lengths, batch_first, reverse = args
    backward = (cell, *grads, x, h0, c0, w_ih, w_hh, output, reserve, lengths, b_ih is not None, batch_first, reverse, True, True)
    torch.library.opcheck(torch.ops.pyops.rnn_bwd.default, backward)


def step(spec, args, kwargs):
    outputs = leaves(spec.public(*args, **kwargs))
    return outputs, torch.autograd.grad(outputs, leaves((args, kwargs)), cotangents(outputs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "spec, backend, dtype, sample", cases(("cpu",), (torch.float32,), ("plain", "lengths_reverse", "stride2", "residual_silu"))
)
def test_fullgraph(spec, backend, dtype, sample, dynamic):
    args, kwargs = arguments(spec, backend, dtype, sample)
    args, kwargs = with_grad(args), {**with_grad(kwargs), "backend": backend}  # auto may choose another one outside of the compiler
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: spec.public(*a, **kwargs), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, expected_grads = step(spec, args, kwargs)
    found = leaves(compiled(*args))
    grads = torch.autograd.grad(found, leaves((args, kwargs)), cotangents(found))
    for a, b in zip([*expected, *expected_grads], [*found, *grads], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fused_lstm", "fused_gru", "fused_rnn"])
def test_dynamic_shapes_do_not_recompile(name):
    torch._dynamo.reset()
    compiled = torch.compile(SPECS[name].public, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, B in ((5, 3), (9, 4), (2, 7)):
            args, _ = sequence(name[6:], T, B, 7, 20, torch.float32, "cpu")
            with torch.no_grad():
                for a, b in zip(leaves(compiled(*args)), leaves(SPECS[name].public(*args)), strict=True):
                    assert torch.equal(a, b)


def test_inductor_trains_a_model():
    """The whole way once: fullgraph, inductor, dense layers around the op."""
    import pyops

    torch._dynamo.reset()
    args, _ = sequence("gru", 6, 4, 8, 16, torch.float32, "cpu")
    head = torch.nn.Linear(16, 3)

    def loss(x, h, *weights):
        return head(pyops.fused_gru(x, h, *weights)[0]).square().mean()

    args = with_grad(args)
    expected = torch.autograd.grad(loss(*args), [*args, *head.parameters()])
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*args), [*args, *head.parameters()])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_module_compiles_in_one_graph():
    """torch's Dynamo refuses subclasses of its RNN modules unless told otherwise; told so, ours is one graph with no loop over time."""
    import pyops

    torch._dynamo.reset()
    module = pyops.nn.LSTM(8, 16, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 8)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for a, b in zip(leaves(compiled(x)), leaves(module(x)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(SPECS))
def test_export(name):
    """torch.export sees ops, not a loop: one, or three where batch statistics come first."""
    spec = SPECS[name]
    (sample,) = (s for s in spec.samples if s.id == "plain")
    args, _ = sample.make(torch.float32, "cpu")

    class Wrapper(torch.nn.Module):
        def forward(self, *args):
            return spec.public(*args, backend="cpu")  # auto may choose PyTorch's ops for so small a call

    def seeded(call):
        torch.manual_seed(0)  # what draws numbers draws the same ones
        return leaves(call(*args))

    program = torch.export.export(Wrapper(), args)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(target.startswith("pyops.") for target in targets) == (3 if name == "batch_norm_act" else 1)
    for a, b in zip(seeded(program.module()), seeded(Wrapper()), strict=True):
        assert torch.equal(a, b)
