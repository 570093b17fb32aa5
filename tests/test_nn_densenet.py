"""DenseNet's blocks against the same layers run one by one: values, gradients, statistics, memory, and what they keep."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyops
from pyops import _library
from pyops.nn import DenseBlock, DenseLayer, DenseTransition
from pyops.testing import relative_error, within_gate

from .conftest import assert_gate

kernels = pytest.mark.skipif(_library.not_loaded_reason() is not None, reason=str(_library.not_loaded_reason()))
MAKE = {
    "block": (lambda: DenseBlock(3, 13, 4, 3), 13),  # too few channels for Winograd's method: the gate holds
    "one_layer": (lambda: DenseBlock(1, 5, 2, 7), 5),
    "layer": (lambda: DenseLayer(20, 3), 20),
    "transition": (lambda: DenseTransition(20, 11), 20),
    "transition_max": (lambda: DenseTransition(20, 11, nn.MaxPool2d(3, 2, 1)), 20),
    "transition_ceil": (lambda: DenseTransition(20, 11, nn.AvgPool2d(2, ceil_mode=True)), 20),
}
everything = pytest.mark.parametrize("name", MAKE)


def build(name, seed=0):
    make, channels = MAKE[name]
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3), part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5), part.bias.normal_(0, 0.3)
    return module, channels


def image(*shape, seed=0, dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=layout)


def as_eager(module):
    """A copy whose layers are PyTorch's: a hook on a part keeps the kernels out."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part.register_forward_hook(lambda *_: None)
    return twin


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(name, dtype):
    draws = []
    for seed in range(8):
        module, channels = build(name, seed)
        module.eval().to(dtype)
        x = image(2, channels, 7, 6, seed=seed, dtype=dtype)
        with torch.no_grad():
            found, eager, truth = module(x), as_eager(module)(x), as_eager(module).double()(x.double())
        assert found.shape == eager.shape and found.is_contiguous(memory_format=torch.channels_last)
        draws.append((found, truth, eager))
    assert within_gate(draws, dtype) is None


@kernels
def test_large_blocks_by_winograds_method():
    torch.manual_seed(0)
    block = DenseBlock(3, 64, 4, 32).eval()
    x = image(1, 64, 28, 28)
    with torch.no_grad():
        block(x)  # the filters are transformed once
        with Watch() as watch:
            found = block(x)
    assert any("winograd_into" in op for op in watch.seen) and not any("aten.cat" in op for op in watch.seen)
    assert relative_error([(found, as_eager(block).double()(x.double()))]) <= 5e-6


def step(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], cotangent), *(b.detach() for b in module.buffers())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@everything
def test_training(name, training):
    module, channels = build(name)
    module.train(training)

    def draw(seed):
        x = image(4, channels, 7, 6, seed=seed)
        wide = [t.double() for t in step(as_eager(module).double(), x.double())]
        return step(copy.deepcopy(module), x), wide, step(as_eager(module), x)

    assert_gate(draw, torch.float32, gradient=True)


@kernels
def test_a_training_step_joins_nothing_and_saves_little():
    block, channels = build("block")
    x = image(4, channels, 14, 14).requires_grad_()

    def saved_by(module):
        kept = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
            ),
            Watch() as watch,
        ):
            y = module(x)
        y.sum().backward()
        return sum(t.untyped_storage().nbytes() for t in kept.values()), watch.seen

    ours, seen = saved_by(block)
    assert not any("aten.cat" in op or "native_batch_norm" in op for op in seen)
    assert ours < 0.45 * saved_by(as_eager(block))[0]


@kernels
@pytest.mark.parametrize("growths", [3, 9])
def test_memory_grows_by_what_a_layer_adds(growths):
    """What is saved by 2 * L layers is at most twice, and a little, what L save: nothing is saved of each prefix."""
    x = image(2, 8, 12, 12)

    def saved(layers):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            DenseBlock(layers, 8, 4, growths)(x)
        return sum(t.untyped_storage().nbytes() for t in kept.values() if t.dim() == 4 and t.shape[2:] == x.shape[2:])

    assert saved(8) <= 2.05 * saved(4)


def test_running_statistics_after_many_steps():
    block, channels = build("block")
    for norm in (part for part in block.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = None
    twin = as_eager(block)
    for seed in range(5):
        x = image(3, channels, 7, 6, seed=seed).requires_grad_()
        block(x), twin(x)
    for (name, found), expected in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", ["no_bias", "no_counter"])
def test_unusual_batch_norms_train(change):
    block, channels = build("block")
    if change == "no_bias":
        block.denselayer2.norm1 = nn.BatchNorm2d(block.denselayer2.norm1.num_features)
        block.denselayer2.norm1.register_parameter("bias", None)
    else:
        block.denselayer2.norm2.num_batches_tracked = None
    x, twin = image(2, channels, 7, 6), as_eager(block)
    for one in (block, twin):
        one(x).square().sum().backward()
    for p, q in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    for found, expected in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_value_per_channel_is_refused_in_training():
    block, channels = build("block")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(image(1, channels, 1, 1))


def test_partly_frozen():
    block, channels = build("block")
    block.denselayer2.requires_grad_(False)
    x = image(2, channels, 7, 6)
    block(x).sum().backward()
    twin = as_eager(block)
    twin.zero_grad(), twin.load_state_dict(build("block")[0].state_dict())
    twin(x).sum().backward()
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == ("denselayer2" in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_torchvisions_names():
    names = list(build("block")[0].state_dict())
    layer = ["norm1.weight", "norm1.bias", "norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked", "conv1.weight"]
    assert names[:6] == [f"denselayer1.{n}" for n in layer] and names[11] == "denselayer1.conv2.weight"
    assert [n for n in build("transition")[0].state_dict() if "norm" not in n] == ["conv.weight"]


@everything
def test_what_is_kept(name):
    """Changed parameters, dtypes and modes are seen; copies and pickles work; nothing kept is in the state."""
    module, channels = build(name)
    x = image(1, channels, 7, 6)
    with torch.no_grad():
        for change in (
            lambda m: m.eval(),
            lambda m: [p.mul_(0.7) for p in m.parameters()],
            lambda m: [b.add_(0.1) for n, b in m.named_buffers() if "running" in n],
            lambda m: m.double().float(),
            lambda m: [setattr(part, "eps", 0.3) for part in m.modules() if isinstance(part, nn.BatchNorm2d)],
            lambda m: m.register_forward_hook(lambda *_: None),
        ):
            change(module)
            for twin in (module, copy.deepcopy(module), *([] if module._forward_hooks else [pickle.loads(pickle.dumps(module))])):
                torch.testing.assert_close(twin(x), as_eager(module)(x), rtol=1e-4, atol=1e-5)
    assert not any("ready" in key for key in module.state_dict())


@everything
def test_other_layouts_and_no_images(name):
    module, channels = build(name)
    module.eval()
    x = image(2, channels, 7, 6)
    with torch.no_grad():
        expected = module(x)
        found = module(x.contiguous(memory_format=torch.contiguous_format))
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module(x.repeat_interleave(2, -1)[..., ::2]), expected, rtol=1e-5, atol=1e-5)
        assert module(x[:0]).shape == (0, *expected.shape[1:])


def test_wrong_channels_are_pytorchs_error():
    for name in MAKE:
        module, channels = build(name)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"channels|running_mean"):
            module.eval()(image(1, channels + 1, 7, 6))


def test_layer_takes_a_list():
    layer, _ = build("layer")
    x = image(2, 20, 7, 6)
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(layer([x[:, :7], x[:, 7:]]), layer(x))


@pytest.mark.parametrize("change", ["dropout", "replaced", "sync", "frozen_statistics", "autocast", "autocast_wide", "eager"])
def test_what_kernels_do_not_know_is_pytorchs(change):
    block, channels = build("block")
    x = image(8, channels, 7, 6)
    if change == "autocast":
        x = x.bfloat16()
    elif change == "dropout":
        for layer in block.values():
            layer.drop_rate = 0.5
    elif change == "replaced":
        block.denselayer2.relu1 = nn.SiLU()
    elif change == "sync":
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
        block.eval()
    elif change == "frozen_statistics":
        block.denselayer2.norm1.eval()
    elif change == "eager":
        block.backend = "eager"
    twin = as_eager(block)
    with torch.autocast("cpu", enabled="autocast" in change):
        torch.manual_seed(1)
        found = block(x)
        torch.manual_seed(1)
        expected = twin(x)
    assert found.dtype == expected.dtype
    tolerance = dict(rtol=0.05, atol=0.05) if "autocast" in change else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, **tolerance)


def test_compile():
    block, channels = build("block")
    for mode in (True, False):
        block.train(mode)
        with torch.set_grad_enabled(mode):
            x = image(2, channels, 7, 6)
            compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), as_eager(block)(x), rtol=1e-4, atol=1e-5)


@kernels
def test_packed_weights_are_the_same_product():
    torch.manual_seed(0)
    x, weight, bias = image(2, 37, 5, 4), torch.randn(19, 37), torch.randn(19)
    from pyops.ops import _pointwise_ops

    outputs = [torch.empty(2, 19, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    for out, w in zip(outputs, (weight, _pointwise_ops.pack(weight)), strict=True):
        torch.ops.pyops.pointwise_into(out, x, w, None, None, None, 0, 0.0, bias, None, None, 1, 0.0)
    assert torch.equal(*outputs)
    for wrong in (_pointwise_ops.pack(weight)[:1], _pointwise_ops.pack(weight)[..., :8], _pointwise_ops.pack(weight).double()):
        with pytest.raises(RuntimeError, match="weight"):
            torch.ops.pyops.pointwise_into(outputs[0], x, wrong, None, None, None, 0, 0.0, bias, None, None, 1, 0.0)


def test_errors():
    with pytest.raises(ValueError, match="DenseLayer: growth_rate: expected 1 or more, got 0"):
        DenseLayer(4, 0)
    with pytest.raises(ValueError, match="DenseBlock: num_layers: expected 1 or more"):
        DenseBlock(0, 4)
    with pytest.raises(TypeError, match=r"ConvBNAct: pool: expected a torch.nn.MaxPool2d or AvgPool2d, got ReLU"):
        pyops.nn.ConvBNAct(4, 4, pool=nn.ReLU())
    with pytest.raises(ValueError, match='UpsampleConvBNAct: mode: expected "nearest" or "bilinear", got \'bicubic\''):
        pyops.nn.UpsampleConvBNAct(4, 4, mode="bicubic")
