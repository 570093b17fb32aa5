"""pyops.nn's recurrent modules against torch.nn's: results, gradients, state dicts, packed sequences, errors, the lot."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import module_db

import pyops
from pyops.testing import relative_error

from .conftest import cotangents, leaves

NAMES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def twins(name, *args, **kwargs):
    """torch's module and ours with the same parameters, each loaded from the other's state dict."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(pyops.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def assert_same(theirs, ours, *inputs, tolerance=1e-5):
    """Outputs and all gradients agree."""
    results = []
    for module in (theirs, ours):
        own = [with_grad(value) for value in inputs]
        torch.manual_seed(1)
        outputs = leaves(module(*own)) if not hasattr(own[0], "batch_sizes") else packed_leaves(module(*own))
        torch.autograd.backward(outputs, cotangents(outputs))
        grads = [t.grad for value in own for t in packed_leaves((value,))] + [p.grad for p in module.parameters()]
        results.append((outputs, grads))
        module.zero_grad()
    for mine, reference in zip(results[1], results[0], strict=True):
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance * 10, atol=tolerance)


def with_grad(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_()
    if hasattr(value, "batch_sizes"):
        return value._replace(data=value.data.detach().clone().requires_grad_())
    return tuple(map(with_grad, value))


def packed_leaves(value):
    found = []
    for item in value:
        if hasattr(item, "batch_sizes"):
            found.append(item.data)
        else:
            found += leaves(item)
    return found


def states(name, layers, B, H, batched=True):
    shape = (layers, B, H) if batched else (layers, H)
    return (torch.randn(shape), torch.randn(shape)) if name == "LSTM" else torch.randn(shape)


BOOLS = (False, True)


@pytest.mark.parametrize("layers, bidirectional, bias, batch_first", list(itertools.product((1, 2), BOOLS, BOOLS, BOOLS)))
@pytest.mark.parametrize("name", NAMES)
def test_sequence_modules(name, layers, bidirectional, bias, batch_first):
    theirs, ours = twins(name, 5, 7, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(4, 3, 5)
    hx = states(name, layers * (1 + bidirectional), 4 if batch_first else 3, 7)
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x, hx)
    assert_same(theirs, ours, x.transpose(0, 1), states(name, layers * (1 + bidirectional), 3 if batch_first else 4, 7))


@pytest.mark.parametrize("name", NAMES)
def test_unbatched(name):
    theirs, ours = twins(name, 5, 7, 2, bidirectional=True)
    assert_same(theirs, ours, torch.randn(4, 5))
    assert_same(theirs, ours, torch.randn(4, 5), states(name, 4, 0, 7, batched=False))


def test_relu():
    assert_same(*twins("RNN", 5, 7, 2, nonlinearity="relu"), torch.randn(4, 3, 5))
    assert_same(*twins("RNN", 5, 7, 1, "relu"), torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_draws_torchs_numbers(name):
    assert_same(*twins(name, 5, 7, 3, dropout=0.5, bidirectional=True), torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", NAMES)
def test_eval_ignores_dropout_and_still_differentiates(name):
    theirs, ours = twins(name, 5, 7, 3, dropout=0.5)
    assert_same(theirs.eval(), ours.eval(), torch.randn(4, 3, 5))


@pytest.mark.parametrize("layers, bidirectional, with_state, is_sorted", list(itertools.product((1, 2), BOOLS, BOOLS, BOOLS)))
@pytest.mark.parametrize("name", NAMES)
def test_packed(name, layers, bidirectional, with_state, is_sorted):
    theirs, ours = twins(name, 5, 7, layers, bidirectional=bidirectional)
    lengths = (6, 4, 4, 1) if is_sorted else (4, 1, 6, 4)
    packed = pack_sequence([torch.randn(n, 5) for n in lengths], enforce_sorted=is_sorted)
    hx = (states(name, layers * (1 + bidirectional), 4, 7),) if with_state else ()
    assert_same(theirs, ours, packed, *hx)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_mean_what_packing_means(name, batch_first):
    _, ours = twins(name, 5, 7, 2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([3, 6, 1, 4])
    x = torch.randn(4, 6, 5) if batch_first else torch.randn(6, 4, 5)
    output, state = ours(x, lengths=lengths)
    packed_output, packed_state = ours(pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False))
    padded, _ = pad_packed_sequence(packed_output, batch_first=batch_first, total_length=6)
    for a, b in zip([output, *leaves(state)], [padded, *leaves(packed_state)], strict=True):
        assert relative_error([(a, b)]) < 1e-6  # the two may differ in the order of a row's sums


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own, of its own module
def test_proj_size_runs_torchs_op():
    theirs, ours = twins("LSTM", 5, 7, 2, proj_size=3, bidirectional=True)
    assert_same(theirs, ours, torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="no proj_size"):
        pyops.nn.LSTM(5, 7, proj_size=3, backend="eager")(torch.randn(4, 3, 5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, bias):
    theirs, ours = twins(name, 5, 7, bias=bias)
    two = (torch.randn(3, 7), torch.randn(3, 7))
    assert_same(theirs, ours, torch.randn(3, 5))
    assert_same(theirs, ours, torch.randn(3, 5), two if name == "LSTMCell" else two[0])
    one = (torch.randn(7), torch.randn(7))
    assert_same(theirs, ours, torch.randn(5), one if name == "LSTMCell" else one[0])


def test_extras():
    x = torch.randn(4, 3, 5)
    for module, function, options in (
        (pyops.nn.GRU(5, 7, reset_after=False), pyops.fused_gru, {"reset_after": False}),
        (pyops.nn.RNN(5, 7, nonlinearity="sigmoid"), pyops.fused_rnn, {"nonlinearity": "sigmoid"}),
        (pyops.nn.RNN(5, 7, 1, "sigmoid"), pyops.fused_rnn, {"nonlinearity": "sigmoid"}),
    ):
        output, h_n = module(x)
        expected, expected_h = function(x, None, *module._flat_weights, backend="eager", **options)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(h_n[0], expected_h)
    cell = pyops.nn.RNNCell(5, 7, nonlinearity="sigmoid")
    torch.testing.assert_close(cell(x[0]), pyops.rnn_cell(x[0], None, *cell.parameters(), nonlinearity="sigmoid", backend="eager"))
    cell = pyops.nn.GRUCell(5, 7, reset_after=False)
    torch.testing.assert_close(cell(x[0]), pyops.gru_cell(x[0], None, *cell.parameters(), reset_after=False, backend="eager"))
    assert "reset_after=False" in repr(pyops.nn.GRU(5, 7, reset_after=False, backend="eager"))
    assert "backend='eager'" in repr(pyops.nn.GRU(5, 7, backend="eager"))


@pytest.mark.parametrize("name", NAMES)
def test_isinstance_copies_and_pickles(name):
    _, ours = twins(name, 5, 7, 2)
    assert isinstance(ours, getattr(torch.nn, name))
    x = torch.randn(4, 3, 5)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x)[0], ours(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_and_parametrisation(name):
    _, ours = twins(name, 5, 7)
    x = torch.randn(4, 3, 5)
    doubled = {key: value * 2 for key, value in ours.state_dict().items()}
    expected = copy.deepcopy(ours)
    expected.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(ours, doubled, (x,))[0], expected(x)[0])

    class Double(torch.nn.Module):
        def forward(self, w):
            return w * 2

    for key in list(ours.state_dict()):
        torch.nn.utils.parametrize.register_parametrization(ours, key, Double())
    assert torch.equal(ours(x)[0], expected(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    theirs, ours = twins(name, 16, 32)
    x = torch.randn(4, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x)[0], theirs(x)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.02)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_no_flatten_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            module = copy.deepcopy(getattr(pyops.nn, name)(5, 7, 2))
            module.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(module.weight_hh_l0))
            module(torch.randn(4, 3, 5))


def test_many_steps():
    """T = 100,000 in one call: no limit on the sequence, no scratch that grows with it."""
    for name in NAMES:
        module = getattr(pyops.nn, name)(4, 24)
        with torch.no_grad():
            output, _ = module(torch.randn(100_000, 2, 4))
        assert output.shape == (100_000, 2, 24) and output.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_one_step_at_a_time_is_the_sequence(name):
    """A row's state does not depend on how the sequence is cut up."""
    _, ours = twins(name, 6, 17)
    x = torch.randn(9, 3, 6)
    with torch.no_grad():
        whole, _ = ours(x)
        hx = None
        pieces = []
        for t in range(9):
            y, hx = ours(x[t : t + 1], hx)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ PyTorch's own module tests, on our classes

TORCHS = [info for info in module_db if info.name.split(".")[-1] in (*NAMES, *CELLS)]


def our_class(info):
    return getattr(pyops.nn, info.name.split(".")[-1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("info", TORCHS, ids=lambda info: info.name)
def test_torchs_module_inputs(info, training):
    """Each constructor and input of PyTorch's own tests: forward, gradients, non-contiguous input, double gradients in float64."""
    for sample in info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training):
        if sample.forward_input is None:
            continue
        make, run = sample.constructor_input, sample.forward_input
        ours = our_class(info)(*make.args, **{**make.kwargs, "dtype": torch.float64}).train(training)
        theirs = info.module_cls(*make.args, **{**make.kwargs, "dtype": torch.float64}).train(training)
        theirs.load_state_dict(ours.state_dict())
        expected, found = leaves(theirs(*run.args, **run.kwargs)), leaves(ours(*run.args, **run.kwargs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        inputs = [t for t in leaves(run.args) if t.requires_grad]
        grads = torch.autograd.grad(found, inputs, cotangents(found), retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(expected, inputs, cotangents(expected)), strict=True):
            torch.testing.assert_close(a, b)
        for _ in range(3):  # backward any number of times
            torch.autograd.backward(found, cotangents(found), retain_graph=True)


@pytest.mark.parametrize("info", [info for info in TORCHS if info.module_error_inputs_func], ids=lambda info: info.name)
def test_torchs_module_errors(info):
    for case in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        make, run = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            module = our_class(info)(*make.args, **make.kwargs)
            if run is not None:
                module(*run.args, **run.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(name):
    _, ours = twins(name, 2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: ours(t)[0], x)
