"""CapsNet beside its twin, and its losses."""

import pytest
import torch

import pyops
from pyops import models as zoo

from .models import Case, both, check_copies, check_inference, check_training

SMALL = dict(image_size=20, channels=12, capsules=5, capsule_size=4, digit_size=6, num_classes=4, decoder=(11, 13))


def images(channels: int = 1, size: int = 20, batch: int = 3):
    return lambda: (torch.randn(batch, channels, size, size),)


CASES = {"capsnet": Case(images(), SMALL)}
VARIANTS = {
    "small": CASES["capsnet"],
    "lengths_alone": Case(images(3, 23), {**SMALL, "in_channels": 3, "image_size": 23, "decoder": None}),
    "two_iterations": Case(images(batch=1), {**SMALL, "num_iterations": 2, "decoder": ()}),
    "labels": Case(lambda: (*images()(), torch.tensor([3, 0, 3])), SMALL),
}


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_inference(case):
    check_inference("capsnet", case)


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_training(case):
    check_training("capsnet", case)


def test_copies():
    check_copies("capsnet", CASES["capsnet"])


def test_compile():
    model = zoo.capsnet(**SMALL)
    (x,) = images()()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([1, 2, 0])
    for found, wanted in zip(compiled(x, labels), model(x, labels), strict=True):
        torch.testing.assert_close(found, wanted)


def test_parameters():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in zoo.capsnet(decoder=decoder).parameters()) for decoder in (None, (512, 1024))]
    assert counts == [6_804_224, 8_215_568]


def test_routing_reads_the_predictions_as_the_product_left_them(monkeypatch):
    seen = []
    monkeypatch.setitem(
        zoo.DigitCapsules.forward.__globals__, "capsule_routing", lambda u, *rest: seen.append(u) or pyops.capsule_routing(u, *rest)
    )
    zoo.capsnet(**SMALL)(*images()())
    assert seen[0].transpose(0, 1).is_contiguous()


def test_reconstruction_of_the_longest():
    ours, _ = both("capsnet", CASES["capsnet"])
    (x,) = images()()
    with torch.no_grad():
        lengths, free = ours(x)
        assert torch.equal(free, ours(x, lengths.argmax(1))[1])
        assert not torch.allclose(free, ours(x, lengths.argmin(1))[1])
    assert free.shape == x.shape and ((free > 0) & (free < 1)).all()


def test_squash():
    s = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]], requires_grad=True)
    v = zoo.squash(s)
    torch.testing.assert_close(v, torch.tensor([[3 / 5, 4 / 5], [0, 0], [0, -1]]) * torch.tensor([[25 / 26], [1], [1 / 2]]))
    v.sum().backward()
    assert s.grad.isfinite().all() and not s.grad[1].any()


def test_margin_loss():
    lengths = torch.tensor([[0.95, 0.3, 0.05], [0.5, 0.1, 0.8]])
    wanted = torch.tensor((0.5 * 0.2**2 + (0.4**2 + 0.5 * 0.7**2)) / 2)
    torch.testing.assert_close(zoo.margin_loss(lengths, torch.tensor([0, 0])), wanted)
    torch.testing.assert_close(zoo.margin_loss(lengths, torch.tensor([[1, 0, 0], [1, 0, 0]])), wanted)
    both_there = zoo.margin_loss(lengths[1:], torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(both_there, torch.tensor(0.4**2 + 0.1**2))


def test_reconstruction_loss():
    x, y = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    torch.testing.assert_close(zoo.reconstruction_loss(y, x), torch.tensor(0.0005 * 16 * 0.25))


def test_it_learns():
    torch.manual_seed(0)
    model = zoo.capsnet(**SMALL).train()
    x, labels = torch.randn(8, 1, 20, 20), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        lengths, reconstruction = model(x, labels)
        loss = zoo.margin_loss(lengths, labels) + zoo.reconstruction_loss(reconstruction, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x)[0].argmax(1) == labels).all()


def test_errors():
    with pytest.raises(ValueError, match="image_size: two 9x9 convolutions need 17 or more, got 16"):
        zoo.capsnet(image_size=16)
    with pytest.raises(ValueError, match=r"labels: expected 2 integers, or shape \(2, 3\), got torch.float32 of shape \(2,\)"):
        zoo.margin_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels: expected 2 integers, or shape \(2, 3\), got torch.int64 of shape \(4,\)"):
        zoo.margin_loss(torch.zeros(2, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image: expected reconstruction's shape \(2, 3\), got \(2, 4\)"):
        zoo.reconstruction_loss(torch.zeros(2, 3), torch.zeros(2, 4))
