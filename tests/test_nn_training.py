"""Training of the convolution modules: gradients against float64, batch norm's bookkeeping, memory, processes that share statistics."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import pyops
from pyops import _library
from pyops.nn import ConvBNAct, FusedMBConv, MBConv, SqueezeExcitation, UpsampleConvBNAct

from .conftest import assert_gate
from .two_processes import image, step

kernels = pytest.mark.skipif(_library.not_loaded_reason() is not None, reason=str(_library.not_loaded_reason()))
OWN = None if _library.not_loaded_reason() else "cpu"  # auto trains small single convolutions on PyTorch's layers
BLOCKS = {
    "mbconv": (lambda: MBConv(16, 16, 3, 1, 6, drop_path=0.3), (4, 16, 9, 8)),
    "stride": (lambda: MBConv(12, 20, 5, 2, 4), (4, 12, 9, 8)),
    "no_expansion": (lambda: MBConv(13, 13, 3, 1, 1), (4, 13, 7, 9)),
    "no_squeeze": (lambda: MBConv(13, 24, 3, 1, 3, squeeze_channels=0, activation="relu6"), (4, 13, 7, 9)),
    "fused": (lambda: FusedMBConv(16, 16, 3, 1, 4, drop_path=0.2), (4, 16, 9, 8)),
    "fused_one": (lambda: FusedMBConv(16, 16, 3, 1, 1), (4, 16, 9, 8)),
    "pointwise": (lambda: ConvBNAct(16, 24, 1, activation="hardswish", backend=OWN), (4, 16, 9, 8)),
    "depthwise": (lambda: ConvBNAct(16, 16, 3, 2, groups=16), (4, 16, 9, 8)),
    "dense": (lambda: ConvBNAct(16, 24, 3, 2, backend=OWN), (4, 16, 9, 8)),
    "max_pool": (lambda: ConvBNAct(16, 24, 3, pool=torch.nn.MaxPool2d(3, 2, 1)), (4, 16, 9, 8)),
    "average_pool": (lambda: ConvBNAct(16, 24, 1, activation="gelu", pool=torch.nn.AvgPool2d(2)), (4, 16, 9, 8)),
    "nearest": (lambda: UpsampleConvBNAct(12, 14, backend=OWN), (4, 12, 5, 4)),
    "bilinear": (lambda: UpsampleConvBNAct(12, 14, mode="bilinear", pool=torch.nn.MaxPool2d(2)), (4, 12, 5, 4)),
    "squeeze": (lambda: SqueezeExcitation(16, 4), (4, 16, 9, 8)),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


def build(name: str):
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    block = make()
    for part in block.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight, 1.0, 0.3)
            torch.nn.init.normal_(part.bias)
    return block, shape


def as_eager(block):
    """A copy whose layers are PyTorch's: a hook on a part keeps the kernels out."""
    twin = copy.deepcopy(block)
    for part in twin.modules():
        part.register_forward_hook(lambda *_: None)
    return twin


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@blocks
def test_against_float64(name, training):
    block, shape = build(name)
    block.train(training)

    def draw(seed):
        x = image(shape, seed)
        truth = step(as_eager(block).double(), x.double())
        return step(copy.deepcopy(block), x), truth, step(as_eager(block), x)

    assert_gate(draw, torch.float32, gradient=True)


@kernels
@blocks
def test_the_kernels_do_run(name):
    """Neither PyTorch's batch norm nor its activations in a training step."""
    block, shape = build(name)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), pyops.backend("cpu"):  # squeeze-excitation alone on so small a map would be PyTorch's
        block(image(shape).requires_grad_()).sum().backward()
    assert not any("batch_norm" in op and "pyops" not in op for op in seen), seen
    assert any(op.startswith("pyops") for op in seen)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_torchs_after_many_steps(momentum):
    torch.manual_seed(0)
    block = MBConv(8, 8, 3, 1, 4, momentum=momentum)
    twin = as_eager(block)
    for seed in range(20):
        x = image((3, 8, 7, 6), seed)
        block(x), twin(x)
    for (name, found), expected in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_momentum_none_of_the_function():
    x, mean, var, count = image((4, 8, 5, 5)), torch.zeros(8), torch.ones(8), torch.tensor(0)
    twin = torch.nn.BatchNorm2d(8, momentum=None)
    for seed in range(5):
        x = image((4, 8, 5, 5), seed)
        pyops.batch_norm_act(x, mean, var, training=True, momentum=None, num_batches_tracked=count)
        twin(x)
    torch.testing.assert_close([mean, var, count], [twin.running_mean, twin.running_var, twin.num_batches_tracked])


@kernels
def test_saved_for_backward():
    """The convolutions' outputs and the input: 6 + 6 + 1 + 1 units of the input's size, where PyTorch keeps about 44."""
    block, x = MBConv(16, 16, 3, 1, 6), image((4, 16, 32, 32))

    def kept(block):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x.clone(memory_format=torch.channels_last).requires_grad_())
        y.sum()
        return sum(storages.values()) / (x.numel() * 4)

    ours, eager = kept(block), kept(as_eager(block))
    assert ours < 14.5, ours
    assert eager > 30, eager


def test_autocast():
    block, shape = build("mbconv")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = block(image(shape)), as_eager(block)(image(shape))
        assert found.dtype == expected.dtype
        found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@kernels
@blocks
def test_fullgraph(name):
    block, shape = build(name)
    block.stochastic_depth = pyops.nn.DropPath(0.0)
    x = image(shape)
    torch._dynamo.reset()
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for found, expected in zip(step(compiled, x), step(block, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own batch norm compares sizes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@blocks
def test_a_recorded_block_is_torchs_layers(name, training):
    """torch.jit.trace, and so the ONNX exporter, see convolutions and batch norms that everyone knows."""
    block, shape = build(name)
    block.train(training)
    with torch.no_grad():
        graph = torch.jit.trace(copy.deepcopy(block), image(shape), check_trace=False).inlined_graph
    assert "pyops::" not in str(graph) and "_convolution" in str(graph)


def _swap(block, change: str):
    first = block.block[0]
    if change == "no_squeeze":
        block.block[2] = torch.nn.Sequential()
    elif change == "plain_part":
        block.block[1] = torch.nn.Sequential(*block.block[1])
    elif change == "no_drop_path":
        block.stochastic_depth = torch.nn.Identity()
    elif change == "relu":
        first[2] = torch.nn.ReLU()
    elif change == "slope":
        first[2] = torch.nn.LeakyReLU(0.3)
    elif change == "gelu":
        first[2] = torch.nn.GELU(approximate="tanh")
    elif change == "longer":
        first.append(torch.nn.ReLU())
    elif change == "gate":
        block.block[2].scale_activation = torch.nn.Hardsigmoid()
    elif change == "padding":
        block.block[1][0] = torch.nn.Conv2d(96, 96, 3, dilation=2, padding=2, groups=96, bias=False)
    elif change == "last":
        block.block[3].append(torch.nn.ReLU())
    elif change == "bias":
        first[0].bias = torch.nn.Parameter(torch.randn(first[0].out_channels))
    else:
        first[1] = torch.nn.BatchNorm2d(first[0].out_channels, affine=False, track_running_stats=False)
    return block


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change", ["no_squeeze", "plain_part", "no_drop_path", "relu", "slope", "gelu", "longer", "gate", "padding", "last", "bias", "norm"]
)
def test_replaced_layers_are_what_runs(change, training):
    block, shape = build("mbconv")
    block.train(training)
    block(image(shape))  # whatever is kept was made for the old layers
    with torch.no_grad():
        block(image(shape))
    block = _swap(block, change)
    x = image(shape)
    for found, expected in zip(step(copy.deepcopy(block), x), step(as_eager(block), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.manual_seed(3)
        found = block(x)
        torch.manual_seed(3)
        torch.testing.assert_close(found, as_eager(block)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    block, shape = build("stride")
    expected = step(copy.deepcopy(block), image(shape))
    x = image(shape).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    torch.testing.assert_close([y.detach(), x.grad, *(p.grad for p in block.parameters())], expected[: 2 + len(list(block.parameters()))])


def test_hooks_inside_a_block_run():
    block, shape = build("mbconv")
    seen = []
    block.stochastic_depth.register_forward_hook(lambda *_: seen.append("drop path"))
    block.block.register_forward_hook(lambda *_: seen.append("block"))
    block(image(shape))
    assert seen == ["block", "drop path"]


def test_drop_path_alone_in_training():
    block, shape = build("mbconv")
    block.eval().stochastic_depth.train()
    with torch.no_grad():
        torch.manual_seed(0)
        found = block(image(shape))
        torch.manual_seed(0)
        torch.testing.assert_close(found, as_eager(block)(image(shape)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@blocks
def test_output_has_the_inputs_layout(name, layout):
    block, shape = build(name)
    for training in (True, False):
        assert block.train(training)(image(shape).contiguous(memory_format=layout)).is_contiguous(memory_format=layout)


def test_statistics_recalibrated_part_by_part_are_noticed():
    block = ConvBNAct(8, 8, 3).eval()
    x = image((2, 8, 6, 6))
    with torch.no_grad():
        block(x)
    block[1].train()
    for _ in range(5):
        block(x + 3)
    block[1].eval()
    with torch.no_grad():
        torch.testing.assert_close(block(x), copy.deepcopy(block)(x))


@blocks
def test_functional_gradients(name):
    """torch.func follows plain layers, and gets what autograd gets."""
    block, shape = build(name)
    block.eval()
    x = image(shape)
    found = torch.func.grad(lambda v: torch.func.functional_call(block, dict(block.named_parameters()), (v,)).square().sum())(x)
    leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
    block(leaf).square().sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4)


def test_residual_may_change_where_nothing_reads_it_again():
    x, residual = image((2, 8, 6, 6)).requires_grad_(), image((2, 8, 6, 6), 1).requires_grad_()
    kept = residual * 1
    y = pyops.batch_norm_act(x, training=True, residual=kept)
    kept.add_(1)
    y.sum().backward()
    torch.testing.assert_close(residual.grad, torch.ones_like(residual))


def test_running_statistics_rest_in_inference():
    x, mean, var, count = image((2, 8, 6, 6)), torch.zeros(8), torch.ones(8), torch.tensor(3)
    y = pyops.batch_norm_act(x, mean, var, training=False, momentum=None, num_batches_tracked=count)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, mean, var))
    assert mean.eq(0).all() and var.eq(1).all() and count == 3


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=kernels)])
def test_mixed_dtypes_of_batch_norm(backend):
    x, vectors = image((2, 8, 6, 6)), [torch.randn(8).abs() + 0.5 for _ in range(4)]
    expected = torch.nn.functional.batch_norm(x, *vectors)
    bf16 = [vectors[0], vectors[1], vectors[2].bfloat16(), vectors[3].bfloat16()]
    torch.testing.assert_close(pyops.batch_norm_act(x, *bf16, backend=backend), expected, rtol=0.02, atol=0.02)
    doubles = [vectors[0].double(), vectors[1].double(), *vectors[2:]]
    if backend == "cpu":
        torch.testing.assert_close(pyops.batch_norm_act(x, *doubles, backend=backend), expected)


def test_meta_and_tiny_and_empty_inputs():
    with torch.no_grad():
        assert MBConv(8, 8).to("meta")(torch.empty(2, 8, 6, 6, device="meta")).shape == (2, 8, 6, 6)
    with pytest.raises((ValueError, RuntimeError)):
        ConvBNAct(8, 8, 3, padding=0, groups=8)(image((2, 8, 2, 2)))
    x = image((0, 8, 6, 6)).requires_grad_()
    ConvBNAct(8, 16, 1).eval()(x).sum().backward()
    assert x.grad.shape == x.shape


@kernels
def test_gradients_of_gradients_are_refused():
    block, shape = build("pointwise")
    x = image(shape).requires_grad_()
    with pytest.raises(NotImplementedError, match='ask for backend="eager"'):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)
    block.backend = "eager"
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


@pytest.mark.parametrize("N", [0, 1])
def test_small_batches(N):
    block, (_, *rest) = build("stride")
    x = image((N, *rest)).requires_grad_()
    if N == 0:
        block.eval()
        assert block(x).shape == (0, 20, 5, 4)
        return
    block(x).sum().backward()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ConvBNAct(4, 4, 1)(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_large_batch_of_small_maps(training):
    block, _ = build("stride")
    block.train(training)
    x = image((512, 12, 3, 2))
    with torch.no_grad():
        torch.testing.assert_close(block(x), as_eager(block)(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- several processes


@kernels
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_two_processes_share_their_statistics(tmp_path):
    """SyncBN: two processes with unequal shares of a batch get what one process with the whole batch gets; one all-reduce each way."""
    script = Path(__file__).with_name("two_processes.py")
    workers = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    (y0, dx0, *grads0), reduced = torch.load(tmp_path / "0.pt")
    (y1, dx1, *grads1), _ = torch.load(tmp_path / "1.pt")
    torch.manual_seed(0)
    whole, x = MBConv(8, 8, 3, 1, 4), image((5, 8, 6, 6))
    twin = copy.deepcopy(whole)
    cotangents = [torch.randn(n, 8, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float() for n in (2, 3)]
    x.requires_grad_()
    y = twin(x)
    y.backward(torch.cat(cotangents))
    assert reduced == [2 * 32 + 1, 2 * 32 + 1, 2 * 8 + 1, 2 * 8, 2 * 32, 2 * 32, 2 * 8 + 1]
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([y0, y1]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([dx0, dx1]), x.grad, **close)
    count = len(list(twin.parameters()))
    for a, b, p in zip(grads0[:count], grads1[:count], twin.parameters(), strict=True):  # each process has its share of the sum
        torch.testing.assert_close(a + b, p.grad, rtol=1e-3, atol=1e-4)
    for a, expected in zip(grads0[count:-1], [b for name, b in twin.named_buffers() if "running" in name], strict=True):
        torch.testing.assert_close(a, expected, **close)
    expected = pyops.batch_norm_act(x.detach(), None, None, training=True, activation="silu")
    torch.testing.assert_close(torch.cat([grads0[-1], grads1[-1]]), expected, **close)


@kernels
def test_single_convolutions_train_where_they_gain():
    """On auto a dense convolution's layers stay PyTorch's unless Winograd's method runs it; depthwise ones are ours."""

    def trains_here(block, *shape):
        y = block.train()(image(shape).requires_grad_())
        names, nodes = set(), [y.grad_fn]
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        return any("pyops" in name for name in names)

    assert trains_here(ConvBNAct(64, 64, 3), 4, 64, 56, 56) and trains_here(ConvBNAct(16, 16, 3, groups=16), 2, 16, 8, 8)
    assert not trains_here(ConvBNAct(16, 16, 3), 2, 16, 8, 8) and not trains_here(ConvBNAct(64, 128, 1), 2, 64, 28, 28)
    assert trains_here(ConvBNAct(64, 128, 1, backend="cpu"), 2, 64, 28, 28)
