"""pyops.fuse and everything else that people do with a model: hooks, copies, files, compilers, precisions, training tools."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import pyops
from pyops._fusion import classes

from .fusing import check_fused, facts, leaves, results


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Classic(nn.Module):
    """As the first tutorial has it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 32)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 6), nn.LSTM(6, 8, bidirectional=True, batch_first=True), nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


IMAGES = lambda: (torch.randn(2, 3, 14, 14),)  # noqa: E731
TOKENS = lambda: (torch.randint(11, (3, 7)),)  # noqa: E731
MODELS = {Residual: IMAGES, Classic: IMAGES, Tagger: TOKENS, Encoder: TOKENS}
NETWORKS = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def pair(kind: type[nn.Module], train: bool = False) -> tuple[nn.Module, nn.Module, tuple]:
    """(fused, as it was, inputs)"""
    torch.manual_seed(0)
    model = kind().train(train)
    twin = copy.deepcopy(model)
    pyops.fuse(model)
    assert any(classes.is_fused(part) for part in model.modules())
    return model, twin, MODELS[kind]()


def assert_same(model: nn.Module, twin: nn.Module, inputs: tuple, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(results(model, inputs), results(twin, inputs), rtol=rtol, atol=atol)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@NETWORKS
def test_numbers(kind, train):
    torch.manual_seed(0)
    assert check_fused(kind(), MODELS[kind], train, images_last=kind is Residual)


@NETWORKS
def test_hooks(kind):
    model, twin, inputs = pair(kind)

    def watch(network):
        calls: list = []
        names = {part: name for name, part in network.named_modules()}

        def before(part, given):
            calls.append((names[part], "before", leaves(given)))

        def after(part, given, output):
            calls.append((names[part], "after", [t.clone() for t in leaves(output)]))

        watched = [part for name, part in network.named_modules() if name and "encoder.layers" not in name]
        handles = [handle for part in watched for handle in (part.register_forward_pre_hook(before), part.register_forward_hook(after))]
        try:
            with torch.no_grad():
                network(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    found, expected = watch(model), watch(twin)
    assert [call[:2] for call in found] == [call[:2] for call in expected]
    for (*_, ours), (*_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(model, twin, inputs)


@NETWORKS
def test_backward_hooks(kind):
    model, twin, inputs = pair(kind, train=True)
    seen: dict = {}
    for network in (model, twin):
        seen[network] = calls = []
        for name, part in network.named_modules():
            if isinstance(part, (nn.Linear, nn.LSTM, nn.Conv2d)) and "encoder" not in name:
                part.register_full_backward_hook(lambda part, into, out, name=name, calls=calls: calls.append((name, out[0].clone())))
        results(network, inputs)
    assert seen[model] and [name for name, _ in seen[model]] == [name for name, _ in seen[twin]]
    torch.testing.assert_close([g for _, g in seen[model]], [g for _, g in seen[twin]], rtol=1e-3, atol=1e-5)


def test_shared_modules():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block(3)
            self.blocks, self.again = nn.Sequential(block, block), block
            self.again.bn2 = block.bn1

        def forward(self, x):
            return self.again(self.blocks(x))

    torch.manual_seed(0)
    for train in (False, True):
        assert check_fused(Shared(), IMAGES, train)


CHANGES = {
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.blocks[0].conv1),
    "weight_norm": lambda m: parametrizations.weight_norm(m.blocks[0].conv2),
    "prune_conv": lambda m: prune.l1_unstructured(m.blocks[0].conv1, "weight", 0.5),
    "prune_linear": lambda m: prune.random_unstructured(m.head, "weight", 0.5),
    "frozen": lambda m: m.blocks[0].requires_grad_(False),
    "frozen_norm": lambda m: m.blocks[0].bn1.eval(),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers(change, late):
    torch.manual_seed(0)
    model = Residual()
    if not late:
        CHANGES[change](model)
    twin, inputs = Residual(), IMAGES()
    if not late:
        CHANGES[change](twin)
    twin.load_state_dict(model.state_dict())
    pyops.fuse(model)
    if late:
        results(model.eval(), inputs), results(twin.eval(), inputs)
        model.train(), twin.train()
        for network in (model, twin):
            torch.manual_seed(2)
            CHANGES[change](network)
    assert_same(model, twin, inputs, 1e-3)
    assert_same(model.eval(), twin.eval(), inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised():
    """Linear layers become dynamic ones in a fused model too; a fused LSTM is of another class than the tool knows and stays."""
    model, twin, inputs = pair(Classic)
    quantised = [torch.ao.quantization.quantize_dynamic(network, {nn.Linear}) for network in (model, twin)]
    assert type(quantised[0].fc1) is type(quantised[1].fc1) is not nn.Linear
    assert_same(*quantised, inputs, 1e-2, 1e-2)
    tagger = torch.ao.quantization.quantize_dynamic(Tagger().eval())
    assert_same(pyops.fuse(copy.deepcopy(tagger)), tagger, TOKENS())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@NETWORKS
def test_jit_trace(kind):
    model, twin, inputs = pair(kind)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs)
        torch.testing.assert_close(traced(*inputs), twin(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("kind", [Residual, Classic], ids=lambda kind: kind.__name__)
def test_jit_script(kind):
    """It reads the modules as they were; the classes that recurrent layers and attention change to have no TorchScript."""
    model, twin, inputs = pair(kind)
    before = facts(model)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(*inputs), twin(*inputs))
    assert facts(model) == before
    assert_same(model, twin, inputs)
    around = nn.Sequential(scripted)
    assert facts(pyops.fuse(around)) == facts(nn.Sequential(scripted))


@NETWORKS
def test_export(kind):
    model, twin, inputs = pair(kind)
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), twin(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Residual, Classic, Tagger], ids=lambda kind: kind.__name__)
def test_symbolic_trace(kind):
    model, twin, inputs = pair(kind)
    traced = torch.fx.symbolic_trace(model)
    assert_same(traced, twin, inputs)
    assert facts(pyops.fuse(traced))[0][1] is type(traced)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@NETWORKS
def test_compile(kind, backend):
    model, twin, inputs = pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=kind is not Tagger, backend=backend)  # which breaks at recurrent layers
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), twin(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@NETWORKS
def test_autocast(kind, train):
    model, twin, inputs = pair(kind, train)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (network(*inputs) for network in (model, twin))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@NETWORKS
def test_other_dtypes(kind, dtype):
    model, twin, inputs = pair(kind)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        model(*(x.float() if x.is_floating_point() else x for x in inputs))
        ours, theirs = (network.to(dtype)(*inputs) for network in (model, twin))
    assert ours.dtype == dtype
    near = 1e-9 if dtype == torch.float64 else 0.03
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["", "weights_last"])
def test_layouts(given, weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(8)).eval()
    twin = copy.deepcopy(model)
    model = pyops.fuse(model).to(memory_format=weights)
    (x,) = IMAGES()
    x = x.contiguous(memory_format=given)
    with torch.no_grad():
        y, expected = model(x), twin(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@NETWORKS
def test_meta(kind):
    model, twin, inputs = pair(kind)
    with torch.no_grad():
        ours, theirs = (network.to("meta")(*(x.to("meta") for x in inputs)) for network in (model, twin))
    assert ours.is_meta and ours.shape == theirs.shape and ours.dtype == theirs.dtype


@NETWORKS
def test_functional_call(kind):
    model, twin, inputs = pair(kind)
    values = {name: value.detach() * 1.5 for name, value in model.named_parameters()}
    with torch.no_grad():
        model(*inputs)
        ours, theirs = (torch.func.functional_call(network, values, inputs) for network in (model, twin))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_same(model, twin, inputs)


@pytest.mark.parametrize("kind", [Residual, Classic], ids=lambda kind: kind.__name__)
def test_per_sample_gradients(kind):
    model, twin, (x,) = pair(kind)

    def gradients(network):
        values = {name: value.detach() for name, value in network.named_parameters()}

        def loss(values, sample):
            return torch.func.functional_call(network, values, (sample[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)

    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-4, atol=1e-5)


@NETWORKS
def test_copies_and_files(kind):
    model, twin, inputs = pair(kind)
    with torch.no_grad():
        expected = model(*inputs)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (
            copy.deepcopy(model),
            copy.copy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):
            assert type(other) is type(model) and torch.equal(other(*inputs), expected)
            if other._modules is not model._modules:
                assert facts(pyops.unfuse(other)) == facts(twin)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file), strict=True)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", [Residual, Classic], ids=lambda kind: kind.__name__)
def test_checkpointing(kind, reentrant):
    model, twin, inputs = pair(kind, train=True)
    x = inputs[0].requires_grad_()
    for network in (model, twin):
        checkpoint(network, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@NETWORKS
def test_a_life(kind):
    """Steps of an optimizer, evaluation between them, an average of the weights, and weights loaded into it."""
    model, twin, inputs = pair(kind, train=True)
    start = copy.deepcopy(twin.state_dict())
    lives = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), 0.05, foreach=False)
        average = torch.optim.swa_utils.AveragedModel(network)
        seen = []
        for _ in range(3):
            network.train()
            optimizer.zero_grad()
            loss = network(*inputs).square().mean()
            loss.backward()
            optimizer.step()
            average.update_parameters(network)
            with torch.inference_mode():
                seen += [loss.detach(), network.eval()(*inputs).clone(), average.eval()(*inputs).clone()]
        network.load_state_dict(start)
        with torch.no_grad():
            seen.append(network(*inputs))
        lives.append(seen)
    torch.testing.assert_close(*lives, rtol=1e-3, atol=1e-4)


@NETWORKS
def test_a_second_time(kind):
    model, twin, inputs = pair(kind)
    before = facts(model)
    assert facts(pyops.fuse(model)) == before
    pyops.fuse(nn.ModuleDict({"inner": model}))
    assert_same(model, twin, inputs)
    assert facts(pyops.unfuse(pyops.unfuse(model))) == facts(twin)


def test_a_slice_is_unfused_too():
    model = pyops.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    part = model[:2]
    (x,) = IMAGES()
    torch.testing.assert_close(part(x), model[1](model[0](x)))
    assert type(pyops.unfuse(part)) is nn.Sequential


def test_a_second_derivative():
    """A gradient penalty: where a pass has no second derivative, it says so instead of leaving it out."""
    model, twin, (x,) = pair(Residual)

    def penalty(network):
        image = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(image).square().sum(), image, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), network.stem[0].weight)[0]

    torch.testing.assert_close(penalty(model), penalty(twin), rtol=1e-3, atol=1e-4)


def test_signatures_and_outputs():
    import inspect

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, pixel_values, plain=None, *, scale: float = 1.0):
            y = self.relu(self.conv(pixel_values)) * scale
            return {"y": y, "pair": (y, None), "plain": plain}

    signature = inspect.signature(Many().forward)
    model = pyops.fuse(Many())
    assert inspect.signature(model.forward) == signature
    (x,) = IMAGES()
    output = model(pixel_values=x, scale=2.0, plain=3)
    assert output["plain"] == 3 and output["pair"][1] is None and output["y"].is_contiguous()


def test_half_a_fusion_is_undone(monkeypatch):
    model = Residual()
    before = facts(model)
    become = classes.become

    def fail(module, *arguments, **attributes):
        if module is model.blocks[1]:
            raise TypeError("object layout differs")
        become(module, *arguments, **attributes)

    monkeypatch.setattr(classes, "become", fail)
    with pytest.raises(TypeError, match="object layout differs"), warnings.catch_warnings():
        pyops.fuse(model)
    assert facts(model) == before
