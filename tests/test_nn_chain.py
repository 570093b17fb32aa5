"""Layers that run as one call, against the same layers run one by one by torch's own Sequential."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pyops
from pyops.nn import Sequential
from pyops.nn.chain import ADD, Chained, ConvChain
from pyops.ops import _conv_run
from pyops.testing import relative_error

from .conftest import assert_gate
from .models import doubled, liven

FEW = 12  # channels: fewer than Winograd's convolution, which the gate does not hold, takes


def conv(kernel_size=3, inputs=FEW, outputs=FEW, **options):
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, **options)


def norm():
    return nn.BatchNorm2d(FEW)


IMAGE = (2, FEW, 9, 8)
CHAINS = {
    "conv": (lambda: [conv()], IMAGE),
    "conv_relu": (lambda: [conv(), nn.ReLU(inplace=True)], IMAGE),
    "conv_bn": (lambda: [conv(bias=False), norm()], IMAGE),
    "conv_bn_relu": (lambda: [conv(), norm(), nn.ReLU()], IMAGE),
    "conv_relu_pool": (lambda: [conv(), nn.ReLU(), nn.MaxPool2d(2)], IMAGE),
    "conv_bn_silu_pool": (lambda: [conv(5, bias=False), norm(), nn.SiLU(), nn.AvgPool2d(2)], IMAGE),
    "conv_pool": (lambda: [conv(1), nn.MaxPool2d(3, 2, 1)], IMAGE),
    "pool_ceil": (lambda: [conv(), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], IMAGE),
    "pointwise": (lambda: [conv(1, bias=False), norm(), nn.GELU()], IMAGE),
    "depthwise": (lambda: [conv(groups=FEW, bias=False), norm(), nn.Hardswish()], IMAGE),
    "depthwise_bias": (lambda: [conv(groups=FEW), nn.ReLU6()], IMAGE),
    "grouped_stride": (lambda: [conv(groups=4, stride=2), norm(), nn.LeakyReLU()], IMAGE),
    "nearest": (lambda: [nn.Upsample(scale_factor=2), conv(bias=False), norm(), nn.ReLU()], IMAGE),
    "bilinear": (lambda: [nn.Upsample(scale_factor=2, mode="bilinear"), conv(), nn.ReLU(), nn.MaxPool2d(2)], IMAGE),
    "reflected": (lambda: [conv(padding_mode="reflect"), norm(), nn.ReLU()], IMAGE),
    "identity": (lambda: [conv(), nn.Identity(), nn.ReLU()], IMAGE),
    "unknown": (lambda: [conv(), nn.Softplus(), conv(1), nn.LeakyReLU(0.3), nn.GELU("tanh")], IMAGE),
    "several": (lambda: [conv(), nn.ReLU(), conv(bias=False), norm(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 5)], IMAGE),
    "linear": (lambda: [nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)], (6, 20)),
    "linear_of_three_dimensions": (lambda: [nn.Linear(20, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, 7)], (2, 3, 20)),
    "one_row": (lambda: [nn.Linear(20, 24), nn.Sigmoid()], (20,)),
    "empty": (lambda: [], (2, 3)),
}
every_chain = pytest.mark.parametrize("name", CHAINS)
layouts = pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])


def draw_input(name, last=False):
    x = torch.randn(CHAINS[name][1])
    return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x


def pair(name, seed=0):
    """Ours, and torch's Sequential of copies of its layers."""
    torch.manual_seed(seed)
    ours = Sequential(*CHAINS[name][0]())
    liven(ours)
    return ours, nn.Sequential(*copy.deepcopy(list(ours)))


@every_chain
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(name, last, dtype):
    def draw(seed):
        ours, theirs = pair(name, seed)
        x = draw_input(name, last).to(dtype)
        with torch.no_grad():
            found, eager = ours.eval().to(dtype)(x), theirs.eval().to(dtype)(x)
            assert found.dtype == dtype and found.stride() == eager.stride()
            return [found], [theirs.double()(x.double())], [eager]

    assert_gate(draw, dtype)


@every_chain
@layouts
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_running_statistics(name, last, training):
    def step(model, x):
        x = x.clone().requires_grad_()
        y = model.train(training)(x)
        (y**2).mean().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]

    def draw(seed):
        ours, theirs = pair(name, seed)
        truth, x = copy.deepcopy(theirs).double(), draw_input(name, last)
        return step(ours, x), step(truth, x.double()), step(theirs, x)

    assert_gate(draw, torch.float32, gradient=True)


class Block(Chained, nn.Module):
    """Layers by name, and the order in which they run."""

    def __init__(self, order, **layers):
        super().__init__()
        self.order = order
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, input, residual=None):
        return self.chain(*self.order)(input) if residual is None else self.chain(*self.order)(input, residual)


def one_by_one(block, input, residual=None):
    for name in block.order:
        if name != ADD:
            input = block._modules[name](input)
        elif residual is not None:
            input = input + residual
    return input


BLOCKS = {
    "bn_add_relu": lambda: Block(("conv", "norm", ADD, "act"), conv=conv(bias=False), norm=norm(), act=nn.ReLU()),
    "add_silu": lambda: Block(("conv", ADD, "act"), conv=conv(), act=nn.SiLU()),
    "bn_add": lambda: Block(("conv", "norm", ADD), conv=conv(1, bias=False), norm=norm()),
    "depthwise": lambda: Block(("conv", "norm", ADD, "act"), conv=conv(groups=FEW, bias=False), norm=norm(), act=nn.ReLU6()),
    "add_relu_pool": lambda: Block(("conv", "norm", ADD, "act", "pool"), conv=conv(), norm=norm(), act=nn.ReLU(), pool=nn.MaxPool2d(2)),
    "relu_add": lambda: Block(("conv", "norm", "act", ADD), conv=conv(), norm=norm(), act=nn.ReLU()),
    "add_bn": lambda: Block(("conv", ADD, "norm", "act"), conv=conv(), norm=norm(), act=nn.ReLU()),
    "no_norm": lambda: Block(("conv", "norm", ADD, "act"), conv=conv(), norm=nn.Identity(), act=nn.ReLU()),
}


def block_pair(name, seed=0):
    torch.manual_seed(seed)
    ours = BLOCKS[name]()
    liven(ours)
    return ours, copy.deepcopy(ours)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_residual_gradients(name, training):
    def step(run, model, *inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        y = run(*inputs)
        (y**2).mean().backward()
        return [y.detach(), *(x.grad for x in inputs), *(p.grad for p in model.parameters())]

    def draw(seed):
        ours, theirs = (model.train(training) for model in block_pair(name, seed))
        truth, inputs = copy.deepcopy(theirs).double(), (torch.randn(IMAGE), torch.randn(IMAGE))
        eager = step(lambda *xs: one_by_one(theirs, *xs), theirs, *inputs)
        return step(ours, ours, *inputs), step(lambda *xs: one_by_one(truth, *xs), truth, *doubled(inputs)), eager

    assert_gate(draw, torch.float32, gradient=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_inference(name):
    def draw(seed):
        ours, theirs = (model.eval() for model in block_pair(name, seed))
        x, r = torch.randn(IMAGE), torch.randn(IMAGE)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), one_by_one(theirs, x), rtol=1e-5, atol=1e-5)  # without one
            return [ours(x, r)], [one_by_one(copy.deepcopy(theirs).double(), x.double(), r.double())], [one_by_one(theirs, x, r)]

    assert_gate(draw, torch.float32)


def test_residuals_that_kernels_do_not_take():
    """One to be repeated, and one whose dtype widens the sum under autocast."""
    for training in (False, True):
        ours, theirs = (model.train(training) for model in block_pair("bn_add_relu"))
        x = torch.randn(IMAGE)
        for residual in (torch.randn(FEW, 1, 1), torch.randn(1, FEW, 1, 1), torch.randn(2, 1, 9, 8)):
            with torch.set_grad_enabled(training):
                torch.testing.assert_close(ours(x, residual), one_by_one(theirs, x, residual), rtol=1e-4, atol=1e-5)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            found, expected = ours(x, torch.randn(IMAGE)), one_by_one(theirs, x, torch.randn(IMAGE))
            assert found.dtype == expected.dtype == torch.float32


def changes():
    """Every way in which layers change after they have run as one: of a Sequential (convolution, batch norm, ReLU)."""

    def write(model):
        model[0].weight.mul_(1.5)

    def write_data(model):
        model[0].weight.data.mul_(1.5)
        model.eval()

    def step(model):
        with torch.enable_grad():
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            model(torch.randn(IMAGE)).square().sum().backward()
            optimizer.step()

    def statistics(model):
        model[1].running_mean.add_(0.5)

    def load(model):
        model.load_state_dict(pair("conv_bn_relu", 5)[0].state_dict())

    def assign(model):
        model.load_state_dict(pair("conv_bn_relu", 5)[0].state_dict(), assign=True)

    def cast(model):
        model.to(torch.bfloat16).to(torch.float32)

    def replace(model):
        model[0] = conv()

    def other_activation(model):
        model[2] = nn.Softplus()

    def no_norm(model):
        model[1] = nn.Identity()

    def append(model):
        model.append(nn.MaxPool2d(2))

    def delete(model):
        del model[2]

    def option(model):
        model[1].eps = 0.5

    def norm_trains(model):
        model[1].train()

    def hook(model):
        model[1].register_forward_hook(lambda module, args, output: output * 2)

    def early_hook(model):
        model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def own_forward(model):
        model[0].forward = lambda x: torch.zeros(IMAGE)

    def parametrized(model):
        nn.utils.parametrizations.weight_norm(model[0])
        model[0].parametrizations.weight.original0.mul_(2)

    return [
        write, write_data, step, statistics, load, assign, cast, replace, other_activation, no_norm, append, delete, option, norm_trains,
        hook, early_hook, own_forward, parametrized,
    ]  # fmt: skip


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["sequential", "chained"])
def test_what_is_kept_follows_the_layers(change, kind):
    ours, _ = pair("conv_bn_relu")
    ours.eval()

    def names():
        return tuple(ours._modules)

    class Owner(Chained, nn.Module):
        def forward(self, x):
            return self.chain(*names())(x)

    if kind == "chained":  # an owner of the very layers
        owner = Owner()
        owner._modules = ours._modules
        owner.eval()
    model = ours if kind == "sequential" else owner
    x = torch.randn(IMAGE)
    with torch.no_grad():
        before = model(x)
        change(ours)
        model.train(model.training) if change.__name__ == "write_data" else None
        state = copy.deepcopy({key: value.clone() for key, value in ours.state_dict().items()})
        after = model(x)
        ours.load_state_dict(state)  # statistics that this call moved
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, nn.Sequential.forward(ours, x), rtol=1e-4, atol=1e-5)


def test_what_is_kept_follows_linear_layers():
    ours, _ = pair("linear")
    x = torch.randn(6, 20)
    changes = (
        lambda: ours[0].weight.mul_(2), lambda: ours[2].register_forward_hook(lambda module, args, output: -output),
        lambda: ours.__setitem__(1, nn.Softplus()), lambda: ours.__setitem__(0, nn.Linear(20, 24)),
    )  # fmt: skip
    with torch.no_grad():
        for change in changes:
            before = ours(x)
            change()
            assert not torch.equal(ours(x), before)
            torch.testing.assert_close(ours(x), nn.Sequential.forward(ours, x))


def test_hooks_run_once_each():
    ours, _ = pair("several")
    calls = []
    for name, layer in ours.named_children():
        layer.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    with torch.no_grad():
        ours.eval()(draw_input("several"))
    assert calls == [str(i) for i in range(8)]


def test_synchronised_batch_norm():
    ours, theirs = pair("conv_bn_relu")
    x = draw_input("conv_bn_relu")
    with torch.no_grad():
        ours.eval()(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        assert type(converted) is Sequential and type(converted[1]) is nn.SyncBatchNorm
        torch.testing.assert_close(converted(x), theirs.eval()(x))
        converted[1].weight.mul_(2)
        theirs[1].weight.mul_(2)
        torch.testing.assert_close(converted(x), theirs(x))


@pytest.mark.parametrize("name", ["several", "linear"])
def test_copies_share_nothing_and_nothing_is_saved(name):
    ours, _ = pair(name)
    x, keys = draw_input(name), list(ours.eval().state_dict())
    saved = io.BytesIO()
    with torch.no_grad():
        before = ours(x)
        torch.save(ours, saved)
        saved.seek(0)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)):
            assert torch.equal(copied(x), before) and list(copied.state_dict()) == keys
            copied[0].weight.mul_(2)
            assert not torch.equal(copied(x), before)
        assert torch.equal(ours(x), before)
    assert [name for name, _ in ours.named_modules()] == ["", *(str(i) for i in range(len(ours)))]


def test_a_block_registers_nothing():
    ours, _ = block_pair("bn_add_relu")
    names, keys = list(dict(ours.named_modules())), list(ours.state_dict())
    with torch.no_grad():
        before = ours.eval()(torch.ones(IMAGE), torch.ones(IMAGE))
        assert list(dict(ours.named_modules())) == names == ["", "conv", "norm", "act"] and list(ours.state_dict()) == keys
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            copied.conv.weight.mul_(2)
            assert not torch.equal(copied(torch.ones(IMAGE), torch.ones(IMAGE)), before)
        assert torch.equal(ours(torch.ones(IMAGE), torch.ones(IMAGE)), before)


@pytest.mark.parametrize("name", ["conv_relu_pool", "several", "linear", "nearest"])
@pytest.mark.parametrize("training", [False, True])
def test_autocast(name, training):
    ours, theirs = pair(name)
    x = draw_input(name)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        found, expected = ours.train(training)(x), theirs.train(training)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_images_without_a_batch():
    ours, theirs = pair("conv_relu_pool")
    with torch.no_grad():
        x = torch.randn(IMAGE[1:])
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["conv_bn_relu", "conv_relu_pool", "linear"])
def test_scattered_and_empty_inputs(name):
    ours, theirs = (model.eval() for model in pair(name))
    x = draw_input(name)
    wide = torch.stack([x, -x], -1)
    with torch.no_grad():
        torch.testing.assert_close(ours(wide[..., 0]), theirs(x), rtol=1e-5, atol=1e-5)
        turned = x.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
        torch.testing.assert_close(ours(turned), theirs(x.flip(-1)), rtol=1e-5, atol=1e-5)
        assert ours(x[:0]).shape == theirs(x[:0]).shape


def test_inference_mode():
    ours, theirs = pair("several")
    x = draw_input("several")
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
        inside = copy.deepcopy(ours)
        torch.testing.assert_close(inside(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda: pair("several")[0], lambda: block_pair("bn_add_relu")[0]], ids=["sequential", "block"])
def test_fullgraph(make, training):
    torch._dynamo.reset()
    model = make().train(training)
    inputs = [torch.randn(IMAGE)] * (2 if isinstance(model, Block) else 1)
    with torch.set_grad_enabled(training):
        expected = copy.deepcopy(model)(*inputs)
        for _ in range(2):  # before and after it has run as one
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
            model(*inputs)
            torch._dynamo.reset()


def test_traced():
    """torch.jit.trace sees torch's own layers."""
    ours, theirs = (model.eval() for model in pair("several"))
    x = draw_input("several")
    with torch.no_grad():
        ours(x)
        traced = torch.jit.trace(ours, (x,))
        torch.testing.assert_close(traced(2 * x), theirs(2 * x), rtol=1e-5, atol=1e-5)


def test_slices_are_sequences_too():
    ours, theirs = pair("several")
    part = ours.eval()[2:5]
    assert type(part) is Sequential
    with torch.no_grad():
        torch.testing.assert_close(part(torch.ones(IMAGE)), theirs.eval()[2:5](torch.ones(IMAGE)))


def test_neighbours_do_run_as_one():
    if pyops._library.not_loaded_reason():
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    ours = Sequential(conv(3, 16, 32), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        truth = copy.deepcopy(ours).double()(x.double())
        with torch.profiler.profile() as profile:
            found = ours(x)
        assert relative_error([(found, truth)]) < 5e-6  # what the docs promise of Winograd's method
    names = {event.name for event in profile.events()}
    assert not {"aten::batch_norm", "aten::relu", "aten::relu_", "aten::max_pool2d"} & names


@pytest.mark.parametrize("residual", [False, True])
def test_a_convolution_without_norm_trains_by_winograds_method(residual, monkeypatch):
    torch.manual_seed(0)
    owner = torch.nn.Module()
    owner.conv, owner.relu = torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(inplace=True)
    chain = ConvChain([owner.conv, owner.relu], 1 if residual else None)
    x = torch.randn(4, 64, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    beside = torch.randn_like(x) if residual else None
    called = []
    real = _conv_run.convolve
    monkeypatch.setattr(_conv_run, "convolve", lambda *args, **kwargs: called.append(1) or real(*args, **kwargs))

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), (x, owner.conv.weight, owner.conv.bias))

    y = chain(x, beside)
    expected = owner.conv(x) if beside is None else owner.conv(x) + beside
    expected = expected.relu()
    assert called == [1]
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(gradients(y), gradients(expected), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
