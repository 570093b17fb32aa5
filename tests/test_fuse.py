"""pyops.fuse and unfuse: the same model, the same numbers, the same state dict."""

import copy

import pytest
import torch
import torch.nn.functional as F

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


def test_a_class_changed_since():
    """parametrize derives a class from the fused one: unfuse says so, and undoes nothing."""
    model = pyops.fuse(torch.nn.ModuleList([Tagger(), torch.nn.GRU(3, 4)]))
    before = [type(part) for part in model.modules() if part is not model[1]]
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight_hh_l0", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"unfuse: model\.1: expected the class that fuse gave it, got ParametrizedGRU; undo that first"):
        pyops.unfuse(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight_hh_l0")
    assert [type(part) for part in model.modules() if part is not model[1]] == before
    assert [type(rnn) for rnn in (pyops.unfuse(model)[1], model[0].rnns[1])] == [torch.nn.GRU, torch.nn.LSTM]


class Block(torch.nn.Module):
    """A residual block as users write it."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.shortcut = torch.nn.Sequential()
        if stride > 1:
            self.shortcut = torch.nn.Sequential(torch.nn.Conv2d(channels, channels, 1, stride), torch.nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Net(torch.nn.Module):
    """Its `view` takes no image in channels_last."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = torch.nn.Sequential(Block(16), Block(16, 2))
        self.head = torch.nn.Linear(256, 5)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 2)
        x = self.blocks(x)
        return self.head(x.view(x.size(0), -1))


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_users_own_network(train):
    torch.manual_seed(0)
    model, x = Net().train(train), torch.randn(2, 3, 16, 16)
    twin = copy.deepcopy(model)
    before = [t.clone() for t in tensors_of(model)]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    assert pyops.fuse(model) is model and type(model.blocks[0]) is not Block and isinstance(model.blocks[0], Block)
    with torch.set_grad_enabled(train):
        y, expected = model(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if train:
        y.square().sum().backward()
        expected.square().sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    else:
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(model), before, strict=True))
    pyops.unfuse(model)
    assert type(model) is Net and type(model.blocks[0]) is Block and [sorted(module.__dict__) for module in model.modules()] == attributes


class Flattening(Net):
    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 2)
        return self.head(self.blocks(x).flatten(1))


@pytest.mark.parametrize("network", [Flattening, Net])
def test_images_in_channels_last_inside(network):
    """Also where the network's own forward was rewritten, and where it calls `view`."""
    model, x, seen = pyops.fuse(network().eval()), torch.randn(2, 3, 16, 16), []
    model.blocks.register_forward_pre_hook(lambda _, images: seen.append(images[0].is_contiguous(memory_format=torch.channels_last)))
    with torch.no_grad():
        model(x)
        model(x)
    assert seen == [True, True]


def test_what_is_said_of_a_module(capsys):
    """Of the second model as of the first: what was found out about a class stays that."""

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())

        def forward(self, x):
            return self.inner(x)

    class Around(Outer):
        def __init__(self):
            super().__init__()
            self.inner = Outer()

    for _ in range(2):
        pyops.fuse(Outer(), verbose=True)
        assert capsys.readouterr().out.splitlines() == [
            "inner (Sequential): pyops.nn.Sequential",
            "the model (Outer): images in channels_last inside",
        ]
    model = pyops.fuse(Around(), verbose=True)
    assert type(model.inner) is Outer and "inner (Outer)" not in capsys.readouterr().out


def test_copies_and_files(tmp_path):
    model, x = pyops.fuse(Net().eval()), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for copied in (copy.deepcopy(model), loaded):
            assert type(copied) is type(model) and torch.equal(copied(x), expected)
            assert type(pyops.unfuse(copied)) is Net


def test_example_inputs_are_compared():
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = torch.nn.Conv2d(3, 4, 1), 0

        def forward(self, x):
            self.calls += 1
            return torch.relu(self.conv(x)) + self.calls

    model = Wrong()
    with pytest.raises(RuntimeError, match="fuse: example_inputs: the fused model's outputs differ"):
        pyops.fuse(model, example_inputs=torch.randn(1, 3, 4, 4))
    assert type(model) is Wrong
    net = Net()
    assert pyops.fuse(net, example_inputs=(torch.randn(1, 3, 16, 16),)) is net and net.training
