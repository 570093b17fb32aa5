"""pyops.fuse and unfuse: the same model, the same numbers, the same state dict."""

import copy

import pytest
import torch

import pyops


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.rnns = torch.nn.ModuleList([torch.nn.GRU(6, 8, bidirectional=True), torch.nn.LSTM(16, 8, 2), torch.nn.RNN(8, 8)])
        self.cell = torch.nn.LSTMCell(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.cell(x[-1])[0]


def test_fuse_and_unfuse():
    model = Tagger()
    tokens = torch.randint(11, (7, 3))
    expected, keys, parameters = model(tokens), list(model.state_dict()), list(model.parameters())
    calls = []
    model.rnns[1].register_forward_hook(lambda *_: calls.append(1))
    assert pyops.fuse(model) is model
    assert [type(rnn) for rnn in model.rnns] == [pyops.nn.GRU, pyops.nn.LSTM, pyops.nn.RNN] and type(model.cell) is pyops.nn.LSTMCell
    assert list(model.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(tokens), expected)
    assert calls == [1]
    torch.testing.assert_close(copy.deepcopy(model)(tokens), expected)
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.rnns.parameters())
    pyops.unfuse(model)
    assert [type(rnn) for rnn in model.rnns] == [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN] and type(model.cell) is torch.nn.LSTMCell
    torch.testing.assert_close(model(tokens), expected)


def test_what_is_not_torchs_own_is_left_alone():
    class Mine(torch.nn.LSTM):
        pass

    mine, parametrised = Mine(3, 4), torch.nn.GRU(3, 4)
    torch.nn.utils.parametrize.register_parametrization(parametrised, "weight_hh_l0", torch.nn.Identity())
    before = type(parametrised)
    pyops.fuse(torch.nn.ModuleList([mine, parametrised]))
    assert type(mine) is Mine and type(parametrised) is before
    assert type(pyops.unfuse(pyops.nn.GRU(3, 4, reset_after=False))) is pyops.nn.GRU
    with pytest.raises(TypeError, match=r"fuse: model: expected a torch.nn.Module, got list"):
        pyops.fuse([])
