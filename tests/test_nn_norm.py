"""The norms over channels as modules, against torch.nn's own, and what the registry's samples do not draw."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import pyops
from pyops import _library
from pyops.nn import LayerNorm2d, LocalResponseNorm
from pyops.testing import within_gate

pytestmark = pytest.mark.skipif(_library.extension is None, reason=str(_library.not_loaded_reason()))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class PermutedLayerNorm(nn.LayerNorm):
    """torchvision's LayerNorm2d."""

    def forward(self, input):
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActivatedLocalResponseNorm(nn.LocalResponseNorm):
    def forward(self, input):
        return super().forward(input.relu())


def results(module, x):
    """The output, and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], weights)]


PAIRS = {
    "lrn": lambda: (LocalResponseNorm(5, alpha=0.3, k=2.0, backend="cpu"), nn.LocalResponseNorm(5, alpha=0.3, k=2.0)),
    "lrn_relu": lambda: (
        LocalResponseNorm(4, alpha=0.3, beta=0.6, activation="relu", backend="cpu"),
        ActivatedLocalResponseNorm(4, alpha=0.3, beta=0.6),
    ),
    "layer_norm": lambda: (LayerNorm2d(24, backend="cpu"), PermutedLayerNorm(24, eps=1e-6)),
    "layer_norm_plain": lambda: (LayerNorm2d(24, elementwise_affine=False, backend="cpu"), PermutedLayerNorm(24, 1e-6, False)),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", list(PAIRS))
def test_against_torch(kind, layout):
    def draw(seed):
        torch.manual_seed(seed)
        ours, twin = PAIRS[kind]()
        with torch.no_grad():
            for p in twin.parameters():
                p.normal_()
        ours.load_state_dict(twin.state_dict())
        assert list(ours.state_dict()) == list(twin.state_dict())
        x = torch.randn(3, 24, 9, 11).contiguous(memory_format=LAYOUTS[layout])
        found = results(ours, x)
        assert all(t.stride() == x.stride() for t in found[:2])
        return found, results(copy.deepcopy(twin).double(), x.double()), results(twin, x)

    for index, tensors in enumerate(zip(*(zip(*draw(seed), strict=True) for seed in range(6)), strict=True)):
        assert within_gate(list(tensors), torch.float32, gradient=index > 0) is None


@pytest.mark.parametrize("kind", list(PAIRS))
def test_copies(kind):
    module, x = PAIRS[kind]()[0], torch.randn(2, 24, 5, 6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x)) and repr(twin) == repr(module)
    assert (", activation=relu" in repr(module)) == (kind == "lrn_relu")


@pytest.mark.parametrize("kind", list(PAIRS))
def test_layouts_and_strides(kind):
    """One answer for one image, however it lies in memory; contiguous and channels_last stay what they are."""
    module = PAIRS[kind]()[0]
    x = torch.randn(2, 24, 6, 5)
    truth = module(x)
    wide = torch.randn(2, 30, 6, 5)
    wide[:, 3:27] = x
    turned = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for other in (x.contiguous(memory_format=torch.channels_last), wide[:, 3:27], x.repeat_interleave(2, 2)[:, :, ::2], turned):
        found = module(other)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        if other.is_contiguous(memory_format=torch.channels_last):
            assert found.stride() == other.stride()
    for shape in ((3, 24, 1, 1), (1, 24, 1, 7)):
        for memory_format in LAYOUTS.values():
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            assert module(x).stride() == x.stride()


def test_one_channel():
    x = torch.randn(2, 1, 4, 5)
    for other in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(LocalResponseNorm(3, backend="cpu")(other), F.local_response_norm(x, 3))
        assert LayerNorm2d(1, backend="cpu")(other).abs().max() == 0
        assert LayerNorm2d(1, backend="cpu")(other).stride() == other.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_pytorchs_dtype(dtype):
    x = torch.randn(2, 24, 5, 6).to(dtype)
    for kind in PAIRS:
        ours, twin = PAIRS[kind]()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == twin(x).dtype
            assert results(ours, x)[1].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = x[..., 0]
        assert pyops.local_response_norm(flat, 3, backend="cpu").dtype == F.local_response_norm(flat, 3).dtype


def test_who_follows_gets_pytorchs_ops():
    """Forward-mode gradients, torch.func and second derivatives run on PyTorch's own ops, or say that they need them."""
    x = torch.randn(2, 6, 4, 5, dtype=torch.float32)
    weight, bias = torch.randn(6), torch.randn(6)
    calls = (lambda v: pyops.local_response_norm(v, 3, activation="relu"), lambda v: pyops.layer_norm_2d(v, weight, bias))
    for call in calls:
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None
        torch.testing.assert_close(torch.func.vmap(call)(x[:, None]), torch.stack([call(v) for v in x[:, None]]), rtol=1e-5, atol=1e-6)
    live = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pyops.local_response_norm(live, 3, backend="eager").sum(), live, create_graph=True)
    assert grad.requires_grad
    for call in (lambda v: pyops.local_response_norm(v, 3, backend="cpu"), lambda v: pyops.layer_norm_2d(v, backend="cpu")):
        with pytest.raises(NotImplementedError, match="gradients of gradients"):
            torch.autograd.grad(call(live).sum(), live, create_graph=True)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_special_values(layout):
    """NaN and infinities go where PyTorch's go, and a norm of nothing (k = 0) does not reach its neighbours."""
    x = torch.randn(2, 19, 5, 7).contiguous(memory_format=LAYOUTS[layout])
    x[0, 3, 1, 2], x[0, 9, 2, 2], x[1, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    for beta in (0.75, 0.5, 1.0, 0.3):
        for relu in (False, True):
            options = dict(activation="relu" if relu else "none", beta=beta, alpha=0.7)
            ours = results(LocalResponseNorm(5, **options, backend="cpu"), x)
            eager = results(LocalResponseNorm(5, **options, backend="eager"), x)
            torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 19, 5, 7).contiguous(memory_format=LAYOUTS[layout])
    ours, eager = (results(LocalResponseNorm(5, k=0.0, alpha=1.0, backend=name), x) for name in ("cpu", "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    ours, eager = (results(LayerNorm2d(19, eps=0.0, backend=name), x) for name in ("cpu", "eager"))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", [-1.5, -0.1, 0.0, 0.1, 0.6, 0.749, 3.0, 17.0])
def test_any_exponent(beta):
    """Over twelve decades of the base, or as many as the power leaves."""
    draws = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        decades = torch.rand(1, 1, 3000, generator=generator) * 6 - 3
        x = 10 ** (decades / max(1.0, 2 * abs(beta)))
        call = lambda t, name: pyops.local_response_norm(t, 1, alpha=1.0, beta=beta, k=1e-6, backend=name)  # noqa: E731
        draws.append((call(x, "cpu"), call(x.double(), "eager"), call(x, "eager")))
    assert within_gate(draws, torch.float32) is None


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_sums_do_not_depend_on_threads(layout):
    x = torch.randn(4, 64, 33, 31).contiguous(memory_format=LAYOUTS[layout])
    module = LayerNorm2d(64, backend="cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(module, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_only_the_input_is_saved():
    x = torch.randn(2, 24, 5, 6, requires_grad=True)
    for module, most in ((LocalResponseNorm(5, backend="cpu"), 1), (LayerNorm2d(24, backend="cpu"), 2)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            module(x)
        assert len(saved) == most and saved[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_refusals():
    with pytest.raises(ValueError, match="LocalResponseNorm: size: expected 1 or more"):
        LocalResponseNorm(0)
    with pytest.raises(ValueError, match="LocalResponseNorm: activation: expected one of none, relu"):
        LocalResponseNorm(5, activation="silu")
    with pytest.raises(ValueError, match="LayerNorm2d: num_channels: expected 1 or more, got 0"):
        LayerNorm2d(0)
    with pytest.raises(TypeError, match="LayerNorm2d: num_channels: expected an int"):
        LayerNorm2d((3, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\)"):
        LayerNorm2d(4)(torch.randn(1, 3, 2, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its own copies
@pytest.mark.parametrize("kind", ["lrn", "layer_norm"])
def test_opcheck(kind):
    for memory_format in LAYOUTS.values():
        x = torch.randn(2, 6, 7, 3).contiguous(memory_format=memory_format).requires_grad_()
        grad, image, vector = torch.randn(2, 6, 7, 3), x.detach(), torch.randn(6, requires_grad=True)
        if kind == "lrn":
            torch.library.opcheck(torch.ops.pyops.lrn_fwd.default, (x, 3, 0.1, 0.75, 1.0, True))
            torch.library.opcheck(torch.ops.pyops.lrn_bwd.default, (grad, image, 3, 0.1, 0.75, 1.0, True))
        else:
            torch.library.opcheck(torch.ops.pyops.layer_norm_fwd.default, (x, vector, vector, 1e-5))
            torch.library.opcheck(torch.ops.pyops.layer_norm_bwd.default, (grad, image, vector.detach(), 1e-5, True))


def test_which_backend_runs():
    """PyTorch's LayerNorm where it is the faster one: channels_last, in training or small."""
    vectors = torch.ones(24), torch.zeros(24)

    def chosen(size, memory_format, live=False):
        x = torch.zeros(1, 24, size, size).contiguous(memory_format=memory_format).requires_grad_(live)
        return pyops.explain("layer_norm_2d", x, *vectors).chosen

    last, contiguous = torch.channels_last, torch.contiguous_format
    assert [chosen(7, last), chosen(30, last), chosen(30, last, live=True)] == ["eager", "cpu", "eager"]
    assert [chosen(7, contiguous), chosen(7, contiguous, live=True)] == ["cpu", "cpu"]
    assert pyops.explain("local_response_norm", torch.zeros(1, 24, 7, 7), 5).chosen == "cpu"


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_sequence_as_an_image(backend):
    """Channels and positions that are both neighbours of their own kind: strides (L * C, 1, C, 1)."""
    x = torch.randn(2, 9, 7).transpose(1, 2).unsqueeze(-1)
    for function in (lambda x, b: pyops.local_response_norm(x, 3, backend=b), lambda x, b: pyops.layer_norm_2d(x, backend=b)):
        results = []
        for kind, how in ((torch.float32, backend), (torch.float64, "eager")):
            value = x.detach().to(kind).requires_grad_()
            y = function(value, how)
            cotangent = torch.arange(y.numel(), dtype=kind).view(y.shape).sin()
            results.append((y, *torch.autograd.grad(y, value, cotangent)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_sizes_stay_symbols():
    dynamic = torch.export.Dim.DYNAMIC
    for module in (pyops.nn.LayerNorm2d(16), pyops.nn.LocalResponseNorm(5)):
        program = torch.export.export(
            module, (torch.randn(2, 16, 8, 8),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},), strict=False
        )
        x = torch.randn(3, 16, 5, 6)
        torch.testing.assert_close(program.module()(x), module(x))
