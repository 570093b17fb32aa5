"""Autoencoders, beside their twins."""

import pytest
import torch

import pyops
from pyops import models as zoo

from .models import Case, both, check_copies, check_inference, check_training


def ours_in(model) -> None:
    """Gives a twin that draws normal numbers those of our op: it draws one seed from PyTorch's generator, and of zeros it is eps itself."""
    if hasattr(model, "draw"):
        model.draw = lambda like: pyops.gaussian_sample(torch.zeros_like(like), torch.zeros_like(like), backend="eager")[0]


def rows(features: int, batch: int = 6):
    return lambda: (torch.rand(batch, features),)


SIZES = dict(in_features=24, hidden=(20, 12))
CASES = {
    "stacked_autoencoder": Case(rows(24), SIZES),
    "denoising_autoencoder": Case(rows(24), dict(SIZES, noise=0.0)),
    "variational_autoencoder": Case(rows(24), dict(SIZES, latent=7), ours_in),
    "convolutional_autoencoder": Case(lambda: (torch.rand(2, 3, 32, 32) * 2 - 1,), dict(channels=(8, 16, 16))),
}


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    check_inference(name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training(name):
    check_training(name, CASES[name])


@pytest.mark.parametrize("name", ["variational_autoencoder", "convolutional_autoencoder"])
def test_copies(name):
    check_copies(name, CASES[name])


@pytest.mark.parametrize("name", ["stacked_autoencoder", "variational_autoencoder"])
def test_compile(name):
    model, (x,) = zoo.create(name, **CASES[name].options), CASES[name].inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    found = compiled(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, model(x))


def test_noise_comes_with_training_alone():
    """The same noise as the twin's, from PyTorch's generator."""
    ours, theirs = both("denoising_autoencoder", Case(rows(24), SIZES))
    x = torch.rand(5, 24)
    for train in (True, False):
        results = []
        for model in (ours.train(train), theirs.train(train)):
            torch.manual_seed(2)
            results.append(model(x))
        torch.testing.assert_close(*results)
        assert torch.equal(ours(x), ours(x)) != train


def test_the_loss_is_the_twins():
    ours, theirs = both("variational_autoencoder", CASES["variational_autoencoder"])
    ours_in(theirs)
    x = torch.rand(5, 24)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        losses.append(model.loss(x))
    torch.testing.assert_close(*losses)


def test_a_draw_while_training_and_the_mean_after():
    model, x = zoo.create("variational_autoencoder", **SIZES, latent=5), torch.rand(3, 24)
    assert not torch.equal(model(x)[0], model(x)[0])
    state = torch.random.get_rng_state()
    mean = model.eval().encoder(x)[:, :5]
    torch.testing.assert_close(model(x)[0], model.decoder(mean))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_new_samples():
    model = zoo.create("variational_autoencoder", **SIZES, latent=5)
    first, second = (model.sample(4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (4, 24) and torch.equal(first, second) and not torch.equal(first, model.sample(4))


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model, x = zoo.create("variational_autoencoder", **SIZES, latent=5), torch.rand(32, 24)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_sizes():
    for name, count in (("stacked_autoencoder", 1_050_624), ("variational_autoencoder", 1_149_440), ("convolutional_autoencoder", 28_774)):
        assert sum(p.numel() for p in zoo.create(name).parameters()) == count, name
    for name, option in (("stacked_autoencoder", "hidden"), ("convolutional_autoencoder", "channels")):
        with pytest.raises(ValueError, match=f"{option}: expected one size or more, got none"):
            zoo.create(name, **{option: ()})
