"""ConvNeXt's block against the same layers run one by one, and what it keeps between calls."""

import copy

import pytest
import torch

from pyops.nn import ConvNeXtBlock
from pyops.ops import _conv_call, _mlp_ops
from pyops.testing import within_gate


def build(dim=24, seed=0, **options):
    torch.manual_seed(seed)
    block = ConvNeXtBlock(dim, layer_scale=0.5, **options)
    with torch.no_grad():
        block.layer_scale.mul_(torch.rand(dim, 1, 1) + 0.5)
        block.block[2].weight.add_(torch.randn(dim) * 0.2)
    return block


def image(*shape, seed=0, dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=layout)


def one_by_one(block, x):
    return block.stochastic_depth(block.layer_scale * block.block(x)) + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 9, 8), (5, 3, 4), (96, 14, 14)], ids=str)
def test_inference(shape, dtype):
    draws = []
    for seed in range(6):
        block = build(shape[0], seed).eval().to(dtype)
        x = image(2, *shape, seed=seed, dtype=dtype)
        with torch.no_grad():
            found, eager, truth = block(x), one_by_one(block, x), one_by_one(copy.deepcopy(block).double(), x.double())
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        draws.append((found, truth, eager))
    assert within_gate(draws, dtype) is None


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_training(drop_path):
    block = build(drop_path=drop_path).train()
    x = image(6, 24, 9, 8).requires_grad_()
    results = []
    for call in (block, lambda t: one_by_one(block, t)):
        torch.manual_seed(1)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keeps_nothing_stale():
    block, x = build().eval(), image(2, 24, 9, 8)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(block(x), one_by_one(block, x), rtol=1e-4, atol=1e-5)

    check()
    with torch.no_grad():
        block.layer_scale.mul_(2)
    check()
    with torch.no_grad():
        block.block[3].weight.mul_(0.5), block.block[5].bias.add_(1)
    check()
    block.load_state_dict(build(seed=3).state_dict())
    check()
    block.block[4] = torch.nn.ReLU()  # none of the kernel's: the layers run one by one
    check()
    copy.deepcopy(block)(x)


def test_layouts_empty_batches_and_hooks():
    block, x = build().eval(), image(2, 24, 9, 8)
    seen = []
    with torch.no_grad():
        expected = block(x)
        found = block(x.contiguous())
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected)
        assert block(x[:0]).shape == (0, 24, 9, 8)
        for part in (block.block[2], block.block, block.stochastic_depth):
            handle = part.register_forward_hook(lambda *_: seen.append(1))
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
    assert len(seen) == 3


def test_names_are_torchvisions():
    keys = ["layer_scale", "block.0.weight", "block.0.bias", "block.2.weight", "block.2.bias", "block.3.weight", "block.3.bias"]
    assert sorted(build().state_dict()) == sorted([*keys, "block.5.weight", "block.5.bias"])
    assert build().layer_scale.shape == (24, 1, 1)


def test_autocast_and_compile():
    block, x = build().eval(), image(2, 24, 9, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(block(x), one_by_one(block, x), rtol=3e-2, atol=3e-2)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


def test_what_is_fused_on_a_gpu(monkeypatch):
    """Up to the kernel's width, where "cuda" is asked for by name; not float32, unless torch's switch allows TF32."""
    monkeypatch.setattr(_conv_call, "unsupported", lambda device, dtype, backend: None if backend == "cuda" else "not here")
    for dim, dtype, backend, fused in (
        (_mlp_ops.MOST, torch.bfloat16, "cuda", True),
        (_mlp_ops.MOST + 1, torch.bfloat16, "cuda", False),
        (24, torch.float16, None, False),
        (24, torch.float32, "cuda", False),
    ):
        assert build(dim, backend=backend)._has_kernel(image(1, dim, 2, 2, dtype=dtype)) is fused, (dim, dtype, backend)


def test_refusals():
    with pytest.raises(ValueError, match="ConvNeXtBlock: dim: expected 1 or more, got 0"):
        ConvNeXtBlock(0)
    with pytest.raises(RuntimeError):
        build().eval()(torch.zeros(1, 23, 5, 5))
