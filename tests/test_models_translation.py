"""Networks that translate, beside their twins: teacher forcing, greedy decoding, beam search."""

import itertools
import math

import pytest
import torch
from torch import nn

from pyops import models as zoo
from pyops.testing.twins import twin

from .models import Case, both, check_copies, check_inference, check_training

V, N, S, T = 11, 3, 6, 5
LENGTHS = torch.tensor([S, 1, 4])
BOS, EOS = 1, 2
MOST = 8
SEARCH = dict(max_length=MOST, bos=BOS, eos=EOS)


def sentences(lengths=LENGTHS):
    return lambda: (torch.randint(V, (N, S)), torch.randint(V, (N, T)), *(() if lengths is None else (lengths,)))


SIZES = dict(source_vocabulary=V, target_vocabulary=V)
RECURRENT = dict(SIZES, embedding_size=10, hidden_size=12)
LAYERS = dict(SIZES, d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=24, dropout=0.0, max_length=12)
CASES = {"seq2seq": Case(sentences(), RECURRENT), "transformer": Case(sentences(), LAYERS)}
SIBLINGS = {
    "full rows": ("seq2seq", Case(sentences(None), RECURRENT)),
    "lstm": ("seq2seq", Case(sentences(), dict(RECURRENT, rnn="lstm", num_layers=2))),
    "one direction": ("seq2seq", Case(sentences(), dict(RECURRENT, rnn="lstm", bidirectional=False))),
    "transformer, full rows": ("transformer", Case(sentences(None), LAYERS)),
    "norm_first, not tied": ("transformer", Case(sentences(), dict(LAYERS, norm_first=True, tied=False))),
}


@pytest.fixture(autouse=True)
def layer_by_layer():
    """torch's encoder without its C++ fast path, which makes nested tensors of padded rows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name, case", SIBLINGS.values(), ids=SIBLINGS)
def test_siblings(name, case):
    check_inference(name, case)


@pytest.mark.parametrize("name", CASES)
def test_copies(name):
    check_copies(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_compiles(name):
    ours, theirs = (model.eval() for model in both(name, CASES[name]))
    inputs = CASES[name].inputs()
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        found = torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(found, theirs(*inputs), rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied():
    model = zoo.create("transformer", **LAYERS)
    assert model.output.weight is model.target_embedding.weight
    assert zoo.create("transformer", **LAYERS, tied=False).output.weight is not model.target_embedding.weight


def test_initial_values():
    """The recurrent weights are orthogonal gate by gate, attention starts out even."""
    model = zoo.create("seq2seq", **RECURRENT)
    for gate in (*model.decoder.weight_hh.split(12), *model.encoder.weight_hh_l0.split(12)):
        torch.testing.assert_close(gate @ gate.T, torch.eye(12), rtol=0, atol=1e-5)
    assert not model.attention.energy.weight.any() and not model.output.bias.any()
    assert 0.005 < model.readout.weight.std() < 0.02


# ------------------------------------------------------------------------------------------------------------------- decoding


def plainly(model, source, lengths, eos):
    """Greedy tokens of a twin, which reads all tokens so far anew for each next one."""
    found = torch.full((len(source), 1), BOS)
    while found.shape[1] <= MOST:
        token = model(source, found, lengths)[:, -1].argmax(-1)
        ended = (found[:, 1:] == eos).any(1)
        found = torch.cat([found, token.masked_fill(ended, eos)[:, None]], 1)
        if (found[:, 1:] == eos).any(1).all():
            break
    return found[:, 1:]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
@pytest.mark.parametrize("name, options", [("seq2seq", RECURRENT), ("seq2seq", dict(RECURRENT, rnn="lstm")), ("transformer", LAYERS)])
def test_greedy_equals_decoding_anew(name, options, lengths):
    ours, theirs = peaked(name, options, 0)
    source, ended = torch.randint(V, (N, S)), 0
    decode = ours.decode if name == "seq2seq" else ours.greedy
    for eos in range(V):  # of which the network says some and not others
        with torch.no_grad():
            expected = plainly(theirs, source, lengths, eos)
        assert torch.equal(decode(source, lengths, max_length=MOST, bos=BOS, eos=eos), expected)
        ended += int((expected == eos).any(1).sum())
    assert 0 < ended < V * N


def peaked(name, options, seed):
    """Ours and its twin, with weights large enough, and biases zero, that a token depends on those before it."""
    torch.manual_seed(seed)
    ours, theirs = zoo.create(name, **options).eval(), twin(name, **options).eval()
    for key, parameter in theirs.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, (1.5 if name == "transformer" else 4.0) * parameter.shape[1] ** -0.5)
        elif "bias" in key:
            nn.init.zeros_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def log_probabilities(model, source, lengths, sentence):
    """Of each token of one sentence [L] for one source [1, S]."""
    target_in = torch.cat([torch.tensor([BOS]), sentence[:-1]])[None]
    return model(source, target_in, lengths)[0].log_softmax(-1).gather(1, sentence[:, None])[:, 0]


def up_to_eos(sentence, eos=EOS):
    at = (sentence == eos).nonzero()
    return sentence[: int(at[0]) + 1] if len(at) else sentence


TINY = dict(LAYERS, source_vocabulary=4, target_vocabulary=4)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_beams_of_all_sentences_equal_brute_force(length_penalty):
    most, beams = 3, 64
    ours, theirs = peaked("transformer", TINY, 0)
    source = torch.randint(4, (2, S))
    tokens, scores = ours.beam_search(source, beams, length_penalty, max_length=most, bos=BOS, eos=EOS)
    every = {tuple(up_to_eos(torch.tensor(s)).tolist()) for s in itertools.product(range(4), repeat=most)}
    with torch.no_grad():
        for row in range(2):
            values = [
                (log_probabilities(theirs, source[row : row + 1], None, torch.tensor(s)).sum() / ((5 + len(s)) / 6) ** length_penalty, s)
                for s in every
            ]
            ranked = sorted(values, reverse=True)
            expected = torch.stack([score for score, _ in ranked])
            torch.testing.assert_close(scores[row, : len(every)], expected, rtol=1e-4, atol=1e-4)
            assert tuple(up_to_eos(tokens[row, 0]).tolist()) == ranked[0][1]
            assert {tuple(up_to_eos(t).tolist()) for t in tokens[row, : len(every)]} == every
            assert (scores[row, len(every) :] == -math.inf).all()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_one_beam_is_greedy(lengths):
    for seed in range(4):
        ours, _ = peaked("transformer", LAYERS, seed)
        source = torch.randint(V, (N, S))
        tokens, _ = ours.beam_search(source, 1, 0.6, lengths, **SEARCH)
        assert torch.equal(tokens[:, 0], ours.greedy(source, lengths, **SEARCH))


def searched_plainly(model, source, lengths, beams, eos):
    """Beam search of one source [1, S] without a cache, hypothesis by hypothesis: [(score, tokens)], the best first."""
    live, ended = [(0.0, ())], []
    for length in range(1, MOST + 1):
        grown = []
        for total, sentence in live:
            logits = model(source, torch.tensor([[BOS, *sentence]]), lengths)[0, -1].log_softmax(-1)
            grown += [(total + p, (*sentence, token)) for token, p in enumerate(logits.tolist())]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        over = [s[-1] == eos or length == MOST for _, s in grown]
        ended += [(total / ((5 + length) / 6) ** 0.6, s) for (total, s), o in zip(grown[:beams], over[:beams], strict=True) if o]
        live = [item for item, o in zip(grown, over, strict=True) if not o][:beams]
        if len(ended) >= beams:
            break
    return sorted(ended, reverse=True)[:beams]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_equal_decoding_anew(beams, lengths):
    ours, theirs = peaked("transformer", LAYERS, 0)
    source, early = torch.randint(V, (N, S)), set()
    for eos in (0, 4, 10):
        tokens, scores = ours.beam_search(source, beams, 0.6, lengths, max_length=MOST, bos=BOS, eos=eos)
        for row in range(N):
            own = None if lengths is None else lengths[row : row + 1]
            with torch.no_grad():
                expected = searched_plainly(theirs, source[row : row + 1], own, beams, eos)
            assert [tuple(up_to_eos(t, eos).tolist()) for t in tokens[row]] == [sentence for _, sentence in expected]
            torch.testing.assert_close(scores[row].tolist(), [score for score, _ in expected], rtol=1e-4, atol=1e-4)
            early |= {len(sentence) < MOST for _, sentence in expected}
    assert early == {False, True}


# --------------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    recurrent, model = zoo.create("seq2seq", **RECURRENT), zoo.create("transformer", **LAYERS)
    source, target = torch.randint(V, (N, S)), torch.randint(V, (N, T))
    for network, decode in ((recurrent, recurrent.decode), (model, model.greedy)):
        for arguments, message in (
            ((source.float(), target), r"source: expected int64 of shape \[N, 1 or more\], got torch.float32"),
            ((source, target[:2]), r"target_in: expected int64 of shape \[3, 1 or more\], got torch.int64 of shape \(2, 5\)"),
            ((source, target, LENGTHS[:2]), r"source_lengths: expected int64 of shape \(3,\)"),
            ((source, target, LENGTHS - 1), r"source_lengths: expected values in 1..6, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                network(*arguments)
        with pytest.raises(TypeError, match="source_lengths: expected a Tensor or None, got list"):
            decode(source, [1, 2, 3], **SEARCH)
        with pytest.raises(ValueError, match=r"eos: expected 0\.\.10, got 11"):
            decode(source, max_length=3, bos=0, eos=V)
        with pytest.raises(TypeError, match=r"max_length: expected an int, got 2\.0"):
            decode(source, max_length=2.0, bos=0, eos=1)
    with pytest.raises(ValueError, match="beam_size: expected 1 or more, got 0"):
        model.beam_search(source, 0, **SEARCH)
    with pytest.raises(ValueError, match="length_penalty: expected a finite number, got nan"):
        model.beam_search(source, 2, math.nan, **SEARCH)
    with pytest.raises(ValueError, match="source: expected at most max_length=12 tokens, got 18"):
        model(source.repeat(1, 3), target)
    with pytest.raises(ValueError, match="max_length: expected at most 12, got 13"):
        model.greedy(source, max_length=13, bos=BOS, eos=EOS)
    with pytest.raises(ValueError, match="rnn: expected 'gru' or 'lstm', got 'rnn'"):
        zoo.create("seq2seq", rnn="rnn")
