"""The recurrent networks over sequences, beside their twins; the language model's loss and what it generates."""

import pytest
import torch
import torch.nn.functional as F

from pyops import models as zoo

from .conftest import assert_gate
from .models import Case, both, check_copies, check_inference, check_training

V = 37


def draw_tokens():
    return (torch.randint(V, (3, 9)),)


def draw_series():
    return (torch.randn(3, 11, 2),)


def without_dropout(model):
    model.rnn.dropout = 0.0
    if hasattr(model, "dropout"):
        model.dropout.p = 0.0


CASES = {
    "language_model": Case(draw_tokens, dict(vocab_size=V, hidden_size=24), without_dropout),
    "time_series": Case(draw_series, dict(input_size=2, hidden_size=20, dropout=0.2), without_dropout),
}
VARIANTS = {
    "language_model-gru": dict(cell="gru", num_layers=1),
    "language_model-rnn": dict(cell="rnn", num_layers=3),
    "language_model-untied": dict(tied=False, embedding_dim=12),
    "time_series-gru": dict(cell="gru", output_size=3),
    "time_series-rnn": dict(cell="rnn", num_layers=1),
}


def variant(id: str) -> tuple[str, Case]:
    name = id.split("-")[0]
    case = CASES[name]
    return name, case._replace(options=case.options | VARIANTS[id])


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("id", VARIANTS)
def test_variants(id):
    check_inference(*variant(id))
    check_training(*variant(id))


@pytest.mark.parametrize("name", CASES)
def test_copies(name):
    check_copies(name, CASES[name])


def test_one_graph():
    torch._dynamo.reset()
    case = CASES["language_model"]
    model, inputs = zoo.create("language_model", **case.options).eval(), case.inputs()
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_logits_cross_entropy(tied):
    case = CASES["language_model"]
    ours, theirs = both("language_model", case._replace(options=case.options | dict(tied=tied)))
    truth = zoo.create("language_model", **case.options, tied=tied).double()
    truth.load_state_dict(theirs.state_dict())
    for model in (ours, theirs, truth):
        without_dropout(model)

    def draw(seed):
        torch.manual_seed(seed)
        (tokens,), (targets,) = draw_tokens(), draw_tokens()
        targets[0, :2] = -100
        results = []
        for model, fused in ((ours, True), (truth, False), (theirs, False)):
            loss = model.loss(tokens, targets) if fused else F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
            model.zero_grad()
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        return results

    assert_gate(draw, torch.float32, gradient=True)


def test_state_goes_on():
    """Two halves with the state handed over are the whole."""
    model = zoo.create("language_model", **CASES["language_model"].options).eval()
    (tokens,) = draw_tokens()
    with torch.no_grad():
        whole, (h, c) = model(tokens)
        first, state = model(tokens[:, :4])
        second, (h_after, c_after) = model(tokens[:, 4:], state)
    for found, wanted in ((torch.cat([first, second], 1), whole), (h_after, h), (c_after, c)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_generated_tokens():
    torch.manual_seed(0)
    model = zoo.create("language_model", **CASES["language_model"].options).train()
    torch.nn.init.normal_(model.embedding.weight)
    (tokens,) = draw_tokens()
    first, again, other = (model.generate(tokens, 20, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (3, 29) and torch.equal(first[:, :9], tokens) and model.training
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval()
    greedy = model.generate(tokens, 6, temperature=0)
    with torch.no_grad():
        assert torch.equal(greedy[:, 9:], model(greedy[:, :-1])[0][:, 8:].argmax(2))  # each the likeliest after those before it
    assert torch.equal(model.generate(tokens, 6, temperature=1e-4, seed=3), greedy)
    assert torch.equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: zoo.language_model(cell="mgu"), "language_model: cell: expected one of lstm, gru, rnn, got 'mgu'"),
        (lambda: zoo.language_model(10, 8, embedding_dim=4), "embedding_dim: expected hidden_size 8 where tied, got 4"),
        (lambda: zoo.time_series(cell="mgu"), "time_series: cell: expected one of lstm, gru, rnn, got 'mgu'"),
        (lambda: zoo.language_model(10, 8).generate(torch.zeros(2, 0).long(), 3), "tokens: expected .* got shape"),
        (lambda: zoo.language_model(10, 8).generate(torch.zeros(2, 1).long(), -1), "count: expected 0 or more, got -1"),
        (lambda: zoo.language_model(10, 8).generate(torch.zeros(2, 1).long(), 1, temperature=-1), "temperature: expected 0 or more"),
    ],
)  # fmt: skip
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
