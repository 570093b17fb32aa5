"""The convolutional blocks against the same layers run one by one, and what they keep between calls."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyops
from pyops.nn import ConvBNAct, DropPath, MBConv, SqueezeExcitation, UpsampleConvBNAct
from pyops.testing import relative_error, within_gate


def one_by_one(module, x):
    """What torch computes from the same layers."""
    if isinstance(module, MBConv):
        y = module.stochastic_depth(one_by_one(module.block, x))
        return y + x if module.use_res_connect else y
    if isinstance(module, SqueezeExcitation):
        return module(x)
    if isinstance(module, nn.Sequential):
        for part in module:
            x = one_by_one(part, x)
        return x
    return module(x)


def shaken(module, seed=0):
    """Parameters and statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator) * 0.3)
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
                part.weight.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
                part.bias.copy_(torch.randn(part.num_features, generator=generator) * 0.3)
    return module


def image(*shape, seed=0, dtype=torch.float32, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=layout)


BLOCKS = {
    "s2": (MBConv, (16, 24, 3, 2), 13),
    "s3": (MBConv, (24, 24, 5, 1), 9),
    "no_expand": (MBConv, (32, 16, 3, 1, 1), 10),
    "no_squeeze": (MBConv, (12, 12, 3, 1, 6, 0, "relu6"), 7),
    "odd_channels": (MBConv, (13, 17, 7, 1, 3, 5, "hardswish"), 8),
    "one_channel": (MBConv, (1, 1, 3, 1, 1, 1, "relu"), 5),
    "depthwise": (lambda *a, **k: ConvBNAct(20, 20, 3, groups=20, activation="silu", **k), (), 9),
    "depthwise_dilated": (lambda *a, **k: ConvBNAct(20, 20, 3, 1, groups=20, dilation=2, activation=None, **k), (), 9),
    "pointwise": (lambda *a, **k: ConvBNAct(20, 28, 1, **k), (), 9),
    "stem": (lambda *a, **k: ConvBNAct(3, 24, 7, 2, pool=nn.MaxPool2d(3, 2, 1), **k), (), 21),
    "max_pool": (lambda *a, **k: ConvBNAct(12, 18, 3, activation="leaky_relu", pool=nn.MaxPool2d(2), **k), (), 12),
    "average_pool": (lambda *a, **k: ConvBNAct(12, 18, 3, activation="silu", pool=nn.AvgPool2d(2), **k), (), 13),
    "pool_ceil": (lambda *a, **k: ConvBNAct(12, 18, 3, pool=nn.MaxPool2d(2, ceil_mode=True), **k), (), 12),
    "depthwise_pool": (lambda *a, **k: ConvBNAct(20, 20, 3, groups=20, pool=nn.AvgPool2d((3, 2), 1, 1), **k), (), 9),
    "pointwise_pool": (lambda *a, **k: ConvBNAct(20, 28, 1, activation=None, pool=nn.AvgPool2d(3, 2, 1), **k), (), 9),
    "nearest": (lambda *a, **k: UpsampleConvBNAct(12, 18, **k), (), 6),
    "bilinear": (lambda *a, **k: UpsampleConvBNAct(12, 18, mode="bilinear", activation="gelu", **k), (), 6),
    "bilinear_pool": (lambda *a, **k: UpsampleConvBNAct(5, 7, 5, mode="bilinear", pool=nn.MaxPool2d(3, 2), **k), (), 5),
    "many_blocks": (MBConv, (72, 72, 3, 1, 6), 14),  # groups of hidden channels that two threads take as they are free
    "many_outputs": (MBConv, (80, 192, 5, 2, 6), 9),
    "grouped": (lambda *a, **k: ConvBNAct(20, 40, 3, 2, groups=4, activation="gelu", **k), (), 9),
}
every_block = pytest.mark.parametrize("name", list(BLOCKS))


def build(name, seed=0, **options):
    make, arguments, size = BLOCKS[name]
    torch.manual_seed(seed)
    block = shaken(make(*arguments, **options), seed).eval()
    first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    return block, (first.in_channels, size, size + 1)


@every_block
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(name, batch, dtype):
    draws = []
    for seed in range(8):
        block, shape = build(name, seed)
        block.to(dtype)
        x = image(batch, *shape, seed=seed, dtype=dtype)
        with torch.no_grad():
            found, eager, truth = block(x), one_by_one(block, x), one_by_one(copy.deepcopy(block).double(), x.double())
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        draws.append((found, truth, eager))
    reason = within_gate(draws, dtype)
    assert reason is None, reason


@every_block
def test_inference_keeps_the_layout_and_takes_no_images(name):
    block, shape = build(name)
    with torch.no_grad():
        x = image(2, *shape, layout=torch.contiguous_format)
        assert block(x).is_contiguous()
        torch.testing.assert_close(block(x), one_by_one(block, x))
        empty = torch.empty(0, *shape)
        assert block(empty).shape == one_by_one(block, empty).shape


def test_one_channel_and_replaced_paddings():
    """NCHW of one channel is channels_last as well: the output is NCHW. A convolution put in place with padding "same" runs as it is."""
    block = ConvBNAct(1, 32, 3).eval()
    with torch.no_grad():
        for N in (2, 64):
            assert block(torch.randn(N, 1, 28, 28)).is_contiguous()
        x = image(2, 1, 9, 9)
        block[0] = nn.Conv2d(1, 32, 3, padding="same", bias=False)
        torch.testing.assert_close(block(x), one_by_one(block, x))
        with pytest.raises(ValueError, match=r"input: expected \[N, 16, H, W\]"):
            ConvBNAct(16, 16, 3).eval()(torch.randn(16, 9, 9))


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_running_statistics(name, training):
    ours, shape = build(name)
    theirs = copy.deepcopy(ours)
    ours.train(training), theirs.train(training)
    for step in range(3):
        x = image(4, *shape, seed=step).requires_grad_()
        y = image(4, *shape, seed=step).requires_grad_()
        found, expected = ours(x), one_by_one(theirs, y)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.square().mean().backward()
        expected.square().mean().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-6)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


def test_names_are_torchvisions():
    """The keys of torchvision's efficientnet_b0().features[2][0]."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = []
    for index in (0, 1, 3):
        keys += [f"block.{index}.0.weight", *(f"block.{index}.1.{key}" for key in norm)]
        if index == 1:
            keys += [f"block.2.{layer}.{key}" for layer in ("fc1", "fc2") for key in ("weight", "bias")]
    assert list(MBConv(16, 24, 3, 2).state_dict()) == keys


def changes():
    """Every way in which weights change under a block that keeps folded ones."""

    def step(block):
        with torch.enable_grad():
            optimizer = torch.optim.SGD(block.parameters(), 0.1)
            block(torch.randn(2, *build("s3")[1])).square().sum().backward()
            optimizer.step()

    def statistics(block):
        block.train()
        block(torch.randn(4, *build("s3")[1]))
        block.eval()

    def write(block):
        block.block[1][0].weight.mul_(1.5)

    def write_data(block):
        block.block[1][0].weight.data.mul_(1.5)
        block.eval()

    def replace(block):
        block.block[3][0].weight = nn.Parameter(block.block[3][0].weight * 2)

    def swap(block):
        block.block[1][1] = shaken(nn.BatchNorm2d(144), 5).eval()

    def load(block):
        block.load_state_dict(build("s3", 7)[0].state_dict())

    def assign(block):
        block.load_state_dict(build("s3", 7)[0].state_dict(), assign=True)

    def cast(block):
        block.to(torch.bfloat16).to(torch.float32)

    def hook(block):
        block.block[1].register_forward_hook(lambda module, args, output: output * 2)

    def one_norm_trains(block):
        block.block[1][1].train()

    return [step, statistics, write, write_data, replace, swap, load, assign, cast, hook, one_norm_trains]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_what_is_kept_follows_the_weights(change):
    block, shape = build("s3")
    x = image(2, *shape)
    with torch.no_grad():
        before = block(x)
        change(block)
        after = block(x)
        assert not torch.equal(before, after)
        expected = block.block(x) + x if change.__name__ == "hook" else one_by_one(copy.deepcopy(block), x)
        assert relative_error([(after, expected)]) < 1e-6


def test_copies_share_nothing_and_nothing_is_saved():
    block, shape = build("s3")
    x = image(2, *shape)
    with torch.no_grad():
        before = block(x)
        keys = list(block.state_dict())
        for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert list(copied.state_dict()) == keys
            copied.block[1][0].weight.mul_(2)
            assert not torch.equal(copied(x), before)
        assert torch.equal(block(x), before)


def test_shared_weights():
    first, shape = build("s3")
    second, _ = build("s3")
    second.block = first.block
    x = image(2, *shape)
    with torch.no_grad():
        before = second(x)
        first.block[3][0].weight.mul_(2)
        assert torch.equal(first(x), second(x)) and not torch.equal(second(x), before)


def test_inference_mode():
    block, shape = build("s3")
    x = image(2, *shape)
    with torch.inference_mode():
        inside = build("s3")[0]
        torch.testing.assert_close(inside(x), block(x))


@pytest.mark.parametrize("name", ["s3", "no_squeeze", "pointwise"])
@pytest.mark.parametrize("training", [False, True])
def test_fullgraph(name, training):
    torch._dynamo.reset()
    block, shape = build(name)
    block.train(training)
    x = image(2, *shape)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), one_by_one(copy.deepcopy(block), x), rtol=1e-4, atol=1e-5)


def test_autocast():
    block, shape = build("s3")
    x = image(2, *shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == one_by_one(block, x).dtype
        torch.testing.assert_close(block(x), one_by_one(block, x), rtol=0.02, atol=0.05)


def test_backend_by_name():
    block, shape = build("s3", backend="eager")
    x = image(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(block(x), one_by_one(block, x))
        with pytest.raises(ValueError, match="backend 'cuda' cannot run this call"):
            build("s3", backend="cuda")[0](x)


def test_kernel_runs():
    """Inference really is one op."""
    block, shape = build("s3")
    if pyops._library.not_loaded_reason():
        pytest.skip("no compiled kernels")
    x = image(2, *shape)
    with torch.no_grad(), torch.profiler.profile() as profile:
        block(x)
    names = {event.name for event in profile.events()}
    assert "pyops::mbconv_infer" in names and not any("conv2d" in name for name in names)


def test_drop_path():
    torch.manual_seed(0)
    x = torch.ones(10_000, 2, 1, 1)
    y = DropPath(0.25)(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y[:, 0] == y[:, 1]).all() and abs(y.mean().item() - 1) < 0.03
    assert torch.equal(DropPath(0.25).eval()(x), x) and (DropPath(1.0)(x) == 0).all()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: MBConv(8, 8, 4), "kernel_size: expected an odd size, got 4"),
        (lambda: MBConv(8, 8, stride=0), "stride, expand_ratio: expected 1 or more, got 0 and 6"),
        (lambda: MBConv(8, 8, activation="swish"), "activation: expected one of relu, .*got 'swish'"),
        (lambda: DropPath(1.5), "p: expected 0 to 1, got 1.5"),
        (lambda: MBConv(8, 8).eval().requires_grad_(False)(torch.zeros(1, 9, 5, 5)), "expected .*8"),
    ],
)
def test_errors(make, match):
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=match):
        make()


def test_options_changed_between_calls():
    x = image(2, 12, 8, 8)
    block = shaken(ConvBNAct(12, 14, pool=nn.MaxPool2d(2))).eval()
    upsampling = shaken(UpsampleConvBNAct(12, 14)).eval()
    with torch.no_grad():
        for module, part, changes in (
            (block, 3, dict(kernel_size=3, stride=1, padding=1, ceil_mode=True)),
            (block, 1, dict(eps=0.5)),
            (upsampling, 0, dict(mode="bilinear", scale_factor=3)),
        ):
            module(x)
            for name, value in changes.items():
                setattr(module[part], name, value)
                torch.testing.assert_close(module(x), one_by_one(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d([2, 2]), nn.MaxPool2d((2,)), nn.AvgPool2d(2, [2, 1]), nn.MaxPool2d(2, 5 * 10**6), nn.AvgPool2d((3, 1), None, (1, 0))],
)
def test_options_in_other_forms(pool):
    x = image(2, 12, 8, 8)
    block = shaken(ConvBNAct(12, 14, pool=pool))
    for mode in (True, False):
        block.train(mode)
        with torch.set_grad_enabled(mode):
            twin = copy.deepcopy(block)
            torch.testing.assert_close(block(x), one_by_one(twin, x), rtol=1e-4, atol=1e-5)
    block[3].stride = None
    with torch.no_grad():
        torch.testing.assert_close(block(x), one_by_one(block, x), rtol=1e-4, atol=1e-5)


def test_what_is_given_was_checked():
    """A value that another thread drops while it is being checked is still the one that was checked."""
    from pyops.nn._derived import Derived

    derived, module = Derived(), nn.Linear(2, 3)

    class Facts:
        def __eq__(self, other):
            derived.clear()  # what a thread that calls train() does in between
            return True

        __hash__ = None

    facts = Facts()
    assert derived.get(module, lambda: "first", facts) == "first"
    assert derived.get(module, lambda: pytest.fail("computed again"), facts) == "first"
